"""How far the embedding table does analogies: ``a : b :: c : d`` by the token nearest to b - a + c.

    python tests/bench/analogies.py [--model weights/fable] [--list FILE] [--table embedding] [--seeds 5]

For each question the rank of d among all tokens by cosine, with a, b and c left out as is the custom, and with them in
the running, which is harder: b - a + c often stays nearest to c or b. Rows are scaled to length 1 first (3CosAdd:
Mikolov et al. 2013; the name is Levy and Goldberg's, 2014); "raw" is without that, as ``embed --expression`` adds.
"Nearest to c alone" forgets a and b: what the direction from a to b has no part in (Linzen 2016).
Beside it the same list on random tables of the same shape, whose rows have the real ones' lengths: what chance gives.
Questions with a word that is not one token of the model are left out and counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, report
from torch import Tensor

LIST = ROOT / "tests" / "data" / "analogies.txt"


class Question(NamedTuple):
    """``a : b :: c : d``, as token ids."""

    a: int
    b: int
    c: int
    d: int


def main() -> None:
    options = parse()
    sys.path.insert(0, str(ROOT))
    from gptcli.core.build import open_model
    from gptcli.core.embedding import Rows
    from gptcli.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(options.model)
    sections, missed = questions(read_list(options.list), tokenizer)
    table = Rows(open_model(options.model, tokenizer, dtype="float32"), options.table).weight
    every = [question for section in sections.values() for question in section]
    rows, result = {}, {}
    for name, asked in {**sections, "all": every}.items():
        found = score(ranks(table, asked))
        result[name] = found
        rows[f"{name} ({found['questions']})"] = shown(found)
    result["all, a b c in the running"] = score(ranks(table, every, excluded=False))
    result["all, nearest to c alone"] = score(ranks(table, every, direction=0.0))
    result["all, raw"] = score(ranks(table, every, normalize=False))
    chance = [score(ranks(random_table(table, seed), every)) for seed in range(options.seeds)]
    result["random table"] = {key: statistics.mean(each[key] for each in chance) for key in chance[0]}
    for name in ("all, a b c in the running", "all, nearest to c alone", "all, raw", "random table"):
        rows[name] = shown(result[name])
    rows["left out, not single tokens"] = str(missed)
    title = f"analogies on the {options.table} of {options.model.name}"
    report(title, rows, {"vocabulary": len(table), "left_out": missed, "sections": result})


def read_list(file: Path) -> dict[str, list[tuple[str, ...]]]:
    """The questions of a list by section, as words; lines that begin with # before an empty line are remarks."""
    sections: dict[str, list[tuple[str, ...]]] = {}
    name = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            name = line[1:].strip()
        elif line.strip():
            words = tuple(line.replace("::", ":").split(" : "))
            if len(words) != 4:
                raise SystemExit(f"{file}: {line!r} is not a : b :: c : d")
            sections.setdefault(name, []).append(words)
    return sections


def questions(
    sections: Mapping[str, Sequence[tuple[str, ...]]], tokenizer: Any
) -> tuple[dict[str, list[Question]], int]:
    """The same as ids of single tokens with a space before them, and how many are left out since they are not."""
    found: dict[str, list[Question]] = {}
    missed = 0
    for name, section in sections.items():
        for words in section:
            ids = [tokenizer.encode(" " + word) for word in words]
            if all(len(each) == 1 for each in ids):
                found.setdefault(name, []).append(Question(*(each[0] for each in ids)))
            else:
                missed += 1
    return found, missed


def ranks(
    table: Tensor, asked: Sequence[Question], *, excluded: bool = True, normalize: bool = True, direction: float = 1.0
) -> list[int]:
    """The rank of d, from 1, among all rows ``[V, C]`` by cosine with ``direction * (b - a) + c``."""
    unit = table.float() / table.float().norm(dim=-1, keepdim=True)
    summed = unit if normalize else table.float()
    found = []
    for a, b, c, d in asked:
        scores = unit @ (direction * (summed[b] - summed[a]) + summed[c])
        if excluded:
            scores[[a, b, c]] = -math.inf
        found.append(1 + int((scores > scores[d]).sum()))
    return found


def random_table(like: Tensor, seed: int) -> Tensor:
    """Rows in random directions, as long as a table's own."""
    rows = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True) * like.float().norm(dim=-1, keepdim=True)


def score(found: Sequence[int]) -> dict[str, float]:
    """The share of first places, of places up to 10, the mean of 1 / rank, and the median rank."""
    return {
        "questions": len(found),
        "first": sum(rank == 1 for rank in found) / len(found),
        "top_10": sum(rank <= 10 for rank in found) / len(found),
        "mean_reciprocal_rank": statistics.mean(1 / rank for rank in found),
        "median_rank": statistics.median(found),
    }


def shown(found: Mapping[str, float]) -> str:
    return (
        f"first {found['first']:7.2%}  among 10 {found['top_10']:7.2%}  "
        f"MRR {found['mean_reciprocal_rank']:.4f}  median rank {found['median_rank']:g}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "fable", help="a model folder")
    parser.add_argument("--list", type=Path, default=LIST)
    parser.add_argument("--table", choices=("embedding", "unembedding"), default="embedding")
    parser.add_argument("--seeds", type=int, default=5, help="random tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
