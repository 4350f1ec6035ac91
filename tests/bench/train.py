"""Training speed in tokens per second, gptcli beside plain loops: same size, data and batch, in turn in one run.

    python tests/bench/train.py [--rounds 5] [--steps 3] [--peers "plain bf16" ...] [--gptcli FIELD=VALUE]

Each peer lives in a process of its own, so that neither memory nor compiled code mix; while one is measured, the others
are stopped (SIGSTOP) and burn nothing. A measurement wakes a peer, lets it take one step that nobody times, then times
``--steps`` steps, the device's last work included. Compiling and the first steps are warm-up, reported but not counted.

What is compared: whole optimizer steps (batch, forward, backward, clipping, update) from a random start, on tokens
drawn at random like words of a language (often few, seldom many). The plain loop and transformers share one loop and
AdamW; gptcli runs its own loop, with AdamW as they, and with its own default, Muon, whose update costs the same
whatever the batch: it is dear at few tokens a step, and pays by needing fewer (time_to_loss.py). ``ratio`` is AdamW
against AdamW: the best of gptcli's own, compiled or not, by the best of the others. transformers stands in the plain
loop, which is lighter than its Trainer.

By default the 17M model at 16 x 256 tokens on two CPU threads; on CUDA GPT-2 124M at 64 x 1024 tokens with the
vocabulary padded to 50,304 for all, as nanoGPT does. There each peer but gptcli, which finds its own, splits the batch
into the largest halves that fit in memory.

FLOPs a token: 6 for each matrix parameter (the head's included, the positions' not) and 6 LCT for causal attention,
which is half of what the PaLM convention counts. They are held against the best bf16 product measured in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import in_turn, report, summary

# name -> which loop, compiled or not, and the type it computes in
PEERS = {
    "plain fp32": ("plain", False, "float32"),
    "plain bf16": ("plain", False, "bfloat16"),
    "plain bf16 compiled": ("plain", True, "bfloat16"),
    "transformers bf16": ("transformers", False, "bfloat16"),
    "transformers bf16 compiled": ("transformers", True, "bfloat16"),
    "gptcli bf16": ("gptcli", False, "bfloat16"),
    "gptcli bf16 compiled": ("gptcli", True, "bfloat16"),
    "gptcli bf16 Muon": ("gptcli muon", False, "bfloat16"),
}
MATRIX = "bf16 matrix product"
SIZES = {
    "cpu": {"vocab": 8192, "context": 256, "layers": 8, "width": 384, "heads": 6, "rows": 16},
    "cuda": {"vocab": 50_304, "context": 1024, "layers": 12, "width": 768, "heads": 12, "rows": 64},
}
WARM_STEPS = 3


# --- a child: one peer, which trains as many steps as it is told ---


def child(name: str, options: argparse.Namespace) -> None:
    """Warm up, then answer each line ``K`` on stdin with what K steps took. Answers are JSON lines on stdout."""
    import torch

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not get between
    if options.device == "cpu":
        torch.set_num_threads(options.threads)

    def finish() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        one_step, facts = matrix_product(options) if name == MATRIX else trainer(name, options, Path(out))
        for _ in range(WARM_STEPS):
            one_step()
        finish()
        answers.write(json.dumps({"warm_seconds": time.perf_counter() - start, **facts}) + "\n")
        for line in sys.stdin:
            one_step()
            finish()
            start = time.perf_counter()
            for _ in range(int(line)):
                one_step()
            finish()
            answers.write(json.dumps({"seconds": time.perf_counter() - start}) + "\n")
            if options.device == "cuda":
                torch.cuda.empty_cache()  # the next peer needs the memory


def trainer(name: str, options: argparse.Namespace, out: Path) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What takes one step of a peer, and what there is to say about it."""
    import numpy as np
    import torch
    from gptcli_loop import gptcli_steps, parse_settings
    from plain_gpt import Recipe, Size, make_model, train_steps

    kind, compiled, dtype_name = PEERS[name]
    dtype = getattr(torch, dtype_name)
    size = Size(options.vocab, options.context, options.layers, options.width, options.heads)
    spread = np.random.default_rng(0).random(max(1 << 20, 4 * options.rows * options.context))
    tokens = (size.vocab_size**spread - 1).astype(np.uint16)  # the k-th word's share is about 1/k
    if kind.startswith("gptcli"):
        optimizer = "muon" if kind == "gptcli muon" else "adamw"
        model, events = gptcli_steps(
            size,
            tokens,
            rows=options.rows,
            steps=10**9,
            out=out,
            dtype=dtype,
            compile=compiled,
            device=options.device,
            settings={"optimizer": optimizer, **parse_settings(options.gptcli)},
        )
        return partial(next, events), {"parameters": count(model)}

    make = make_model if kind == "plain" else make_transformers
    micro = options.micro or options.rows
    while True:
        model = make(size, device=options.device)
        recipe = Recipe(steps=10**9, rows=options.rows, micro_rows=micro, dtype=dtype, compile=compiled)
        steps = train_steps(model, tokens, recipe)
        try:
            for _ in range(2):
                next(steps).item()
            return partial(next, steps), {"parameters": count(model), "micro_rows": micro}
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        del model, steps
        micro = -(-micro // 2)
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def make_transformers(size: Any, *, device: str) -> Any:
    """transformers' GPT-2 of the same size behind the plain loop's signature: ``model(ids, targets)`` is the loss."""
    import torch
    import torch.nn.functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = GPT2Config(
                vocab_size=size.vocab_size,
                n_positions=size.context,
                n_embd=size.width,
                n_layer=size.layers,
                n_head=size.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
                use_cache=False,
                attn_implementation="sdpa",
            )
            self.size, self.model = size, GPT2LMHeadModel(config)

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.model(input_ids=ids).logits.flatten(0, 1), targets.flatten())

    return Wrapped().to(device)


def matrix_product(options: argparse.Namespace) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The machine's bf16 rate: the faster of a large square product and the model's own MLP product."""
    import torch

    side, flops = (8192, 1e14) if options.device == "cuda" else (2048, 2e11)  # enough for a clock
    shapes = [(side, side, side), (options.rows * options.context, options.width, 4 * options.width)]
    rated = []
    for m, k, n in shapes:
        a = torch.randn(m, k, device=options.device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=options.device, dtype=torch.bfloat16)
        repeats = max(1, round(flops / (2 * m * k * n)))

        def multiply(a: Any = a, b: Any = b, repeats: int = repeats) -> None:
            for _ in range(repeats):
                torch.nn.functional.linear(a, b)
            if options.device == "cuda":
                torch.cuda.synchronize()

        multiply()
        start = time.perf_counter()
        multiply()
        done = repeats * 2 * m * k * n
        rated.append((done / (time.perf_counter() - start), done, multiply, (m, k, n)))
    _, done, best, shape = max(rated, key=lambda one: one[0])
    return best, {"flops": done, "shape": shape}


# --- the parent, which measures them in turn and never loads torch ---


class Peer:
    """A child process that only runs while it is asked something."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        threads = {"OMP_NUM_THREADS": str(options.threads)} if options.device == "cpu" else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads}
        )
        self.facts: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Wait until it is ready. Raises EOFError if it died."""
        self.facts = self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def seconds(self, steps: int) -> float:
        """What so many steps take."""
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds: float = self._answer()["seconds"]
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the process ended")
        return json.loads(line)


@contextmanager
def running(name: str, options: argparse.Namespace) -> Iterator[Peer]:
    """A peer that is gone afterwards, stopped or not."""
    peer = Peer(name, options)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.wait()


def main() -> None:
    options = parse()
    if options.child:
        return child(options.child, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped child outlives this
    batch = options.rows * options.context
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        for name in [MATRIX, *options.peers]:
            print(f"warming up: {name}", file=sys.stderr)
            peer = stack.enter_context(running(name, options))
            try:
                peer.warm_up()
                peers[name] = peer
            except EOFError:
                print(f"  {name} failed and is left out", file=sys.stderr)
        things: dict[str, Callable[[], float]] = {}
        for name, peer in peers.items():
            work, steps = (peer.facts["flops"], 1) if name == MATRIX else (batch * options.steps, options.steps)
            things[name] = lambda peer=peer, work=work, steps=steps: work / peer.seconds(steps)
        rates = {name: summary(values) for name, values in in_turn(things, options.rounds).items()}
    show(options, rates, {name: peer.facts for name, peer in peers.items()})


def show(options: argparse.Namespace, rates: dict[str, dict[str, float]], facts: dict[str, dict[str, Any]]) -> None:
    matrices = 12 * options.layers * options.width**2 + options.vocab * options.width
    flops = 6 * (matrices + options.layers * options.width * options.context)
    machine = rates.pop(MATRIX)
    medians = {name: rate["median"] for name, rate in rates.items()}
    peers = {name: median for name, median in medians.items() if not name.startswith("gptcli")}
    ours = {name: median for name, median in medians.items() if name.startswith("gptcli") and "Muon" not in name}
    best = max(peers, key=lambda name: peers[name], default=None)
    in_tera = {name: value / 1e12 for name, value in machine.items()}
    rows = {MATRIX: "{median:9.3f} TFLOP/s  ({least:.3f}-{most:.3f})".format(**in_tera)}
    for name, rate in rates.items():
        rows[name] = (
            f"{rate['median']:9,.0f} tokens/s  ({rate['least']:,.0f}-{rate['most']:,.0f})"
            f"  {rate['median'] * flops / machine['median']:4.0%} of that rate"
            + (f"  {rate['median'] / peers[best]:5.2f} x {best}" if best else "")
            + f"   warm-up {facts[name]['warm_seconds']:.0f} s"
        )
    ratio = max(ours.values()) / peers[best] if ours and best else None
    if ratio is not None:
        rows["gptcli / best peer"] = f"{ratio:9.2f}"
    shape = f"{options.layers} layers, width {options.width}, vocabulary {options.vocab:,}"
    title = f"train {shape}, {options.rows} x {options.context} tokens, {options.device}"
    # A peer that failed is no slow peer: the ratio is then against the rest only, and says so.
    failed = [name for name in options.peers if name not in rates]
    if failed:
        rows["failed, not compared"] = ", ".join(failed)
    result = {
        "tokens_per_second": rates,
        "matrix_flops_per_second": machine,
        "flops_per_token": flops,
        "fraction_of_matrix_rate": {name: median * flops / machine["median"] for name, median in medians.items()},
        "facts": facts,
        "best_peer": best,
        "failed": failed,
        "ratio": ratio,
        "options": {name: value for name, value in vars(options).items() if name != "child"},
    }
    report(title, rows, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int, help=f"default {SIZES['cpu'][name]}, on CUDA {SIZES['cuda'][name]}")
    parser.add_argument("--micro", type=int, help="rows a forward pass of the peers; default: the most that fit")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--gptcli", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of gptcli's Plan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in SIZES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
