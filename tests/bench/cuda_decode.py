"""On a CUDA device: decode and prefill beside what the device allows, all in one run, and beside transformers.

    python tests/bench/cuda_decode.py [--presets gpt2,gpt2-xl] [--quantize none,int8,int4] [--compile] [--rounds 5]
        [--device cpu --short]

Decode is batch 1 in bfloat16, a prompt of 32 tokens and 128 more, all that ``generate`` does between two of them
included; its limit is the time to read the weights once a token at the rate of copies. Prefill is 8 prompts of 1,024
tokens; its limit is the rate of square matrix products. Weights are random. ``transformers`` is compared where it is
installed. ``--device cpu --short`` tries the script where there is no GPU, on a tiny model: it says nothing of speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, in_turn, report, summary

sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="gpt2,gpt2-xl")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--compile", action="store_true", help="also compiled steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--short", action="store_true", help="a tiny model and few tokens, to try the script")
    options = parser.parse_args()
    import torch

    from gptcli.core import runtime
    from gptcli.core.measure import measure_machine
    from gptcli.errors import GptcliError

    try:
        device = runtime.pick_device(options.device)
    except GptcliError as error:
        sys.exit(f"error: {error.message}\nhint: it measures a GPU; --device cpu --short tries the script without one")
    machine = measure_machine(device, torch.bfloat16)
    name = runtime.device_name(device)
    results: dict[str, Any] = {}
    rows = {
        "copies": f"{machine.bytes_per_second / 1e12:.2f} TB/s",
        "matrix products": f"{machine.flops_per_second / 1e12:.0f} TFLOP/s in bfloat16",
    }
    for preset in options.presets.split(","):
        results[preset] = measure(preset, device, machine, options)
        rows |= {f"{preset} {what}": line(found) for what, found in results[preset].items()}
    limits = {"bytes_per_second": machine.bytes_per_second, "flops_per_second": machine.flops_per_second}
    report(f"CUDA decode and prefill on {name}", rows, {"device": name, "machine": limits, "results": results})


def measure(preset: str, device: Any, machine: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Each thing measured in turn; its figures under its name."""
    import torch

    from gptcli.core.build import open_model
    from gptcli.core.decode import Decoder
    from gptcli.core.generate import generate
    from gptcli.core.measure import some_ids, weight_bytes
    from gptcli.core.requests import Request, Timing
    from gptcli.core.settings import Sampling
    from gptcli.spec.flops import count_flops
    from gptcli.text.tokenizer import Tokenizer

    tokens, batch, prompt = (16, 2, 32) if options.short else (128, 8, 1024)
    tokenizer = Tokenizer.from_folder(ROOT / "weights" / "fable")
    things: dict[str, Callable[[], float]] = {}  # seconds
    limit: dict[str, float] = {}
    loops: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(preset, Path(temporary), options.short)
        ways = [(kind, False) for kind in options.quantize.split(",")]
        if options.compile:
            ways.append(("none", True))
        for kind, compiled in ways:
            model = open_model(folder, tokenizer, device=str(device), dtype="bfloat16", quantize=kind, compile=compiled)
            request = Request(some_ids(model, 32), seed=1, max_tokens=tokens, ignore_eos=True)
            words = [] if kind == "none" else [kind]
            words += ["compiled"] if compiled else []
            for chain, sampling in (("greedy", Sampling(temperature=0)), ("sampled", Sampling(temperature=0.8))):

                def decode(model: Any = model, request: Any = request, sampling: Any = sampling) -> float:
                    timing = Timing()
                    for _ in generate(model, [request], sampling, timing=timing, lookup=False):
                        pass
                    return timing.decode_seconds / timing.decoded_tokens

                what = " ".join(["decode", *words, chain])
                things[what], limit[what] = decode, weight_bytes(model.transformer) / machine.bytes_per_second
                loops[what] = model
            if not words:
                prompts = [[(id_ + row) % 1000 for id_ in some_ids(model, prompt)] for row in range(batch)]
                flops = batch * count_flops(model.config, prompt).prefill

                def prefill(model: Any = model, prompts: Any = prompts) -> float:
                    decoder = Decoder(model.transformer, model.stepping)
                    return timed(lambda: decoder.prefill(prompts, prompt), device)

                what = f"prefill {batch} x {prompt}"
                things[what], limit[what] = prefill, flops / machine.flops_per_second
        theirs = transformers_decode(folder, device, tokens)
        if theirs is not None:
            things["decode transformers greedy"] = theirs
        found: dict[str, Any] = {}
        told = {}
        for what, each in things.items():
            each()  # captures, compiles
            if what in loops:
                told[what] = loops[what].stepping.tell()
        measured = in_turn(things, options.rounds)
    for what, seconds in measured.items():
        found[what] = {"seconds": summary(seconds)}
        if what in limit:
            found[what]["limit_seconds"] = limit[what]
            found[what]["fraction_of_limit"] = limit[what] / summary(seconds)["median"]
        if what in told:
            found[what]["steps"] = told[what]
        if what.startswith("decode") and "decode transformers greedy" in measured:
            peer = summary(measured["decode transformers greedy"])["median"]
            found[what]["times_transformers"] = peer / summary(seconds)["median"]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def write_folder(preset: str, folder: Path, short: bool) -> Path:
    """A folder of random weights in bfloat16, made on the fly."""
    import torch

    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.spec.config import from_hf
    from gptcli.spec.presets import read_preset

    tiny = {"model_type": "gpt2", "vocab_size": 1001, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    save_folder(random_model(from_hf(tiny) if short else read_preset(preset), 0), folder, dtype=torch.bfloat16)
    return folder


def transformers_decode(folder: Path, device: Any, tokens: int) -> Callable[[], float] | None:
    """Seconds a token of ``generate`` of transformers; None where it is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: pip install transformers", file=sys.stderr)
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    ids = torch.arange(1, 33, device=device)[None]
    kept = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}

    def decode() -> float:
        return timed(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **kept), device) / tokens

    return decode


def timed(work: Callable[[], Any], device: Any) -> float:
    """Seconds until the device has done it."""
    from gptcli.core import runtime

    runtime.synchronize(device)
    start = time.perf_counter()
    work()
    runtime.synchronize(device)
    return time.perf_counter() - start


def line(found: dict[str, Any]) -> str:
    words = [f"{1e3 * found['seconds']['median']:9.3f} ms"]
    if "fraction_of_limit" in found:
        words.append(f"{100 * found['fraction_of_limit']:5.1f} % of the limit")
    if "times_transformers" in found:
        words.append(f"{found['times_transformers']:5.2f} x transformers")
    return "   ".join([*words, *([found["steps"]] if "steps" in found else [])])


if __name__ == "__main__":
    main()
