"""A vocabulary by its bytes: which tokens begin with a text, and which a text begins with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property

from gptcli.text.ends import Kind, kind_of


class Spelling:
    """Tokens sorted by their bytes. Building takes a sort, a look-up a few comparisons."""

    def __init__(self, tokens: Mapping[bytes, int]) -> None:
        """Of the ids by bytes, none of them empty."""
        self.data: Sequence[bytes] = sorted(tokens)
        self.ids: Sequence[int] = [tokens[data] for data in self.data]
        self.longest = max(map(len, self.data), default=0)

    @cached_property
    def kinds(self) -> bytes:
        """The ``Kind`` of each token by its id, up to the largest; NOTHING for an id that is not here."""
        kinds = bytearray([Kind.NOTHING]) * (1 + max(self.ids, default=-1))
        for data, id_ in zip(self.data, self.ids, strict=True):
            kinds[id_] = kind_of(data)
        return bytes(kinds)

    def extending(self, start: bytes) -> Sequence[int]:
        """The ids of the tokens that begin with ``start``, it alone included."""
        low, high = self._range(start)
        return self.ids[low:high]

    def within(self, data: bytes) -> list[int]:
        """The ids of the tokens that ``data`` begins with, but those that are all of it."""
        found: list[int] = []
        for end in range(1, min(len(data), self.longest + 1)):
            place = bisect_left(self.data, data[:end])
            if place < len(self.data) and self.data[place] == data[:end]:
                found.append(self.ids[place])
        return found

    def can_grow(self, data: bytes) -> bool:
        """Whether a token begins with ``data`` and is longer."""
        low = bisect_right(self.data, data)
        return low < len(self.data) and self.data[low].startswith(data)

    def _range(self, start: bytes) -> tuple[int, int]:
        low = bisect_left(self.data, start)
        # The next text of this length, if there is one, is the first that no longer begins with it.
        stem = start.rstrip(b"\xff")
        high = bisect_left(self.data, stem[:-1] + bytes([stem[-1] + 1]), low) if stem else len(self.data)
        return low, high
