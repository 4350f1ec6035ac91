"""A stream of tokens that lies in several arrays, most of them mapped from files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gptcli.errors import CorruptError

# A file below this size is read, not mapped: the number of maps that a process may hold is limited.
_MAPPED = 1 << 16


class Tokens(Protocol):
    """A stream of tokens: a length, and slices that are arrays. A NumPy array is one, and so is ShardedTokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> npt.NDArray[Any]: ...


class ShardedTokens:
    """Arrays ``[N_i]`` of one type as one stream ``[N]``; the same array may stand in it several times.

    A slice within one array is a view of it; across several it is a copy.
    """

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self.parts = [part for part in parts if len(part)] or list(parts[:1])
        if len({part.dtype for part in self.parts}) != 1:
            raise ValueError("a stream needs arrays of one type")
        self._starts = [0, *accumulate(map(len, self.parts))]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the tokens."""
        return self.parts[0].dtype

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        first, last, step = part.indices(len(self))
        if step != 1:
            raise ValueError("a stream is sliced without a step")
        pieces = self._pieces(first, last)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def between(self, first: int, last: int) -> ShardedTokens:
        """The stream of the tokens from ``first`` to before ``last``, without a copy."""
        first, last, _ = slice(first, last).indices(len(self))
        return ShardedTokens(self._pieces(first, last))

    def _pieces(self, first: int, last: int) -> list[npt.NDArray[Any]]:
        if last <= first:
            return [self.parts[0][:0]]
        pieces = []
        number = bisect_right(self._starts, first) - 1
        while first < last:
            start, end = self._starts[number], min(last, self._starts[number + 1])
            pieces.append(self.parts[number][first - start : end - start])
            first, number = end, number + 1
        return pieces


T = TypeVar("T", bound=Tokens)


def between(tokens: T, first: int, last: int) -> Tokens:
    """A part of a stream without a copy, whatever kind of stream it is."""
    return tokens.between(first, last) if isinstance(tokens, ShardedTokens) else tokens[first:last]


def map_shard(file: Path, dtype: np.dtype[Any], tokens: int) -> npt.NDArray[Any]:
    """The tokens of a file, mapped. Raises CorruptError if it can't be, or if it holds another number of them."""
    size = tokens * dtype.itemsize
    try:
        if file.stat().st_size != size:
            message = f"{file} holds {file.stat().st_size:,} bytes, not {size:,}"
            raise CorruptError(message, "run it again: it is then made anew")
        if size < _MAPPED:
            return np.fromfile(file, dtype)
        return np.asarray(np.memmap(file, dtype, mode="r"))  # a plain array: slices of a memmap cost more
    except (OSError, ValueError) as error:
        raise CorruptError(f"{file} can't be read: {error}", "run it again: it is then made anew") from None
