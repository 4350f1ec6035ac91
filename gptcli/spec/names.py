"""Per family: our tensor names, the names on disk, and the operation between them. Data, and the one function that expands it.

A rule joins the rows of our tensors (query above key above value) into one tensor on disk, transposed if the family
keeps its matrices as ``[in, out]`` (GPT-2's Conv1D). ``{i}`` runs over the layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from gptcli.spec.config import ModelConfig
from gptcli.spec.params import tensors


@dataclass(frozen=True)
class Rule:
    disk: str
    ours: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """The name table of one family.

    ``prefix`` stands before every name but the unembedding's in what we write, and may be missing in what we read;
    ``ignored`` matches buffers that old files carry and nobody needs.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: re.Pattern[str] = field(default=re.compile(r"(?!)"))


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of a model file: its shape on disk and our tensors that it holds, as (name, rows)."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    transpose: bool


def _both(disk: str, *ours: str, transpose: bool = False) -> tuple[Rule, Rule]:
    """The weight and the bias of one layer under the same names; only a matrix is transposed."""
    return (
        Rule(f"{disk}.weight", tuple(f"{name}.weight" for name in ours), transpose),
        Rule(f"{disk}.bias", tuple(f"{name}.bias" for name in ours)),
    )


_ATTENTION = tuple(f"blocks.{{i}}.attention.{name}" for name in ("query", "key", "value"))

_GPT_BLOCK = (
    *_both("h.{i}.ln_1", "blocks.{i}.attention_norm"),
    *_both("h.{i}.attn.c_attn", *_ATTENTION, transpose=True),
    *_both("h.{i}.attn.c_proj", "blocks.{i}.attention.output", transpose=True),
    *_both("h.{i}.ln_2", "blocks.{i}.mlp_norm"),
    *_both("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up", transpose=True),
    *_both("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down", transpose=True),
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        rules=(
            Rule("wte.weight", ("embedding.weight",)),
            Rule("wpe.weight", ("positions.weight",)),
            *_GPT_BLOCK,
            *_both("ln_f", "norm"),
            Rule("lm_head.weight", ("unembedding.weight",)),
        ),
        prefix="transformer.",
        ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    ),
    "openai-gpt": Family(
        rules=(
            Rule("tokens_embed.weight", ("embedding.weight",)),
            Rule("positions_embed.weight", ("positions.weight",)),
            *_GPT_BLOCK,
        ),
        prefix="transformer.",
        ignored=re.compile(r"h\.\d+\.attn\.bias|position_ids"),
    ),
}

# The names of an unembedding: outside the prefix, and left out of the file when tied.
HEADS = frozenset({"lm_head.weight"})


def disk_layout(config: ModelConfig) -> dict[str, DiskTensor]:
    """Every tensor of the model's file by its name on disk without the prefix, in the order of the forward pass."""
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    layout: dict[str, DiskTensor] = {}
    for rule in FAMILIES[config.family].rules:
        layers = range(config.layers) if "{i}" in rule.disk else range(1)
        for i in layers:
            ours = [name.replace("{i}", str(i)) for name in rule.ours]
            if not all(name in shapes for name in ours):
                continue
            rows = tuple((name, shapes[name][0]) for name in ours)
            shape = (sum(count for _, count in rows), *shapes[ours[0]][1:])
            shape = shape[::-1] if rule.transpose else shape
            layout[rule.disk.replace("{i}", str(i))] = DiskTensor(shape, rows, rule.transpose)
    return layout


def written_name(config: ModelConfig, name: str) -> str:
    """The name under which ``transformers`` writes a tensor of the layout."""
    return name if name in HEADS else FAMILIES[config.family].prefix + name


def match_names(config: ModelConfig, names: Iterable[str]) -> tuple[dict[str, str], list[str], list[str]]:
    """Match the names in a file with the layout.

    Returns ``(found, missing, left over)``: layout name -> name in the file, layout names without one, and names in
    the file that belong to nothing. A tied model's file may repeat its unembedding.
    """
    family = FAMILIES[config.family]
    layout = disk_layout(config)
    found: dict[str, str] = {}
    extra: list[str] = []
    for name in names:
        bare = name.removeprefix(family.prefix)
        if bare in layout and bare not in found:
            found[bare] = name
        elif not (family.ignored.fullmatch(bare) or (config.tied and bare in HEADS)):
            extra.append(name)
    return found, [name for name in layout if name not in found], extra
