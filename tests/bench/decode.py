"""Tokens per second of batch-1 decoding, beside recomputing the whole text for each token (the slow twin).

    python tests/bench/decode.py [--preset gpt2] [--prompt 32] [--tokens 32] [--dtype float32] [--rounds 5]

``generate`` counts all that a command pays between two tokens: the step, the draw, the text, the event.
"""

from __future__ import annotations

import argparse
import sys
import time

from common import ROOT, in_turn, random_folder, report, summary

sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    from gptcli.core.build import open_model
    from gptcli.core.decode import Decoder
    from gptcli.core.generate import generate
    from gptcli.core.requests import Request, Timing
    from gptcli.core.settings import Sampling
    from gptcli.text.tokenizer import Tokenizer

    with random_folder(options.preset) as folder:
        tokenizer = Tokenizer.from_folder(ROOT / "weights" / "fable")
        model = open_model(folder, tokenizer, device="cpu", dtype=options.dtype)
        prompt = [i * 37 % 1000 for i in range(options.prompt)]

        def generated() -> float:
            timing = Timing()
            request = Request(prompt, seed=1, max_tokens=options.tokens, ignore_eos=True)
            for _ in generate(model, [request], Sampling(temperature=0.8), timing=timing, lookup=False):
                pass
            return timing.tokens_per_second

        def stepped() -> float:
            decoder = Decoder(model.transformer)
            token = decoder.prefill([prompt], len(prompt) + options.tokens).argmax(-1)
            start = time.perf_counter()
            for _ in range(options.tokens):
                token = decoder.step(token).argmax(-1)
            return options.tokens / (time.perf_counter() - start)

        @torch.inference_mode()
        def recomputed() -> float:
            ids = torch.tensor([prompt])
            start = time.perf_counter()
            count = max(1, options.tokens // 4)
            for _ in range(count):
                ids = torch.cat((ids, model.transformer(ids)[:, -1:].argmax(-1)), 1)
            return count / (time.perf_counter() - start)

        things = {"generate": generated, "steps alone": stepped, "no cache": recomputed}
        for measure in things.values():
            measure()
        measured = in_turn(things, options.rounds)
    base = summary(measured["no cache"])["median"]
    rows = {
        name: f"{summary(values)['median']:8.1f} tokens/s   {summary(values)['median'] / base:5.2f} x no cache"
        for name, values in measured.items()
    }
    title = f"decode {options.preset} {options.dtype}, prompt {options.prompt} + {options.tokens}"
    report(title, rows, {"tokens_per_second": {name: summary(values) for name, values in measured.items()}})


if __name__ == "__main__":
    main()
