"""Keys and values of texts that were read before: a prompt that begins like one of them is not computed from its start.

What a chat sends again with every turn, a prompt line with every key, a batch with every line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gptcli.core.cache import KVCache

# Common tokens from which copying beats computing them.
LEAST = 8


@dataclass
class _Kept:
    """One text: its ids, their keys and values, and, where they are known, the logits ``[V]`` of the token after it."""

    ids: tuple[int, ...]
    cache: KVCache
    logits: Tensor | None
    bytes: int = field(init=False)  # counted once: of many texts the tensors are many

    def __post_init__(self) -> None:
        self.bytes = self.cache.bytes + (0 if self.logits is None else self.logits.nbytes)


class Prefixes:
    """The texts read last, as many as some memory holds; the one that was not used for longest goes first.

    Attributes:
        hits: prompts that began like one of them; ``tokens`` not computed because of that.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: list[_Kept] = []  # the one used last is last
        self.hits = 0
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """What is held."""
        return sum(kept.bytes for kept in self._kept)

    def known(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` would be found, at their beginning."""
        return self._longest(tuple(ids))[1]

    def find(self, ids: Sequence[int], capacity: int) -> tuple[KVCache | None, Tensor | None]:
        """A new cache of one row that holds the longest known beginning of ``ids``; None where none is worth it.

        If all of them are known, so may be the logits ``[V]`` of the next token. Else at least one token is left to be
        computed. ``capacity`` is the room the cache should have, in tokens.
        """
        best, common = self._longest(tuple(ids))
        if best is None:
            return None, None
        self._kept.remove(best)
        self._kept.append(best)
        self.hits += 1
        self.tokens += common
        return best.cache.copy(0, common, max(capacity, common)), best.logits if common == len(ids) else None

    def _longest(self, wanted: tuple[int, ...]) -> tuple[_Kept | None, int]:
        """The text that has the longest beginning in common, and its length; None and 0 where it is not worth it."""
        best, common = None, 0
        start = wanted[:LEAST]
        for kept in self._kept:
            if kept.ids[: len(start)] != start:
                continue  # of many texts most are none
            if kept.ids == wanted and kept.logits is not None:
                return kept, len(wanted)
            shared = min(shared_length(kept.ids, wanted), len(wanted) - 1)
            if shared > common:
                best, common = kept, shared
        return (best, common) if common >= min(LEAST, len(wanted)) else (None, 0)

    def keep(self, ids: Sequence[int], cache: KVCache, row: int, logits: Tensor | None = None) -> None:
        """Remember a row of a cache that holds ``ids`` (copied), perhaps with the logits ``[V]`` of the next token.

        It stands in for every remembered text that it begins with, unless that one knows its own next token.
        """
        known, length = tuple(ids), len(ids)
        if any(kept.ids[:length] == known and (logits is None or kept.ids == known) for kept in self._kept):
            return
        new = _Kept(known, cache.copy(row, length, length), None if logits is None else logits.clone())
        if new.bytes > self._most:
            return
        self._kept = [kept for kept in self._kept if not _replaces(new, kept)]
        self._kept.append(new)
        while self.bytes > self._most:
            self._kept.pop(0)


def _replaces(new: _Kept, old: _Kept) -> bool:
    if new.ids[: len(old.ids)] != old.ids:
        return False
    return old.logits is None or new.ids == old.ids


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many elements two sequences have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # slices compare faster than elements do
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
