"""The decoder: fill the cache with prompts, then step a token at a time; on any device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptcli.core.cache import KVCache
from gptcli.core.graphs import DeviceLoop
from gptcli.core.model import Transformer
from gptcli.core.sampling import History
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Forward, StepFunction, Stepping
from gptcli.spec.config import RopeScaling

# Tokens of a prompt that go through the model at once, by device, and those of all rows together: what lies between its
# layers needs memory for so many, however long the prompts. On a CPU 512 to 2,048 take the same time in float32, and
# 2,048 is what attention in bfloat16 likes best; a GPU wants more to be busy.
_CHUNK = {"cuda": (8192, 16384)}
_CPU_CHUNK = 2048, 8192
_LEAST_CHUNK = 512


class Decoder:
    """Runs one transformer over a batch of rows that grow together.

    ``stepping`` knows faster ways than the transformer's own to take steps; without it there are none.
    """

    def __init__(self, transformer: Transformer, stepping: Stepping | None = None) -> None:
        self.transformer = transformer
        self.stepping = stepping or Stepping(transformer)
        self._weight = transformer.embedding.weight
        self._step: StepFunction | None = None  # chosen when the first is taken
        self.cache: KVCache | None = None
        self.loop: DeviceLoop | None = None  # which has the cache of its own, where ``draw_on_device`` was worth it

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, a row."""
        return self.cache.lengths if self.cache else []

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """Start anew with these prompts (none empty), with room for ``capacity`` tokens a row.

        Returns the logits ``[B, V]`` of the token after each. Prompts that are all the same are computed once.
        """
        same = all(prompt == prompts[0] for prompt in prompts)
        rows = prompts[:1] if same else prompts
        lengths = [len(row) for row in rows]
        longest = max(lengths)
        capacity, device = max(capacity, longest), self._weight.device
        forward, dtype = self.stepping.prefill(prompt=longest, tokens=capacity - longest, rows=len(prompts))
        self.cache = self.transformer.new_cache(len(rows), capacity, dtype)
        self._step = None
        size = chunk_size(len(rows), device, self.transformer.config.rope_scaling)
        logits = in_chunks(forward, rows, self.cache, size)
        self.cache.set_lengths(lengths)
        if same and len(prompts) > 1:
            self.cache.select([0] * len(prompts))
            logits = logits.expand(len(prompts), -1)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Add one token ``[B]`` to each row, in a larger cache if need be; the logits ``[B, V]`` of the next."""
        if self.cache is None:
            raise ValueError("a step comes after a prefill")
        step = self.prepare()
        if max(self.cache.lengths) >= self.cache.capacity:
            self.cache.grow(2 * self.cache.capacity)
        return step(tokens, self.cache)

    def prepare(self) -> StepFunction:
        """Choose how steps are taken, and pack what they need, before the first is."""
        if self.cache is None:
            raise ValueError("a step comes after a prefill")
        if self._step is None:
            # What the cache has room for is what will be asked for.
            room = self.cache.capacity - max(self.cache.lengths)
            self._step = self.stepping.step(tokens=room, rows=len(self.cache.lengths))
        return self._step

    def draw_on_device(
        self,
        logits: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        positions: Sequence[int],
        history: History | None,
        *,
        ahead: bool,
    ) -> DeviceLoop | None:
        """Where that pays, a loop that draws after these logits of a prefill and goes on by itself; else None.

        Arguments as of ``DeviceLoop.start``. The cache is then the loop's, and ``step`` is not for it.
        """
        if self.cache is None:
            raise ValueError("drawing comes after a prefill")
        capacity, rows = self.cache.capacity, len(seeds)
        tokens = capacity - max(self.cache.lengths)
        self.loop = self.stepping.device_loop(self, sampling, rows=rows, tokens=tokens, capacity=capacity)
        if self.loop is not None:
            self.loop.start(self.cache, logits, seeds, positions, history, ahead=ahead)
            self.cache = None
        return self.loop

    @torch.inference_mode()
    def prefill_again(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """``prefill`` for the rows that are left, which go on drawing as they did."""
        logits = self.prefill(prompts, capacity)
        if self.loop is not None and self.cache is not None:
            self.loop.refill(self.cache, logits)
            self.cache = None
        return logits

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        if self.loop is not None:
            self.loop.select(rows)
        if self.cache is not None:
            self.cache.select(rows)
        self._step = None

    def several(self) -> tuple[Callable[[Sequence[int]], Tensor], bool]:
        """How to add several tokens at once to the one row: ids to the logits ``[T, V]`` of the next after each.

        And whether they are to the bit those of steps one by one. The cache has to have the room.
        """
        cache = self.cache
        if cache is None:
            raise ValueError("a step comes after a prefill")
        forward, exact = self.stepping.several(tokens=cache.capacity - cache.lengths[0])
        return (lambda ids: forward(ids, cache)), exact


def chunk_size(rows: int, device: torch.device, scaling: RopeScaling | None = None) -> int:
    """Tokens of each of so many prompts that go through the model at once."""
    if scaling is not None and scaling.kind == "dynamic":  # all of a prompt is to be turned alike
        return sys.maxsize
    most, together = _CHUNK.get(device.type, _CPU_CHUNK)
    return min(most, max(_LEAST_CHUNK, together // rows))


def in_chunks(forward: Forward, rows: Sequence[Sequence[int]], cache: KVCache, size: int) -> Tensor:
    """Add prompts to a cache, ``size`` tokens of each at a time; the logits ``[B, V]`` after each."""
    device = cache.keys[0].device
    ids = torch.tensor(padded(rows), device=device)
    last = torch.tensor([len(row) - 1 for row in rows], device=device)
    logits: Tensor | None = None
    for start in range(0, ids.shape[1], size):
        part = ids[:, start : start + size]
        found = forward(part, cache, last=(last - start).clamp(0, part.shape[1] - 1))
        # A shorter prompt ended in an earlier chunk; where one has not ended yet, what was found is replaced.
        logits = found if logits is None else torch.where((last >= start)[:, None], found, logits)
    assert logits is not None
    return logits


def padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of ids, each filled up with zeros to the longest: on the right no real query ever sees them."""
    longest = max(map(len, rows))
    return [[*row, *[0] * (longest - len(row))] for row in rows]
