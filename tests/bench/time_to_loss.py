"""How many tokens gptcli needs for the loss that a plain loop ends with: at most two thirds of them is the goal.

    python tests/bench/time_to_loss.py shakespeare --data tinyshakespeare.txt
    python tests/bench/time_to_loss.py stories --data stories.train.txt.xz --valid stories.valid.txt.xz [--tokens 4e6]

First the plain loop (plain_gpt.py) trains for all tokens with nanoGPT's recipe for small models: AdamW, 1e-3 after 100
steps of warm-up, a cosine to a tenth, betas 0.9 and 0.99, decay 0.1, windows at random. Then gptcli, whose schedule has
to know its end as well, trains for ``--fraction`` of these tokens with its loop's defaults (``gptcli.train.loop.Plan``:
Muon at 5e-3, as the command), or with what ``--gptcli`` names. It has won if it ends no higher. Where its
curve first is no higher, evaluated every ``--evals``-th part of the run, is reported too; so is the least loss that the
plain loop saw, which differs where it overfits.

Same for both: tokenizer, model size, context, rows a step (unless ``--gptcli-rows``), number type, the tokens to train
and to evaluate on, and the evaluation itself (float32, windows side by side, each token predicted once).
Not the same: initial weights and the order of the windows, which belong to each program.
Without ``--valid`` the last tenth of the text is held out, as nanoGPT does. ``--log FILE`` keeps the curves as they
grow.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import report
from gptcli_loop import documents_in, encode, gptcli_steps, make_tokenizer, parse_settings
from plain_gpt import Recipe, Size, evaluate, make_model, train_steps


@dataclass(frozen=True)
class Setup:
    """``tokenizer`` is a number of tokens to train one with, or a folder; ``tokens`` is how many to train on."""

    tokenizer: str
    layers: int
    width: int
    heads: int
    context: int
    rows: int
    tokens: float
    dropout: float = 0.0


SETUPS = {
    # nanoGPT's shakespeare_char as its README runs it on a CPU, then as its config file has it: a token a character.
    "shakespeare": Setup("257", 4, 128, 4, 64, 12, 2000 * 12 * 64),
    "shakespeare-large": Setup("257", 6, 384, 6, 256, 64, 5000 * 64 * 256, 0.2),
    "stories": Setup("8192", 8, 384, 6, 256, 16, 4e6),
}


@dataclass
class Run:
    """One training run: its curve as ``(tokens, held-out loss in nats)``, and the seconds without evaluation."""

    name: str
    curve: list[tuple[int, float]]
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.curve[-1][1]

    @property
    def best(self) -> float:
        return min(loss for _, loss in self.curve)

    def first_at(self, loss: float) -> int | None:
        """Tokens at the first evaluation that is no higher."""
        return next((tokens for tokens, seen in self.curve if seen <= loss), None)


def follow(run: Run, model: Any, steps: Iterable[Any], total: int, options: argparse.Namespace, valid: Any) -> Run:
    """Take all steps, and evaluate every so often and at the end."""
    tokens_a_step = (options.gptcli_rows if run.name == "gptcli" else options.rows) * options.context
    every = max(1, total // options.evals)
    start = time.perf_counter()
    for step, _ in enumerate(steps, 1):
        if step % every and step != total:
            continue
        if options.device == "cuda":
            torch.cuda.synchronize()
        run.seconds += time.perf_counter() - start
        nats, count = evaluate(model, valid, options.context)
        run.curve.append((step * tokens_a_step, nats / count))
        line = {"run": run.name, "step": step, "tokens": run.curve[-1][0], "loss": nats / count, "seconds": run.seconds}
        print(f"{run.name:>7}  step {step:,}/{total:,}  held-out loss {nats / count:.4f}", file=sys.stderr)
        if options.log:
            with options.log.open("a") as log:
                log.write(json.dumps(line) + "\n")
        start = time.perf_counter()
    return run


def main() -> None:
    options = parse()
    dtype = getattr(torch, options.dtype)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(options.tokenizer, documents_in(options.data))
    stream, _ = encode(options.data, tokenizer)
    if options.valid:
        train, valid = stream, encode(options.valid, tokenizer)[0]
    else:
        train, valid = stream[: len(stream) * 9 // 10], stream[len(stream) * 9 // 10 :]
    valid = valid[: options.valid_tokens + 1]
    size = Size(tokenizer.vocab_size, options.context, options.layers, options.width, options.heads)
    print(f"{len(train):,} tokens to train on, {len(valid):,} to evaluate on; {size}", file=sys.stderr)

    total = max(1, round(options.tokens / (options.rows * options.context)))
    model = make_model(size, seed=options.seed, device=options.device, dropout=options.dropout)
    recipe = Recipe(
        steps=total,
        rows=options.rows,
        lr=options.lr,
        micro_rows=options.micro,
        dtype=dtype,
        compile=options.compile,
        seed=options.seed,
    )
    plain = follow(Run("plain", []), model, train_steps(model, train, recipe), total, options, valid)
    del model

    fewer = max(1, int(options.fraction * total * options.rows / options.gptcli_rows))
    with tempfile.TemporaryDirectory() as out:
        model, events = gptcli_steps(
            size,
            train,
            rows=options.gptcli_rows,
            steps=fewer,
            out=Path(out),
            dtype=dtype,
            compile=options.compile,
            device=options.device,
            seed=options.seed,
            settings=parse_settings(options.gptcli),
        )
        ours = follow(Run("gptcli", []), model, events, fewer, options, valid)
    show(options, size, plain, ours)


def show(options: argparse.Namespace, size: Size, plain: Run, ours: Run) -> None:
    whole = plain.curve[-1][0]
    crossed, crossed_best = ours.first_at(plain.final), ours.first_at(plain.best)
    rows = {
        run.name: f"{run.curve[-1][0]:12,} tokens  final {run.final:.4f}  least {run.best:.4f} nats a token"
        f"  {run.seconds:,.0f} s"
        for run in (plain, ours)
    }
    for title, tokens in (("as low as plain's final", crossed), ("as low as plain's least", crossed_best)):
        rows[title] = "never" if tokens is None else f"{tokens:12,} tokens  {tokens / whole:.3f} of plain's"
    rows["no higher at the end"] = "yes" if ours.final <= plain.final else "no"
    result = {
        "size": vars(size),
        "runs": {run.name: {"curve": run.curve, "seconds": run.seconds} for run in (plain, ours)},
        "final_loss": {"plain": plain.final, "gptcli": ours.final},
        "tokens": {"plain": whole, "gptcli": ours.curve[-1][0]},
        "no_higher_at_the_end": ours.final <= plain.final,
        "tokens_to_plain_final": crossed,
        "ratio": None if crossed is None else crossed / whole,
        "ratio_to_plain_least": None if crossed_best is None else crossed_best / whole,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    report(f"time to a loss: {options.setup}, {options.device} {options.dtype}", rows, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setup", choices=SETUPS)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--valid", nargs="+", metavar="FILE")
    for name, kind in Setup.__annotations__.items():
        parser.add_argument(f"--{name}", type={"int": int, "float": float}.get(kind, str), help="as the set-up has it")
    parser.add_argument("--valid-tokens", type=int, default=65_536, help="evaluate on at most so many")
    parser.add_argument("--fraction", type=float, default=2 / 3, help="of plain's tokens, for gptcli")
    parser.add_argument("--evals", type=int, default=40, help="evaluations a run")
    parser.add_argument("--lr", type=float, default=1e-3, help="the plain loop's")
    parser.add_argument("--micro", type=int, help="rows a forward pass of the plain loop; default: all")
    parser.add_argument("--gptcli-rows", type=int, help="rows a step of gptcli; default: as the plain loop")
    parser.add_argument("--gptcli", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of gptcli's Plan")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="both")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, metavar="FILE")
    options = parser.parse_args()
    for name, value in vars(SETUPS[options.setup]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.gptcli_rows = options.gptcli_rows or options.rows
    return options


if __name__ == "__main__":
    main()
