"""The decoder: fill the cache with prompts, then step a token at a time; on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.core.stepping import StepFunction, Stepping


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
        ids = torch.tensor(padded(rows), device=self._weight.device)
        capacity, device = max(capacity, longest), self._weight.device
        forward, dtype = self.stepping.prefill(prompt=longest, tokens=capacity - longest, rows=len(prompts))
        self.cache = KVCache(self.transformer.config, len(rows), capacity, device=device, dtype=dtype)
        self._step = None
        logits = forward(ids, self.cache, last=torch.tensor(lengths, device=device) - 1)
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
        if self._step is None:
            # What the cache has room for is what will be asked for.
            room = self.cache.capacity - max(self.cache.lengths)
            self._step = self.stepping.step(tokens=room, rows=len(self.cache.lengths))
        if max(self.cache.lengths) >= self.cache.capacity:
            self.cache.grow(2 * self.cache.capacity)
        return self._step(tokens, self.cache)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
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


def padded(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of ids, each filled up with zeros to the longest: on the right no real query ever sees them."""
    longest = max(map(len, rows))
    return [[*row, *[0] * (longest - len(row))] for row in rows]
