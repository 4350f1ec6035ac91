"""The KV cache: what attention needs of earlier tokens, as a value that the caller owns and passes in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gptcli.errors import LimitError
from gptcli.spec.config import ModelConfig

# Who sees whom: "causal" where the queries are the last T of the S tokens and each sees all up to itself, None for one
# query that sees all there is, or a mask [B or 1, 1, T, S]: a boolean one in which True may be seen, or numbers in the
# queries' type that are added to the scores. An integer is a window: as "causal" or None, but a query sees no more than
# so many tokens, itself the last of them.
Mask = Tensor | Literal["causal"] | int | None


def whole_sequence(ids: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Mask]:
    """Positions ``[1, T]`` and mask of ids ``[B, T]`` that no cache stands before.

    With ``documents`` (``[B, T]``, the number of each id's document) a query sees its own document only.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    if documents is None:
        return positions, "causal"
    same = documents[:, None, :, None] == documents[:, None, None, :]  # [B, 1, T, S]
    return positions, same.tril()


def masks_of_layers(mask: Mask, positions: Tensor, config: ModelConfig) -> list[Mask]:
    """What the queries at ``positions`` ``[B or 1, T]`` see in each layer: the mask, or what its window leaves of it.

    Masks are made once for each width of window, not for each layer.
    """
    made: dict[int | None, Mask] = {None: mask}
    for window in config.windows:
        if window is not None and window not in made:
            made[window] = _within(mask, positions, window)
    return [made[window] for window in config.windows or (None,) * config.layers]


def _within(mask: Mask, positions: Tensor, window: int) -> Mask:
    if not isinstance(mask, Tensor):
        return window
    if mask.shape[-1] <= window:
        return mask
    seen = torch.arange(mask.shape[-1], device=positions.device)
    near = seen > positions[:, None, :, None] - window  # [B or 1, 1, T, S]
    return mask & near if mask.dtype is torch.bool else mask.masked_fill(~near, -math.inf)


class KVCache:
    """Keys and values of up to ``capacity`` tokens in each of B rows; rows may differ in how many they hold.

    A row's tokens stand at its front. When prompts of different length are filled in together, padded on the right,
    ``set_lengths`` says afterwards how many of each row are real; what lies behind is never seen and is overwritten.
    Rows may come and go (``join``, ``leave``); their places are then made ahead, behind the B rows that are there.

    Attributes:
        keys, values: one ``[B or more, K, capacity, D]`` tensor a layer.
        lengths: tokens held by each row. Kept on the host, so that no device is ever asked.
        moves: how often other tensors have taken the place of ``keys`` and ``values``.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        # Zeros, not whatever memory held: a place that is masked has weight 0, but 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
        self.lengths = [0] * batch
        self.capacity = capacity
        self.moves = 0
        self._positions: Tensor | None = None  # [B, T] of the tokens that are being added, where rows differ

    def begin(self, ids: Tensor) -> tuple[Tensor, Mask]:
        """The positions ``[B or 1, T]`` of the ids ``[B, T]`` that will now be added, and who sees whom.

        Raises LimitError, before anything is computed, when they do not fit.
        """
        batch, count = ids.shape
        longest = max(self.lengths) + count
        if batch != len(self.lengths):
            raise ValueError(f"{batch} rows of ids for a cache of {len(self.lengths)} rows")
        if longest > self.capacity:
            raise LimitError(f"{longest} tokens do not fit a cache of {self.capacity}", "make a larger cache")
        steps = torch.arange(count, device=ids.device)
        if min(self.lengths) == max(self.lengths):
            self._positions = None
            positions = (self.lengths[0] + steps)[None]
            if self.lengths[0] == 0:
                return positions, "causal"
            if count == 1:
                return positions, None
            if ids.device.type == "cuda":
                return positions, "causal"  # which its kernels need no mask for
        else:
            starts = torch.tensor(self.lengths, device=ids.device)
            positions = self._positions = starts[:, None] + steps
        seen = torch.arange(longest, device=ids.device)
        return positions, (seen <= positions[..., None])[:, None]  # [B, 1, T, S]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's ``[B, K, T, D]`` keys and values; all of that layer's come back, ``[B, K, S, D]``."""
        batch = len(self.lengths)
        keys, values = self.keys[layer][:batch], self.values[layer][:batch]
        end = max(self.lengths) + key.shape[2]
        if self._positions is None:
            start, count = end - key.shape[2], key.shape[2]
            keys.narrow(2, start, count).copy_(key)
            values.narrow(2, start, count).copy_(value)
        else:
            rows = torch.arange(len(keys), device=keys.device)[:, None]
            keys[rows, :, self._positions] = key.transpose(1, 2).to(keys.dtype)  # [B, T, K, D]
            values[rows, :, self._positions] = value.transpose(1, 2).to(values.dtype)  # [B, T, K, D]
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, count: int) -> None:
        """All layers have written ``count`` tokens."""
        self.lengths = [length + count for length in self.lengths]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens of each row are real, after a fill with padding or to take some back."""
        self.lengths = list(lengths)

    def grow(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens a row, keeping what is held; without the memory no layer has it."""
        before = self.capacity
        self.moves += 1
        try:
            self._resize(capacity)
        except Exception:
            self._resize(before)
            raise
        self.capacity = capacity

    def _resize(self, capacity: int) -> None:
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):  # one after the other, since both are there for the moment
                if old.shape[2] != capacity:
                    kept = min(capacity, old.shape[2])
                    tensors[layer] = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                    tensors[layer][:, :, :kept] = old[:, :, :kept]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may stand several times (samples that share a prompt)."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]
        self.moves += 1

    def join(self, other: KVCache) -> None:
        """Add another cache's rows behind the ones here, with room for theirs and twice as many rows if need be."""
        rows = len(self.lengths) + len(other.lengths)
        longest = max(other.lengths)
        if longest > self.capacity:
            self.grow(max(longest, 2 * self.capacity))
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, old in enumerate(mine):
                places = len(old)
                if rows > places:
                    self.moves += 1
                    mine[layer] = old.new_zeros(max(rows, 2 * places), *old.shape[1:])
                    mine[layer][:places] = old
                mine[layer][len(self.lengths) : rows, :, :longest] = theirs[layer][: len(other.lengths), :, :longest]
        self.lengths += other.lengths

    def leave(self, row: int) -> None:
        """Take a row out; the last one moves to its place."""
        last = len(self.lengths) - 1
        if row < last:
            held = self.lengths[last]
            for tensor in (*self.keys, *self.values):
                tensor[row, :, :held] = tensor[last, :, :held]
            self.lengths[row] = held
        self.lengths.pop()

    def fork(self, source: int, target: int) -> None:
        """Let a row hold what another holds, too; it may be one behind those that are there, if it has a place."""
        if target == len(self.lengths):
            self.lengths.append(0)
        held = self.lengths[target] = self.lengths[source]
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :held] = tensor[source, :, :held]

    def copy(self, row: int, length: int, capacity: int) -> KVCache:
        """The first ``length`` tokens of one row, in a cache of their own with room for ``capacity``."""
        other = object.__new__(type(self))
        other.lengths, other.capacity, other.moves, other._positions = [length], capacity, 0, None
        for name in ("keys", "values"):
            copies = []
            for tensor in getattr(self, name):
                new = tensor.new_zeros(1, tensor.shape[1], capacity, tensor.shape[3])
                new[0, :, :length] = tensor[row, :, :length]
                copies.append(new)
            setattr(other, name, copies)
        return other

    @property
    def bytes(self) -> int:
        """Of all keys and values, with the room for more."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class StaticCache:
    """A KV cache as a captured step sees it: fixed memory, and a host that knows nothing of what changes in it.

    It stands in for a ``KVCache`` whose tensors it reads and writes, one token a row and step. How many tokens each row
    holds is a tensor on the device, which a step reads and advances itself; so every step is the same work, whatever
    the lengths: attention reads ``seen`` places of each row, and a mask hides those that hold nothing yet.

    A row that is full is written at its last place again and again, which only happens to rows that nobody reads.
    """

    def __init__(self, cache: KVCache, seen: int, lengths: Tensor, most: int) -> None:
        """Of the first ``seen`` places of ``cache``; ``lengths`` is ``[B]`` int64, and no row gets beyond ``most``."""
        self.keys = [keys.narrow(2, 0, seen) for keys in cache.keys]
        self.values = [values.narrow(2, 0, seen) for values in cache.values]
        self.lengths = lengths
        self._last = min(seen, most) - 1
        self._at = lengths  # the place of the token that is being added
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._places = torch.arange(seen, device=lengths.device)

    def begin(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The positions ``[B, 1]`` of the ids ``[B, 1]``, and the mask ``[B, 1, 1, S]``, which is added to scores."""
        if ids.shape[1] != 1:
            raise ValueError(f"a captured step is one token a row, not {ids.shape[1]}")
        self._at = self.lengths.clamp(max=self._last)
        positions = self._at[:, None]
        # Numbers rather than booleans, which every layer would turn into numbers anew.
        mask = torch.zeros(len(ids), len(self._places), device=ids.device, dtype=self.keys[0].dtype)
        return positions, mask.masked_fill_(self._places > positions, -math.inf)[:, None, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's ``[B, K, 1, D]``; all ``seen`` places of that layer come back, ``[B, K, S, D]``."""
        keys, values = self.keys[layer], self.values[layer]
        keys[self._rows, :, self._at] = key[:, :, 0].to(keys.dtype)
        values[self._rows, :, self._at] = value[:, :, 0].to(values.dtype)
        return keys, values

    def advance(self, count: int) -> None:
        """All layers have written ``count`` tokens."""
        self.lengths.add_(count)
