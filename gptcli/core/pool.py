"""Rows that are decoded together, and come and go one by one: what a server does, where ``Decoder`` runs one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.core.cache import KVCache
from gptcli.core.decode import chunk_size, in_chunks
from gptcli.core.draw import Draw
from gptcli.core.generate import report
from gptcli.core.model import Transformer
from gptcli.core.prefixes import LEAST, Prefixes, shared_length
from gptcli.core.requests import Choice
from gptcli.core.sampling import History
from gptcli.core.settings import Sampling
from gptcli.core.stepping import SHORT, Stepping

# A process that lives long takes this many steps and more: whatever makes them fast is worth preparing.
_MANY = 1 << 20
# Room for tokens that a cache is made with, and by multiples of which it grows.
_ROOM = 128
# Tokens of several prompts that are read at once: no token waits for many others' prompts.
_TOGETHER = 256
# Places that they may take beside each other for the moment, each as many as the longest has tokens, known or not.
_SIDE_BY_SIDE = 4096


class Pool:
    """One transformer and the rows in it; rows are numbered from 0, in no lasting order (see ``leave``).

    Args:
        transformer, stepping: as of ``Decoder``.
        prefixes: where prompts are looked up and remembered; None computes each whole.
    """

    def __init__(self, transformer: Transformer, stepping: Stepping, prefixes: Prefixes | None = None) -> None:
        self.transformer = transformer
        self.stepping = stepping
        self.prefixes = prefixes
        self._device = transformer.embedding.weight.device
        self._cache: KVCache | None = None

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self._cache.lengths) if self._cache else 0

    @property
    def bytes(self) -> int:
        """Of the rows' keys and values, with room for more."""
        return self._cache.bytes if self._cache else 0

    def enter(self, ids: Sequence[int]) -> tuple[Tensor, int]:
        """A new row, behind the others, that begins with ``ids`` (at least one).

        Returns the logits ``[V]`` of the next token, and how many of the ids were known and not computed.
        """
        return self.enter_first([ids])[0]

    @torch.inference_mode()
    def enter_first(self, prompts: Sequence[Sequence[int]]) -> list[tuple[Tensor, int]]:
        """New rows, behind the others, for the first of some prompts, and those behind it that are best read with it.

        Returns for each of these what ``enter`` does. What is read together is to the bit what it is alone.
        """
        together = self._together(prompts)
        longest = max(map(len, together))
        forward, dtype = self.stepping.prefill(prompt=longest, tokens=_MANY, rows=self.rows + len(together))
        found = [self.prefixes.find(ids, len(ids)) if self.prefixes else (None, None) for ids in together]
        cache = self._side_by_side([known for known, _ in found], longest, dtype)
        lengths = cache.lengths
        if (known := found[0][1]) is not None:
            logits = known[None]
        else:
            rows = [ids[length:] for ids, length in zip(together, lengths, strict=True)]
            logits = in_chunks(forward, rows, cache, chunk_size(1, self._device, self.transformer.config.rope_scaling))
            cache.set_lengths(list(map(len, together)))
            for row, ids in enumerate(together):
                # Damage is not to spread to other prompts.
                if self.prefixes and bool(torch.isfinite(logits[row]).all()):
                    self.prefixes.keep(ids, cache, row, logits[row])
        if self._cache is None:
            room = min(-(-(longest + 1) // _ROOM) * _ROOM, self.transformer.config.context)
            self._cache = self.transformer.new_cache(0, max(room, longest), dtype)
        self._cache.join(cache)
        return list(zip(logits, lengths, strict=True))

    def _side_by_side(self, caches: Sequence[KVCache | None], capacity: int, dtype: torch.dtype) -> KVCache:
        """A cache of the rows of several, where None is an empty row."""
        first = caches[0]
        if first is not None and len(caches) == 1:
            return first
        beside = self.transformer.new_cache(len(caches), capacity, dtype)
        if any(caches):
            beside.set_lengths([])
            for cache in caches:
                beside.join(cache or self.transformer.new_cache(1, 1, dtype))
        return beside

    def _together(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """The first of some prompts, and those behind it of which only so much is new that they are read at once.

        None of them can learn from another one here, whose beginning is the same: it would be computed twice.
        """
        if not self.stepping.together or len(prompts) == 1:
            return prompts[:1]
        knows = self.prefixes.known if self.prefixes else lambda ids: 0
        count = tokens = longest = 0
        for ids in prompts:
            known, longest = knows(ids), max(longest, len(ids))
            tokens += len(ids) - known
            few = known < len(ids) <= known + SHORT and tokens <= _TOGETHER and longest * (count + 1) <= _SIDE_BY_SIDE
            learns = min(known + LEAST, len(ids))
            if not few or any(shared_length(ids, other) >= learns for other in prompts[:count]):
                break
            count += 1
        return prompts[: max(1, count)]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each row; the logits ``[B, V]`` of the next."""
        if self._cache is None:
            raise ValueError("there are no rows")
        longest = max(self._cache.lengths) + 1
        if longest > self._cache.capacity:
            doubled = min(2 * self._cache.capacity, self.transformer.config.context)
            self._cache.grow(max(longest, doubled))
        step = self.stepping.step(tokens=_MANY, rows=self.rows)
        return step(torch.tensor(tokens, device=self._device), self._cache)

    @torch.inference_mode()
    def leave(self, row: int, ids: Sequence[int] = ()) -> None:
        """Take a row out; the last one gets its number. ``ids``, which it holds, are remembered for later prompts."""
        if self._cache is None:
            raise ValueError("there are no rows")
        held = min(len(ids), self._cache.lengths[row])
        if self.prefixes and held:
            self.prefixes.keep(ids[:held], self._cache, row)
        self._cache.leave(row)
        if not self._cache.lengths:
            self._cache = None  # one long row is not to be paid for by all that come

    def clear(self) -> None:
        """Take all rows out."""
        self._cache = None


class Asked(NamedTuple):
    """How the next token of a row is drawn, and what is to be told of it (see ``report``)."""

    draw: Draw
    seed: int
    position: int
    logprobs: int | None = None
    history: History | None = None


@torch.inference_mode()
def draw_each(logits: Tensor, asked: Sequence[Asked]) -> list[tuple[int, Choice | None, tuple[Choice, ...]]]:
    """A token for each row of logits ``[B, V]``, and what ``report`` tells of it; rows that are alike go together."""
    found: list[tuple[int, Choice | None, tuple[Choice, ...]]] = [(0, None, ())] * len(asked)
    for places in _alike(asked):
        first = asked[places[0]]
        rows = logits if len(places) == len(asked) else logits[torch.tensor(places, device=logits.device)]
        seeds, positions = [asked[place].seed for place in places], [asked[place].position for place in places]
        drawn = first.draw(rows, seeds, positions, first.history)
        if first.history is not None:
            first.history.add(drawn)
        reports = None if first.logprobs is None else report(rows, drawn, first.logprobs)
        for number, (place, token) in enumerate(zip(places, drawn.tolist(), strict=True)):
            found[place] = (token, *reports[number]) if reports else (token, None, ())
    return found


def _alike(asked: Sequence[Asked]) -> list[list[int]]:
    """Rows whose tokens may be drawn together, since their sampling is the same and looks at nothing else."""
    groups: list[tuple[tuple[Sampling, int | None], list[int]]] = []
    alone: list[list[int]] = []
    for place, each in enumerate(asked):
        how = (each.draw.sampling, each.logprobs)
        if each.history is not None:
            alone.append([place])
        elif group := next((places for known, places in groups if known == how), None):
            group.append(place)
        else:
            groups.append((how, [place]))
    return [*(places for _, places in groups), *alone]
