"""Tokens per second of prefill and decode by each way to compute them, for each kind of weights, in turn.

    python tests/bench/steps.py [--preset gpt2 | --model fable] [--kinds float32,bfloat16,int8,int4]
        [--steps transformer,lean,native] [--prompts 32,768] [--tokens 128] [--batch 1] [--rounds 5] [--threads 2]

Ratios are to the first way of ``--steps``. ``native`` wants the library that ``gptcli models prepare`` builds; its
prompts are computed by the transformer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT, in_turn, random_folder, report, summary

sys.path.insert(0, str(ROOT))

# Weights of these kinds: how the model is opened.
KINDS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}
Forward = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--model", help="a shipped model, instead of a preset's random weights")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", default="transformer,lean")
    parser.add_argument("--prompts", default="32,768")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    from gptcli.core import runtime
    from gptcli.core.build import open_model
    from gptcli.text.tokenizer import Tokenizer

    runtime.set_threads(options.threads)
    rows: dict[str, str] = {}
    results = []
    with folder_of(options) as folder:
        tokenizer = Tokenizer.from_folder(ROOT / "weights" / "fable")
        for kind in options.kinds.split(","):
            dtype, quantize = KINDS[kind]
            model = open_model(folder, tokenizer, device="cpu", dtype=dtype, quantize=quantize)
            for count in map(int, options.prompts.split(",")):
                ways = [way_of(name, model.transformer, options) for name in options.steps.split(",")]
                for name, measured in zip(options.steps.split(","), measure(model, ways, count, options), strict=True):
                    result = {"weights": kind, "step": name, "prompt": count, **measured}
                    results.append(result)
                    rows[f"{kind} {count} {name}"] = line(result, results)
    title = f"steps {options.model or options.preset}, batch {options.batch}, + {options.tokens} tokens"
    report(title, rows, {"results": results})


def folder_of(options: argparse.Namespace) -> contextlib.AbstractContextManager[Path]:
    if options.model:
        return contextlib.nullcontext(ROOT / "weights" / options.model)
    return random_folder(options.preset)


def way_of(name: str, transformer: Any, options: argparse.Namespace) -> tuple[Forward, Any]:
    """The forward, as the transformer's own, and the dtype of a cache for it."""
    dtype = transformer.embedding.weight.dtype
    if name == "transformer":
        return transformer, dtype
    if name == "lean":
        from gptcli.core.lean import Lean

        lean = Lean(transformer)
        return lean, lean.cache_dtype
    from gptcli.cli.caches import native_cache
    from gptcli.core import stepping

    step = stepping.Stepping(transformer, native_cache()).step(tokens=options.tokens, rows=options.batch)

    def native(ids: Any, cache: Any, last: Any = None) -> Any:
        return transformer(ids, cache, last=last) if last is not None else step(ids[:, 0], cache)[:, None]

    return native, dtype


def measure(model: Any, ways: list[tuple[Forward, Any]], count: int, options: argparse.Namespace) -> Iterator[Any]:
    """Tokens per second of each way, prefill and decode."""
    import torch

    from gptcli.core.cache import KVCache

    config, tokens = model.config, options.tokens
    count = min(count, config.context - tokens - 1)
    ids = (torch.arange(count * options.batch) * 37 % config.vocab_size).view(options.batch, count)
    last = torch.full((options.batch,), count - 1)

    @torch.inference_mode()
    def run(place: int) -> float:
        forward, dtype = ways[place]
        cache = KVCache(config, options.batch, count + tokens, device="cpu", dtype=dtype)
        start = time.perf_counter()
        token = forward(ids, cache, last=last).argmax(-1)
        filled = time.perf_counter()
        for _ in range(tokens):
            token = forward(token[:, None], cache)[:, -1].argmax(-1)
        prefills[place].append(options.batch * count / (filled - start))
        return options.batch * tokens / (time.perf_counter() - filled)

    prefills: list[list[float]] = [[] for _ in ways]
    things = {str(place): lambda place=place: run(place) for place in range(len(ways))}
    for thing in things.values():
        thing()
    for each in prefills:
        each.clear()
    decodes = in_turn(things, options.rounds)
    for place in range(len(ways)):
        yield {
            "decode_tokens_per_second": summary(decodes[str(place)]),
            "prefill_tokens_per_second": summary(prefills[place]),
        }


def line(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    same = next(each for each in results if all(each[name] == result[name] for name in ("weights", "prompt")))
    words = []
    for name in ("decode", "prefill"):
        key = f"{name}_tokens_per_second"
        value, base = result[key]["median"], same[key]["median"]
        words.append(f"{name} {value:8.1f} tokens/s {value / base:5.2f} x {same['step']}")
    return "   ".join(words)


if __name__ == "__main__":
    main()
