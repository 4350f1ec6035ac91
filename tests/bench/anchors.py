"""Two anchors for a model that gptcli trained: the same shape on the same data, trained by the plain loop.

    python tests/bench/anchors.py weights/fable --data stories.train.txt.xz novels.train.txt.xz \\
        --valid stories.valid.txt.xz novels.valid.txt.xz --tokens 1e8 [--log anchors.jsonl]

``nanogpt`` is the plain loop (plain_gpt.py) with nanoGPT's recipe for small models: AdamW at 1e-3, 100 steps of
warm-up, a cosine to a tenth, betas 0.9 and 0.99, decay 0.1. ``tuned`` is the same at 2e-3, the rate that gptcli takes
for AdamW by itself (``--lr`` names other rates). Shape and tokenizer are the folder's. They see as many tokens as
``--tokens`` says, or train for ``--minutes`` of the wall; name the data as often as the model saw it, so that the mix
is the same.

Every text's bits per byte come from one function for all three (windows side by side as long as the context, every
token of the stream but the first predicted once, start tokens too, in float32), the folder's own included: not from its
model card. ``gptcli.train.evaluate`` begins a window at each document and predicts no start tokens, so it says a little
less. Each evaluation is a line of ``--log`` at once, so a run that was cut short is of use.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import report
from gptcli_loop import encode, make_tokenizer
from plain_gpt import Recipe, Size, evaluate, make_model, train_steps


def main() -> None:
    options = parse()
    from gptcli.core.build import open_model

    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer(str(options.folder), [])
    valid = {Path(path).name.split(".txt")[0]: encode([path], tokenizer) for path in options.valid}
    tokens, text_bytes = encode(options.data, tokenizer)
    model = open_model(options.folder, tokenizer, device=options.device, dtype="float32")
    config = model.config
    size = Size(config.vocab_size, config.context, config.layers, config.width, config.heads)
    rows = max(1, round(options.batch_tokens / size.context))
    log = Log(options.log)
    log.write(
        {"event": "start", "folder": str(options.folder), "size": vars(size), "data": options.data}
        | {"tokens": len(tokens), "bytes": text_bytes, "rows": rows, "device": options.device, "dtype": options.dtype}
    )
    results: dict[str, dict[str, Any]] = {options.folder.name: {"valid": bits_per_byte(model.transformer, size, valid)}}
    log.write({"event": "folder", **results[options.folder.name]})
    del model
    for name, lr in options.anchors.items():
        results[name] = train_anchor(name, lr, size, tokens, valid, rows, log, options)
    show(options, results, size)


def train_anchor(
    name: str,
    lr: float,
    size: Size,
    tokens: Any,
    valid: dict[str, Any],
    rows: int,
    log: Log,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one anchor to its end; returns its last line of the log."""
    model = make_model(size, seed=options.seed, device=options.device)
    total = None if options.tokens is None else max(1, round(options.tokens / (rows * size.context)))
    recipe = Recipe(
        steps=total,
        minutes=options.minutes,
        rows=rows,
        micro_rows=options.micro,
        lr=lr,
        dtype=getattr(torch, options.dtype),
        compile=options.compile,
        seed=options.seed,
    )
    start = told = time.perf_counter()
    step, since, losses = 0, 0, torch.zeros((), device=options.device)

    def line(event: str, loss: float) -> dict[str, Any]:
        seconds = time.perf_counter() - start  # evaluations included
        seen = {"event": event, "anchor": name, "lr": lr, "step": step, "tokens": step * rows * size.context}
        return {**seen, "seconds": seconds, "loss": loss}

    for loss in train_steps(model, tokens, recipe):
        step, losses, since = step + 1, losses + loss, since + 1
        if time.perf_counter() - told >= 60 * options.eval_minutes:
            log.write(line("eval", losses.item() / since) | {"valid": bits_per_byte(model, size, valid)})
            told, losses, since = time.perf_counter(), torch.zeros_like(losses), 0
    log.write(line("done", losses.item() / max(1, since)) | {"valid": bits_per_byte(model, size, valid)})
    return log.last


def bits_per_byte(model: Any, size: Size, valid: dict[str, Any]) -> dict[str, float]:
    """Of each held-out text, ``(tokens, bytes)`` by name."""
    return {
        name: evaluate(model, tokens, size.context)[0] / math.log(2) / text_bytes
        for name, (tokens, text_bytes) in valid.items()
    }


class Log:
    """JSON lines, each written at once, and told on stderr."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last: dict[str, Any] = {}

    def write(self, line: dict[str, Any]) -> None:
        self.last = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr)


def show(options: argparse.Namespace, results: dict[str, dict[str, Any]], size: Size) -> None:
    rows = {}
    for name, result in results.items():
        seen = f"   {result['tokens'] / 1e6:,.1f} M tokens, {result['seconds']:,.0f} s" if "tokens" in result else ""
        rows[name] = "   ".join(f"{text} {bits:.4f}" for text, bits in result["valid"].items()) + seen
    title = f"bits per byte beside anchors of {size.layers} layers, width {size.width}"
    report(title, rows, {"results": results, "size": vars(size), "data": options.data, "dtype": options.dtype})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model folder that the anchors stand beside")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--valid", nargs="+", required=True, metavar="FILE")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--tokens", type=float, help="for each anchor")
    length.add_argument("--minutes", type=float, help="for each anchor")
    parser.add_argument("--lr", nargs="+", type=float, metavar="X", help="other anchors: one for each rate")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro", type=int, help="rows a forward pass; default: all")
    parser.add_argument("--eval-minutes", type=float, default=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("anchors.jsonl"), help="appended to")
    options = parser.parse_args()
    rates = {f"lr {rate:g}": rate for rate in options.lr or []}
    options.anchors = rates or {"nanogpt": 1e-3, "tuned": 2e-3}
    return options


if __name__ == "__main__":
    main()
