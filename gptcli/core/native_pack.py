"""A transformer's weights in the layout that native/step.cpp reads, and its structures as ctypes has them.

A matrix ``[rows, columns]`` is padded with zeros, cut into panels of as many rows as the CPU computes together (lanes),
and each panel is laid out column after column, in words of 32 bits a row: one float32, two bfloat16, four int8 or eight
int4. So packing is the same for all: words ``[rows, W]`` become ``[panels, W, lanes]``.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.core import runtime
from gptcli.core.model import Transformer
from gptcli.core.rope import frequencies, magnitude
from gptcli.errors import ResourceError

GROUP = 32  # columns that share a scale, as in step.cpp
_ALIGNMENT = 64  # bytes: a cache line

# The enumerations of step.cpp.
TYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int32
_MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
_SIZES = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "vocab", "threads")
_AXES = ("rms", "activation", "rope_dim", "parallel", "norm_output", "qk_norm", "original_context", "table_type")
_QK_NORMS = {"none": 0, "head": 1, "whole": 2}


class PackedMatrix(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("weight", "scale", "bias")),
        *((name, _Int) for name in ("rows", "columns", "type", "unused")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _Pointer), ("bias", _Pointer))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, _Int) for name in ("window", "rotated")),
        *((name, PackedMatrix) for name in _MATRICES),
    )


class PackedModel(ctypes.Structure):
    _fields_ = (
        *((name, _Int) for name in (*_SIZES, *_AXES)),
        *((name, ctypes.c_float) for name in ("eps", "rope_size", "rope_factor")),
        *((name, _Pointer) for name in ("embedding", "positions", "frequencies")),
        ("norm", _Norm),
        ("unembedding", PackedMatrix),
        ("blocks", ctypes.POINTER(_Layer)),
    )


class Packing:
    """Packs modules into one piece of memory, which lives as long as this does."""

    def __init__(self, lanes: int, matrices: Iterator[nn.Module]) -> None:
        """Set aside room for these matrices. Raises ResourceError where there is none."""
        self.lanes = lanes
        self.bytes = sum(map(self._size, matrices))
        self._memory = _Memory(self.bytes)
        self._kept: list[object] = []

    def model(self, transformer: Transformer, threads: int) -> PackedModel:
        """All of a transformer, matrix by matrix: the memory grows by what is packed and one matrix."""
        config = transformer.config
        layers = (_Layer * config.layers)()
        for number, (layer, block) in enumerate(zip(layers, transformer.blocks, strict=True)):
            layer.attention_norm = self.norm(block.get_submodule("attention_norm"))
            layer.mlp_norm = self.norm(block.get_submodule("mlp_norm"))
            if config.qk_norm != "none":
                layer.query_norm = self.norm(block.get_submodule("attention.query_norm"))
                layer.key_norm = self.norm(block.get_submodule("attention.key_norm"))
            layer.window = (config.windows[number] if config.windows else None) or 0
            layer.rotated = number not in config.unrotated
            for name, linear in _matrices_of(block):
                setattr(layer, name, self.matrix(linear))
            runtime.give_back_memory()
        turns, rope_dim, scaling = None, config.rope_dim or config.head_dim, config.rope_scaling
        if config.position == "rope":
            turns = self._keep(frequencies(rope_dim, config.rope_theta, torch.device("cpu"), scaling))
        positions = None
        if transformer.positions is not None:
            positions = self._keep(transformer.positions.weight[config.position_offset :])
        dynamic = scaling if scaling is not None and scaling.kind == "dynamic" else None
        return PackedModel(
            *(config.layers, config.width, config.heads, config.kv_heads, config.head_dim, config.mlp_width),
            *(config.vocab_size, threads, config.norm == "rmsnorm", ACTIVATIONS[config.activation]),
            *(rope_dim, config.parallel, config.norm_output, _QK_NORMS[config.qk_norm]),
            *(dynamic.original_context if dynamic else 0, TYPES[DTYPES[transformer.embedding.weight.dtype]]),
            *(config.norm_eps, magnitude(scaling), dynamic.factor if dynamic else 1.0),
            *(self._keep(transformer.embedding.weight), positions, turns),
            self.norm(transformer.norm),
            self.matrix(transformer.unembedding),
            layers,
        )

    def norm(self, norm: nn.Module) -> _Norm:
        return _Norm(*(self._padded(getattr(norm, name, None)) for name in ("weight", "bias")))

    def matrix(self, linear: nn.Module) -> PackedMatrix:
        kind, weight, scale = stored(linear)
        rows, columns = self._padded_shape(linear)
        words = _WORDS[kind](weight)
        packed = self._memory.take(rows // self.lanes, columns * _BITS[kind] // 32, self.lanes, dtype=torch.int32)
        _into_panels(words, packed)
        factors = None
        if kind == "int8" and scale is not None:
            factors = self._memory.take(rows)
            factors[: len(weight)] = scale.flatten()
        elif scale is not None:
            factors = self._memory.take(rows // self.lanes, columns // GROUP, self.lanes, dtype=torch.bfloat16)
            _into_panels(scale, factors)
        bias = self._padded(getattr(linear, "bias", None), rows)
        return PackedMatrix(packed.data_ptr(), _address(factors), bias, rows, columns, TYPES[kind], 0)

    def _size(self, linear: nn.Module) -> int:
        """Bytes that ``matrix`` takes, or some more."""
        kind = kind_of(linear)
        rows, columns = self._padded_shape(linear)
        scales = rows * (columns // GROUP) * 2 + rows * 4
        return rows * columns * _BITS[kind] // 8 + scales + 2 * _ALIGNMENT

    def _padded_shape(self, linear: Any) -> tuple[int, int]:
        return _up(linear.out_features, self.lanes), _up(linear.in_features, GROUP)

    def _padded(self, vector: Tensor | None, size: int | None = None) -> int | None:
        """The address of a vector in float32, with zeros up to ``size``, by default to whole groups."""
        if vector is None:
            return None
        size = size or _up(len(vector), GROUP)
        return self._keep(F.pad(vector.detach().float(), (0, size - len(vector))))

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that is to stay."""
        tensor = tensor.detach().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


def matrices(transformer: Transformer) -> Iterator[nn.Module]:
    """Every matrix that a step multiplies with."""
    for block in transformer.blocks:
        yield from (linear for _, linear in _matrices_of(block))
    yield transformer.unembedding


def _matrices_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for part in ("attention", "mlp"):
        yield from (named for named in block.get_submodule(part).named_children() if named[0] in _MATRICES)


def kind_of(linear: Any) -> str:
    """In what a matrix is kept, which costs nothing to ask: ``stored`` may have to unpack it."""
    return getattr(linear, "kind", None) or DTYPES[linear.weight.dtype]


def stored(linear: nn.Module) -> tuple[str, Tensor, Tensor | None]:
    """A matrix as it is kept: its type, the numbers ``[rows, columns]`` (int4: two a byte), and their scale.

    This is all that is known here of quantized matrices: int8 has one float32 scale a row, ``w ~ scale * q``; int4 a
    bfloat16 one for each row and group of 32 columns, ``w ~ scale * (q - 8)``, two numbers a byte, the even column low.
    """
    any_linear: Any = linear
    return kind_of(linear), any_linear.weight.detach(), getattr(linear, "scale", None)


# --- Numbers [rows, columns] to words of 32 bits [rows, W]


def _words_float32(weight: Tensor) -> Tensor:
    return weight.view(torch.int32)


def _words_bfloat16(weight: Tensor) -> Tensor:
    return F.pad(weight, (0, -weight.shape[1] % 2)).contiguous().view(torch.int32)


def _words_int8(weight: Tensor) -> Tensor:
    return F.pad(weight.view(torch.uint8) ^ 128, (0, -weight.shape[1] % 4)).contiguous().view(torch.int32)


def _words_int4(weight: Tensor) -> Tensor:
    numbers = torch.stack((weight & 15, weight >> 4), -1).flatten(1)
    eights = F.pad(numbers, (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 2, 4))
    return (eights[:, :, 0] | eights[:, :, 1] << 4).flatten(1).view(torch.int32)


_WORDS = {"float32": _words_float32, "bfloat16": _words_bfloat16, "int8": _words_int8, "int4": _words_int4}


def _into_panels(rows: Tensor, panels: Tensor) -> None:
    """Write ``[R, W]`` into ``[panels, W or more, lanes]``, whose rest stays as it is."""
    lanes, (count, width) = panels.shape[2], rows.shape
    whole = count // lanes
    if whole:
        panels[:whole, :width] = rows[: whole * lanes].unflatten(0, (whole, lanes)).transpose(1, 2)
    if count % lanes:
        panels[whole, :width, : count % lanes] = rows[whole * lanes :].t()


class _Memory:
    """Zeroed memory, in large pages where the system has them: a step walks through all of it."""

    def __init__(self, size: int) -> None:
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"there is not enough memory for packed weights: {error}", "use a smaller model"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        self._used = 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        start, size = self._used, math.prod(shape) * dtype.itemsize
        self._used = _up(start + size, _ALIGNMENT)
        return self._bytes[start : start + size].view(dtype).view(shape)


def _up(count: int, to: int) -> int:
    return -(-count // to) * to


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
