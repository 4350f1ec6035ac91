"""The fast twins of ``sample``: the same token from the same logits, seed and position, at a fraction of the cost.

Natively (``native/draw.h``) where the library is there, else in fewer and larger steps of PyTorch. What can't be told
from how ``sample`` rounds is left to it, so the tokens are the same to the last one.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptcli.core.native_build import Library
from gptcli.core.sampling import COLDEST, History, filter_logits, noise_keys, sample
from gptcli.core.settings import Sampling

_Pointer, _Int, _Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
# What is hashed together: an operator costs as much as some thousands of numbers.
_NUMBERS_AT_ONCE, _POSITIONS_AT_ONCE = 1 << 15, 16


class Draw:
    """Draws tokens by the rules of one ``sampling``, time after time."""

    def __init__(self, sampling: Sampling, library: Library | None = None) -> None:
        """With a ``library`` natively where the logits are in memory."""
        self.sampling = sampling
        self._only_moves = replace(sampling, temperature=0)  # penalties and bias
        self._moves = sampling.looks_back or bool(sampling.logit_bias)
        self._only_top_k = replace(sampling, top_p=1, min_p=0)
        self._native = _NativeDraw(sampling, library) if library else None
        self._noise = _Noise()

    def __call__(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int], history: History | None = None
    ) -> Tensor:
        """As ``sample``; but the next draw may write over the ``[B]`` that comes back."""
        if not len(logits) == len(seeds) == len(positions):
            raise ValueError(f"{len(seeds)} seeds and {len(positions)} positions for {len(logits)} rows")
        if logits.device.type != "cpu":
            return sample(logits, self.sampling, seeds, positions, history)
        if self._native is not None:
            moved = filter_logits(logits, self._only_moves, history) if self._moves else logits
            tokens, decided = self._native(moved, seeds, positions)
        else:
            tokens, decided = self._in_torch(logits, seeds, positions, history)
        if decided is None:
            return tokens
        return torch.where(decided, tokens, sample(logits, self.sampling, seeds, positions, history))

    def _in_torch(
        self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int], history: History | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens ``[B]``, and which of them are certain; None where all are."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return filter_logits(logits, sampling, history).argmax(-1), None
        noise = self._noise(seeds, positions, logits.shape[-1])
        if sampling.top_p == 1:
            return (filter_logits(logits, sampling, history) + noise).argmax(-1), None
        x = filter_logits(logits, self._only_top_k, history)
        scores, most = x + noise, x.max(-1, keepdim=True).values
        if sampling.min_p > 0:
            scores.masked_fill_(x < most + math.log(sampling.min_p), -math.inf)
        return _within_top_p(x, most, scores, sampling.top_p)


def _within_top_p(x: Tensor, most: Tensor, scores: Tensor, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The tokens of the highest scores within top-p, without sorting; and which are certain.

    Of a token it is enough to know how likely all those before it are together, in the order of logits and, among
    equal ones, of ids. Is it beyond top-p, so is everything behind it, and the best of the others is looked at.
    """
    ids = torch.arange(x.shape[-1])
    likely = (x - most).exp_()
    everything = likely.sum(-1, dtype=torch.float64)
    doubt = 1e-5 + x.shape[-1] * 2.0**-26  # ``sample`` adds up float32 numbers, some in each lane of a register
    while True:
        tokens = scores.argmax(-1, keepdim=True)
        value = x.gather(1, tokens)
        before = (x > value) | ((x == value) & (ids < tokens))
        share = (likely * before).sum(-1, dtype=torch.float64) / everything
        inside = (share < top_p - doubt) | ~before.any(-1)
        beyond = share >= top_p + doubt
        if not (beyond & ~inside).any():
            return tokens[:, 0], None if bool(inside.all()) else inside
        scores.masked_fill_((beyond & ~inside)[:, None] & ~before, -math.inf)


class _Noise:
    """``gumbel_noise`` for one position after the other: the same numbers, made for some positions ahead together.

    In 32 bits a product keeps what the hash wants of it, and half as much is read and written.
    """

    def __init__(self) -> None:
        self._made = torch.empty(0, 0, 0)  # [positions ahead, B, V]
        self._seeds: list[int] = []
        self._positions: list[int] = []  # of the first

    def __call__(self, seeds: Sequence[int], positions: Sequence[int], size: int) -> Tensor:
        """``[B, size]`` float32; the next call may write over it."""
        if list(seeds) == self._seeds and size == self._made.shape[2]:
            ahead = positions[0] - self._positions[0]
            follow = [position + ahead for position in self._positions] == list(positions)
            if follow and 0 <= ahead < len(self._made):
                return self._made[ahead]
        self._seeds, self._positions = list(seeds), list(positions)
        self._make(min(max(1, _NUMBERS_AT_ONCE // (len(seeds) * size)), _POSITIONS_AT_ONCE), size)
        return self._made[0]

    def _make(self, count: int, size: int) -> None:
        rows = list(zip(self._seeds, self._positions, strict=True))
        keys = [[noise_keys(seed, position + ahead) for seed, position in rows] for ahead in range(count)]
        first, second = _signed(torch.tensor(keys)).unbind(-1)  # [count, B] each
        if self._made.shape != (*first.shape, size):
            self._made = torch.empty(*first.shape, size)
            self._ids = _signed(torch.arange(size) * 0x9E3779B1)
            self._hashed = torch.empty(self._made.shape, dtype=torch.int32)
            self._shifted = torch.empty_like(self._hashed)
        torch.add(self._ids, first[..., None], out=self._hashed)
        self._mix()
        self._hashed ^= second[..., None]
        self._mix()
        self._made.copy_(self._hashed.view(torch.uint32))
        self._made.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
        self._made.neg_().log1p_().neg_().log_().neg_()

    def _mix(self) -> None:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            torch.bitwise_right_shift(self._hashed, shift, out=self._shifted)
            self._shifted &= (1 << 32 - shift) - 1  # what is shifted in is the sign
            self._hashed ^= self._shifted
            if factor > 1:
                self._hashed *= factor - (1 << 32)


def _signed(numbers: Tensor) -> Tensor:
    """The lowest 32 bits of int64 numbers, as int32."""
    return numbers.to(torch.int32)


class _NativeDraw:
    """``gptcli_draw`` of a library, with the rules of one ``sampling`` but for penalties and bias."""

    def __init__(self, sampling: Sampling, library: Library) -> None:
        self._function: Any = library.functions.gptcli_draw
        self._function.restype = _Int
        self._function.argtypes = [_Int, _Int, _Long, _Pointer, _Pointer, _Pointer, _Pointer, _Pointer]
        self._chain = _Chain(sampling)
        self._rules = ctypes.byref(self._chain) if sampling.temperature > 0 else None
        self._room(0)

    def _room(self, rows: int) -> None:
        self._rows, self._tokens = rows, torch.empty(rows, dtype=torch.int64)
        self._seeds, self._positions = (ctypes.c_uint64 * rows)(), (_Long * rows)()

    def __call__(self, logits: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The tokens ``[B]``, and which of them are certain; None where all are."""
        rows, size = logits.shape
        if logits.dtype != torch.float32:
            logits = logits.float()
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        if rows != self._rows:
            self._room(rows)
        self._seeds[:], self._positions[:] = list(seeds), list(positions)
        given = self._function(
            *(rows, size, logits.stride(0), logits.data_ptr(), self._rules),
            *(self._seeds, self._positions, self._tokens.data_ptr()),
        )
        return self._tokens, None if given == rows else self._tokens >= 0


class _Chain(ctypes.Structure):
    """As in native/draw.h."""

    _fields_ = (
        ("temperature", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_p", ctypes.c_double),
        ("top_k", _Int),
    )

    def __init__(self, sampling: Sampling) -> None:
        min_p = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
        super().__init__(max(sampling.temperature, COLDEST), min_p, sampling.top_p, min(sampling.top_k, 2**31 - 1))
