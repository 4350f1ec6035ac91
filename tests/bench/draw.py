"""What drawing a token costs, natively and in PyTorch beside the slow twin, and what it leaves of greedy decoding.

python tests/bench/draw.py [--model fable] [--dtype bfloat16] [--tokens 400] [--rounds 5] [--threads 2]

"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from common import ROOT, in_turn, report, summary

sys.path.insert(0, str(ROOT))

CHAINS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {"temperature": 0.8},
    "top-k 40": {"temperature": 0.8, "top_k": 40},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fable")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    from gptcli.cli.caches import native_cache
    from gptcli.core import native_build, runtime

    runtime.set_threads(options.threads)
    library = native_build.load(native_cache())
    rows: dict[str, str] = {}
    results = [*draws(library, options.rounds, rows), *texts(options, rows)]
    report(f"draw, {options.model} {options.dtype}", rows, {"results": results})


def draws(library: Any, rounds: int, rows: dict[str, str]) -> list[dict[str, Any]]:
    """Seconds of one draw, for some vocabularies, batches and chains."""
    import torch

    from gptcli.core.draw import Draw
    from gptcli.core.sampling import sample
    from gptcli.core.settings import Sampling

    results = []
    for size, batch in ((4096, 1), (4096, 8), (4096, 32), (50_257, 1), (50_257, 8)):
        logits = 3 * torch.randn(batch, size, generator=torch.Generator().manual_seed(0))
        for name, chain in CHAINS.items():
            sampling = Sampling(**chain)

            def twin(*given: Any, sampling: Sampling = sampling) -> Any:
                return sample(given[0], sampling, given[1], given[2])

            ways = {"sample": twin, "PyTorch": Draw(sampling), "native": Draw(sampling, library)}
            things = {way: lambda draw=draw, logits=logits: seconds_of(draw, logits) for way, draw in ways.items()}
            measured = {way: summary(values) for way, values in in_turn(things, rounds).items()}
            slow = measured["sample"]["median"]
            rows[f"V {size:,}, {batch} rows, {name}"] = "   ".join(
                f"{way} {each['median'] * 1e6:8.1f} us {slow / each['median']:6.1f} x" for way, each in measured.items()
            )
            results.append({"vocabulary": size, "rows": batch, "chain": chain, "seconds": measured})
    return results


def seconds_of(draw: Callable[..., Any], logits: Any, count: int = 20) -> float:
    rows = len(logits)
    start = time.perf_counter()
    for position in range(count):
        draw(logits, range(rows), [position] * rows)
    return (time.perf_counter() - start) / count


def texts(options: argparse.Namespace, rows: dict[str, str]) -> list[dict[str, Any]]:
    """Tokens per second of greedy and of sampled texts, as ``generate`` makes them."""
    from gptcli.cli.caches import native_cache
    from gptcli.core.build import open_model
    from gptcli.core.generate import generate
    from gptcli.core.requests import Request, Timing
    from gptcli.core.settings import Sampling
    from gptcli.text.tokenizer import Tokenizer

    folder = ROOT / "weights" / options.model
    tokenizer = Tokenizer.from_folder(folder)
    model = open_model(folder, tokenizer, device="cpu", dtype=options.dtype, native=native_cache())
    results = []
    for batch in (1, 8, 32):

        def speed(chain: dict[str, Any], batch: int = batch) -> float:
            timing = Timing()
            requests = [Request([5, 6, 7], row, options.tokens, ignore_eos=True) for row in range(batch)]
            for _ in generate(model, requests, Sampling(**chain), timing=timing):
                pass
            return timing.tokens_per_second

        chains = {"greedy": {"temperature": 0}, **CHAINS}
        things = {name: lambda chain=chain: speed(chain) for name, chain in chains.items()}
        speed({"temperature": 0.8})
        measured = {name: summary(values) for name, values in in_turn(things, options.rounds).items()}
        for name, each in measured.items():
            share = each["median"] / measured["greedy"]["median"]
            rows[f"text, {batch} rows, {name}"] = f"{each['median']:8.1f} tokens/s {share:5.2f} of greedy"
        results.append({"rows": batch, "tokens_per_second": measured})
    return results


if __name__ == "__main__":
    main()
