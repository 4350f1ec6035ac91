"""The native step: a transformer, packed, and stepped by native/step.cpp.

It is the twin of ``Transformer.forward`` for one new token a row, or a few, on a CPU. What a row gives is the same to
the bit whatever its company. ``native_build`` makes the library that it calls; where that was not done, nothing here is
used.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.core.native_build import Library
from gptcli.core.native_pack import DTYPES, TYPES, PackedMatrix, PackedModel, Packing, kind_of, matrices
from gptcli.errors import LimitError, ResourceError, UnsupportedError

# How far logits may be from the transformer's, as a share of their standard deviation. In float32 only the order of
# sums differs. PyTorch rounds whatever it makes to bfloat16, and the native step next to nothing. With int8 and int4
# the native step rounds each input of a matrix to a 254th of the largest of its 32.
LIMITS = {"float32": 1e-4, "bfloat16": 0.2, "int8": 0.4, "int4": 0.4}

_Pointer, _Int, _Long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def why_not(transformer: Transformer) -> str | None:
    """Why a transformer can't have a native step; None where it can."""
    table = transformer.embedding.weight
    if table.device.type != "cpu":
        return f"the model is on {table.device}"
    if table.dtype not in DTYPES:
        return f"it does not compute in {str(table.dtype).removeprefix('torch.')}"
    return None


class NativeStep:
    """One transformer, packed. The weights are read once, here: later changes of them do not show.

    Attributes:
        library, threads: what it runs with.
        packed_bytes: what the packed weights take, beside the transformer's own.
    """

    def __init__(self, library: Library, transformer: Transformer, threads: int) -> None:
        """Pack. Raises UnsupportedError (see ``why_not``), and ResourceError without the memory for it."""
        if reason := why_not(transformer):
            raise UnsupportedError(f"there is no native step: {reason}", "use the PyTorch step")
        self.library, self.threads = library, threads
        self._config = transformer.config
        self._functions = _declared(library)
        self._packing = Packing(library.lanes, matrices(transformer))
        self.packed_bytes = self._packing.bytes
        self._model = self._packing.model(transformer, threads)
        self._lock = threading.Lock()  # the library's workspace is one for all
        self._places: _Places | None = None
        self._open()

    def _open(self) -> None:
        """Start its threads."""
        self._handle = self._functions.gptcli_open(ctypes.byref(self._model))
        if not self._handle:
            raise ResourceError("there is not enough memory for the native step", "use a smaller model")
        self._process = os.getpid()
        self._closing = weakref.finalize(self, _close, self._functions.gptcli_close, self._handle, self._process)

    def close(self) -> None:
        """End its threads. It can't be used afterwards."""
        self._closing()
        self._handle = None

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add one token a row, ``[B]`` int64, to the cache; the logits ``[B, V]`` of the next, float32.

        Raises LimitError when the cache has no room, IndexError for a token or a position that the model does not have.
        """
        ids = tokens.tolist()
        logits = self._run(ids, [1] * len(ids), cache)
        cache.advance(1)
        return logits

    def verify(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Add some tokens to each row, to each its own number of them, and see what the model makes of each.

        The logits ``[Q, V]`` of the next token after each, row after row, and what is left in the cache are to the bit
        those of steps one by one. Raises as ``step``.
        """
        return self._add(tokens, cache, last=False)

    def fill(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """As ``verify``, but only the logits ``[B, V]`` behind the last token of each row are made: for prompts."""
        return self._add(tokens, cache, last=True)

    def _add(self, tokens: Sequence[Sequence[int]], cache: KVCache, *, last: bool) -> Tensor:
        counts = list(map(len, tokens))
        logits = self._run([id_ for row in tokens for id_ in row], counts, cache, last=last)
        cache.set_lengths([length + count for length, count in zip(cache.lengths, counts, strict=True)])
        return logits

    def _run(self, ids: list[int], counts: list[int], cache: KVCache, *, last: bool = False) -> Tensor:
        lengths = cache.lengths
        self._check(ids, counts, cache)
        logits = torch.empty(len(counts if last else ids), self._config.vocab_size)
        numbers = _Long * len(counts)
        with self._lock:
            if self._process != os.getpid():  # a fork takes the memory along, but not the threads
                self._closing.detach()
                self._open()
            if self._places is None or not self._places.of(cache):
                self._places = _Places(cache)
            done = self._functions.gptcli_step(
                *(self._handle, len(counts), numbers(*counts), (_Long * len(ids))(*ids), numbers(*lengths)),
                *(self._places.type, self._places.keys, self._places.values, cache.capacity, last, logits.data_ptr()),
            )
        if not done:
            raise ResourceError("there is not enough memory for a step", "use fewer rows")
        return logits

    def _check(self, ids: list[int], counts: list[int], cache: KVCache) -> None:
        """What the library takes at its word."""
        config = self._config
        if not self._handle:
            raise ValueError("this step was closed")
        if len(counts) != len(cache.lengths):
            raise ValueError(f"{len(counts)} tokens for a cache of {len(cache.lengths)} rows")
        if min(counts) < 1:
            raise ValueError("a row without a token")
        longest = max(map(sum, zip(cache.lengths, counts, strict=True)))
        if longest > cache.capacity:
            raise LimitError(f"{longest} tokens do not fit a cache of {cache.capacity}", "make a larger cache")
        if config.position == "learned" and longest > config.context:
            raise IndexError(f"position {longest - 1}, and the model has {config.context}")
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise IndexError(f"one of the tokens {ids}, and the model has {config.vocab_size}")


class _Places:
    """Where the tensors of a cache are, as the library is told, for as long as the cache has not got others."""

    def __init__(self, cache: KVCache) -> None:
        pointers = _Pointer * len(cache.keys)
        self.keys = pointers(*[keys.data_ptr() for keys in cache.keys])
        self.values = pointers(*[values.data_ptr() for values in cache.values])
        self.type = TYPES[DTYPES[cache.keys[0].dtype]]
        self._cache, self._moves = weakref.ref(cache), cache.moves

    def of(self, cache: KVCache) -> bool:
        return self._cache() is cache and self._moves == cache.moves


class NativeMatrix:
    """One packed matrix, to be multiplied on one thread: for tests and benchmarks of the products alone."""

    def __init__(self, library: Library, linear: Any) -> None:
        self._functions = _declared(library)
        self._packing = Packing(library.lanes, iter([linear]))
        self._matrix = self._packing.matrix(linear)
        self.rows = int(linear.out_features)

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, columns]`` float32 to ``[B, rows]``."""
        x = F.pad(x, (0, self._matrix.columns - x.shape[1])).contiguous()
        y = torch.empty(len(x), self._matrix.rows)
        self._functions.gptcli_multiply(ctypes.byref(self._matrix), len(x), x.data_ptr(), y.data_ptr())
        return y[:, : self.rows]


def _declared(library: Library) -> Any:
    """The library's functions, with their types."""
    functions: Any = library.functions
    arrays = [_Pointer, _Pointer]
    for name, result, arguments in (
        ("open", _Pointer, [ctypes.POINTER(PackedModel)]),
        ("close", None, [_Pointer]),
        ("step", ctypes.c_bool, [_Pointer, _Int, _Pointer, *arrays, _Int, *arrays, _Long, ctypes.c_bool, _Pointer]),
        ("multiply", None, [ctypes.POINTER(PackedMatrix), _Int, *arrays]),
    ):
        function = getattr(functions, f"gptcli_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


def _close(close: Any, handle: int, process: int) -> None:
    if os.getpid() == process:  # in a fork there are no threads that could end
        close(handle)


@dataclass(frozen=True)
class Comparison:
    """How far the native step's logits are from the transformer's.

    Attributes:
        tokens: steps that were compared.
        difference: the largest, as a share of the logits' standard deviation.
        limit: what rounding may make of it; beyond it something is wrong.
    """

    tokens: int
    difference: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.limit  # and not where it is no number


@torch.inference_mode()
def compare(step: NativeStep, transformer: Transformer, tokens: int = 8) -> Comparison:
    """Take some steps both ways, on two rows of different length, and compare all logits."""
    config, table = transformer.config, transformer.embedding.weight
    tokens = min(tokens, config.context - 3)
    ids = torch.arange(2 * (tokens + 3)).view(2, -1) * 7919 % config.vocab_size
    caches = [KVCache(config, 2, tokens + 3, device=table.device, dtype=table.dtype) for _ in range(2)]
    for cache in caches:
        transformer(ids[:, :3], cache)
        cache.set_lengths([3, 1])
    difference = 0.0
    for place in range(3, tokens + 3):
        wanted = transformer(ids[:, place : place + 1], caches[0])[:, 0].float()  # [B, V]
        share = (step.step(ids[:, place], caches[1]) - wanted).abs().max() / wanted.std()
        difference = max(difference, share.item()) if share == share else math.nan
    return Comparison(tokens, difference, LIMITS[kind_of(transformer.unembedding)])
