"""How fast a model loads, prefills, decodes and is fed text on this machine, and what the machine would allow.

Each measurement warms up once, then does the same work several times; what it gives is numbers, nobody is told. The
limit of a figure is the longer of two times: to move the bytes that have to be moved at the measured bandwidth, and to
compute the operations that have to be computed at the measured rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.core import runtime
from gptcli.core.build import Model, open_model
from gptcli.core.decode import Decoder
from gptcli.core.generate import generate
from gptcli.core.requests import Request, Timing
from gptcli.core.settings import Sampling
from gptcli.core.stepping import held_bytes
from gptcli.spec.flops import count_flops
from gptcli.spec.index import read_folder
from gptcli.text.bulk import cores
from gptcli.text.tokenizer import Tokenizer

# A figure whose rounds take longer than this together stops before it has all of them.
PATIENCE_SECONDS = 60.0
# Text that the tokenizer is fed, a round; and what one core alone is fed.
TEXT_BYTES, ALONE_BYTES = 8_000_000, 2_000_000
_PARAGRAPH = (
    'The lamp had gone out again, and nobody in the house remembered where the oil was kept. "It doesn\'t matter," '
    'said the old woman; "we\'ll talk in the dark, as people did before there were 1,000 lamps in every street." So '
    "they talked: about the winter of 1887, about ships that weren't built any more, about a cousin who'd walked from "
    "the coast to the mountains with nothing but a knife and half a loaf. Outside, the rain was turning into snow.\n\n"
)


@dataclass(frozen=True)
class Machine:
    """What the device does at its best.

    Attributes:
        bytes_per_second: reading from memory, as matrices are read.
        flops_per_second: square matrix products in ``flops_dtype``.
    """

    bytes_per_second: float
    flops_per_second: float
    flops_dtype: str

    def better_of(self, other: Machine) -> Machine:
        """The best of two measurements: what slows one of them down is no limit of the machine."""
        return Machine(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
            self.flops_dtype,
        )


@dataclass(frozen=True)
class Figure:
    """One thing measured.

    Attributes:
        part: load, prefill, decode, train or tokenize.
        settings: what it was measured with, under the names that it has in JSON.
        seconds: of each round.
        tokens: that a round makes, reads or learns from; None where that says nothing.
        data_bytes: of the files or the text that a round reads.
        moved_bytes: that a round has to read from memory at the least: weights, and the cache.
        flops: that a round has to compute at the least.
        compared_seconds: of something else that was measured beside it, which is then its limit; ``compared`` names it.
    """

    part: str
    settings: dict[str, int]
    seconds: tuple[float, ...]
    tokens: int | None = None
    data_bytes: int | None = None
    moved_bytes: float = 0.0
    flops: float = 0.0
    compared_seconds: float | None = None
    compared: str = ""

    def summary(self) -> tuple[float, float, float]:
        """Seconds of a round: the median, the least, the most."""
        return statistics.median(self.seconds), min(self.seconds), max(self.seconds)

    def limit(self, machine: Machine) -> tuple[float, str]:
        """Seconds that a round would take at the least, and what sets that limit."""
        if self.compared_seconds is not None:
            return self.compared_seconds, self.compared
        moved = self.moved_bytes / machine.bytes_per_second
        computed = self.flops / machine.flops_per_second
        return (moved, "memory") if moved >= computed else (computed, "arithmetic")


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The device's memory bandwidth, and its rate of matrix products in ``dtype``."""
    return Machine(measured_bandwidth(device), runtime.measured_flops(device, dtype), runtime.DTYPE_NAMES[dtype])


@torch.inference_mode()
def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read of matrices too large for any cache: the best of a few tries and ways."""
    one, other = (torch.ones(1 << (25 if device.type == "cpu" else 28), device=device) for _ in range(2))
    ways: list[tuple[Callable[[], object], int]] = [(lambda: one.dot(other), 2), (lambda: one.sum(), 1)]
    if device.type != "cpu":
        ways.append((lambda: other.copy_(one), 2))  # read and written
    return max(times * one.nbytes / _timed(way, device) for way, times in ways for _ in range(6))


def measure_load(folder: Path, model: Model, rounds: int) -> Figure:
    """Opening a folder that is in the page cache, and touching every page of the weights; beside reading its bytes."""
    files = sorted({info.file for info in read_folder(folder).values()})
    size = sum(file.stat().st_size for file in files)

    def load() -> None:
        asked: dict[str, Any] = {"device": str(model.device), "dtype": model.dtype_name, "quantize": model.quantize}
        opened = open_model(folder, model.tokenizer, name=model.name, native=model.native, compile=False, **asked)
        _touch(opened.transformer)
        runtime.synchronize(model.device)

    def read() -> None:
        buffer = bytearray(1 << 24)
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    seconds = _rounds(load, rounds, torch.device("cpu"))
    reading = _rounds(read, min(3, rounds), torch.device("cpu"))
    return Figure("load", {}, seconds, data_bytes=size, compared_seconds=min(reading), compared="reading the files")


def measure_prefill(model: Model, prompt: int, rounds: int) -> Figure:
    """A prompt of so many tokens, up to the logits of the token after it."""
    ids = some_ids(model, prompt)
    decoder = Decoder(model.transformer, model.stepping)
    seconds = _rounds(lambda: decoder.prefill([ids], prompt), rounds, model.device)
    flops = count_flops(model.config, prompt).prefill
    settings = {"batch": 1, "prompt_tokens": prompt}
    return Figure("prefill", settings, seconds, prompt, moved_bytes=weight_bytes(model.transformer), flops=flops)


def measure_decode(model: Model, batch: int, prompt: int, tokens: int, rounds: int) -> Figure:
    """``tokens`` (2 or more) greedy ones for each of ``batch`` rows, with all that ``generate`` does between two.

    A round is the steps behind the first token, which the prompt gives.
    """
    ids = some_ids(model, prompt)
    requests = [Request(ids, seed=row, max_tokens=tokens, ignore_eos=True) for row in range(batch)]
    steps = tokens - 1

    def decode() -> float:
        timing = Timing()
        for _ in generate(model, requests, Sampling(temperature=0), timing=timing, lookup=False):
            pass
        return timing.decode_seconds

    seconds = repeated(decode, rounds)
    seen = prompt + (steps + 1) / 2  # by a step, on average
    flops = count_flops(model.config, prompt)
    config = model.config
    cache = 2 * config.layers * config.kv_heads * config.head_dim * model.dtype.itemsize  # bytes a token
    return Figure(
        "decode",
        {"batch": batch, "prompt_tokens": prompt, "new_tokens": tokens},
        seconds,
        tokens=batch * steps,
        moved_bytes=steps * (weight_bytes(model.transformer) + batch * seen * cache),
        flops=steps * batch * (flops.matrices + flops.attention(seen)),
    )


def measure_tokenize(tokenizer: Tokenizer, rounds: int) -> Figure:
    """English on all cores; beside one core alone, whose rate times the cores is the limit."""
    text = _PARAGRAPH * (TEXT_BYTES // len(_PARAGRAPH))
    alone = _PARAGRAPH * (ALONE_BYTES // len(_PARAGRAPH))
    chunks = [text[start : start + (1 << 20)] for start in range(0, len(text), 1 << 20)]
    count = 0

    def encode() -> None:
        nonlocal count
        count = sum(len(ids) for ids, _ in tokenizer.encode_streams([chunks]))

    cpu = torch.device("cpu")
    seconds = _rounds(encode, rounds, cpu)
    single = min(_rounds(lambda: tokenizer.encode_array(alone), min(3, rounds), cpu))
    number = cores()
    least = single * len(text) / len(alone) / number
    settings = {"threads": number}
    return Figure(
        "tokenize", settings, seconds, count, data_bytes=len(text), compared_seconds=least, compared="each core alone"
    )


def some_ids(model: Model, count: int) -> list[int]:
    """Ids that the model has, the same ones every time."""
    return [1 + place * 7919 % (model.config.vocab_size - 1) for place in range(count)]


def weight_bytes(transformer: nn.Module) -> int:
    """The bytes of weights that a step reads: all but the tables that are only looked up, whatever they are held in."""
    return held_bytes(*(getattr(transformer, name) for name in ("blocks", "norm", "unembedding")))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _touch(transformer: nn.Module) -> None:
    """Read a byte of each page of the weights."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in _tensors(transformer)}
    for storage in storages.values():
        pages = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
        pages[::4096].sum()


def _rounds(work: Callable[[], object], rounds: int, device: torch.device) -> tuple[float, ...]:
    """Seconds of each round of a work, after one that is not counted."""
    return repeated(lambda: _timed(work, device), rounds)


def repeated(measure: Callable[[], float], rounds: int) -> tuple[float, ...]:
    """What ``measure`` gives, so many times, after once for nothing; fewer where it takes too long, but one."""
    start = time.perf_counter()
    measure()
    found: list[float] = []
    while len(found) < rounds and (not found or time.perf_counter() - start < PATIENCE_SECONDS):
        found.append(measure())
    return tuple(found)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    runtime.synchronize(device)
    start = time.perf_counter()
    work()
    runtime.synchronize(device)
    return time.perf_counter() - start
