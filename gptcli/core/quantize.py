"""Weights in 8 or 4 bits: the matrices of the blocks and the unembedding; tables, norms and biases stay as they are.

    int8    a float32 scale a row:                             w ~ scale[row] q                     q in -127..127
    int4    a bfloat16 scale a row and 32 columns (a group):   w ~ scale[row, group] (q - 8)        q in 0..15

A step of one token is bound by reading the weights, so half or a quarter of the bytes is most of the time saved. What
is multiplied is rounded too where the kernel wants it: see ``_pick``. The slow twin is ``slow()``.

Shapes as in ``core/model.py``; a matrix is ``[out, in]``, R its rows and G its groups of columns.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.core import integers, runtime
from gptcli.core.model import Transformer
from gptcli.errors import CorruptError, UsageError

KINDS = ("int8", "int4")
GROUP = 32

# What the extreme value of an int4 group may become; the one with the least squared error is taken. Beyond -8 the
# extreme itself is cut, to the good of the others.
_EXTREMES = (-7.5, -8.0, -8.5, -9.0)
# Elements that are quantized at a time: few enough to stay in the processor's cache.
_CHUNK = 1 << 18
# Rows of int4 from which unpacking the matrix costs less than the op, whose time grows with every row.
_UNPACK_ROWS = 32
_TINY = 1e-30  # in place of the scale of what is all zero

# A layer and what it is to multiply, ``[..., in]``, to ``[..., out]``.
_Product = Callable[["QuantizedLinear", Tensor], Tensor]


class QuantizedLinear(nn.Module):
    """A linear map whose matrix is kept in few bits.

    Attributes:
        kind: ``int8`` or ``int4``.
        weight: int8 ``[R, in]``, or uint8 ``[R, 16 G]``: byte j holds column 2j in its low half and 2j + 1 in its high
            one; columns are filled up to whole groups with zeros, which are kept as 8. It is held once: where a product
            or the native step has packed it, this unpacks it.
        scale: float32 ``[R]``, or bfloat16 ``[R, G]``.
        bias: ``[R]`` in the model's dtype, or None.
        in_features, out_features: as of ``nn.Linear``.
    """

    scale: Tensor
    _plain: Tensor | None

    def __init__(self, kind: str, weight: Tensor, scale: Tensor, bias: Tensor | None, in_features: int) -> None:
        super().__init__()
        self.kind = kind
        self.in_features, self.out_features = in_features, len(weight)
        self.register_buffer("_plain", weight)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._product: _Product | None = None
        self._integers: integers.IntegerProduct | None = None
        self._joined: tuple[QuantizedLinear, slice] | None = None  # the map whose rows these are, and which
        self._parts: tuple[QuantizedLinear, ...] = ()  # the maps whose rows are here
        self._unpack: Callable[[], Tensor] | None = None  # what gives the matrix, where others hold it

    @property
    def weight(self) -> Tensor:
        if self._plain is not None:
            return self._plain
        if self._unpack is not None:
            return self._unpack()
        if self._integers is not None:
            return self._integers.weight
        assert self._joined is not None
        whole, rows = self._joined
        return whole.weight[rows]

    @property
    def nbytes(self) -> int:
        """What matrix, scales and bias take."""
        bias = 0 if self.bias is None else self.bias.nbytes
        columns = self.in_features if self.kind == "int8" else -(-self.in_features // GROUP) * GROUP // 2
        return self.out_features * columns + self.scale.nbytes + bias

    @classmethod
    def of(cls, linear: nn.Linear, kind: str) -> QuantizedLinear:
        """A linear map's values in few bits; the map itself is left as it is."""
        weight, scale = (quantize_int8 if kind == "int8" else quantize_int4)(linear.weight.detach())
        return cls(kind, weight, scale, linear.bias, linear.in_features)

    def beside(self, others: Sequence[QuantizedLinear]) -> QuantizedLinear:
        """One map with the outputs of this one and then of others, which have the same input, kind and bias or none.

        It holds the matrix from now on, for all of them, unless all have handed theirs over.
        """
        every = (self, *others)
        bias = None if self.bias is None else torch.cat([each.bias for each in every if each.bias is not None])
        weight, scale = (torch.cat([getattr(each, name) for each in every]) for name in ("weight", "scale"))
        whole, start = QuantizedLinear(self.kind, weight, scale, bias, self.in_features), 0
        whole._parts = every
        if all(each._unpack is not None for each in every):  # it is held elsewhere, and stays there
            whole.hand_over(lambda: torch.cat([each.weight for each in every]))
            return whole
        for each in every:
            each._joined = whole, slice(start, start := start + each.out_features)
            each._plain = each._integers = each._product = each._unpack = None
        return whole

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``: ``slow(x)`` within the rounding of the fast op."""
        if self._product is None:
            self._product = _pick(self)
        return self._product(self, x)

    def hand_over(self, unpack: Callable[[], Tensor]) -> None:
        """Let go of the matrix, and of what was packed for products: from now on ``unpack`` gives it.

        A product that is needed later packs it anew, once, and keeps that. The map that holds this one's rows beside
        others' lets go when the last of them does.
        """
        self._plain = self._integers = self._product = None
        self._unpack = unpack
        if self._joined is not None:
            whole, parts = self._joined[0], self._joined[0]._parts
            if whole._unpack is None and all(part._unpack is not None for part in parts):
                whole.hand_over(lambda: torch.cat([part.weight for part in parts]))

    def integer_product(self) -> integers.IntegerProduct:
        """A product that keeps the matrix from now on."""
        if self._integers is None:
            self._integers = integers.IntegerProduct(self.weight, self.scale, self.bias)
            self._plain = None
        return self._integers

    def slow(self, x: Tensor) -> Tensor:
        """The readable twin: every weight as the number that it stands for."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.dequantized(), bias).to(x.dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix ``[out, in]``."""
        if self.kind == "int8":
            return (self.weight * self.scale[:, None]).to(dtype)
        grouped = self.levels().unflatten(1, (-1, GROUP)).to(dtype).sub_(8)  # [R, G, 32]
        return grouped.mul_(self.scale[..., None].to(dtype)).flatten(1)[:, : self.in_features]

    def levels(self) -> Tensor:
        """The q of int4, uint8 ``[R, 32 G]``."""
        return torch.stack((self.weight & 15, self.weight >> 4), -1).flatten(1)


def check_quantize(kind: str, device: torch.device) -> None:
    """Raise UsageError for a kind that is neither ``none`` nor one of ``KINDS``, and a device that has none of them."""
    if kind not in ("none", *KINDS):
        raise UsageError(f"--quantize {kind!r} is not a choice", f"use none, {', '.join(KINDS)}")
    if kind != "none" and device.type not in ("cpu", "cuda"):
        raise UsageError(f"weights are not quantized on {device.type}", "use --device cpu, or --quantize none")


def quantize_(transformer: Transformer, kind: str, dtype: torch.dtype | None = None) -> Transformer:
    """Replace the matrices of a model by quantized ones, one after the other: peak memory is the weights plus one.

    All is turned into ``dtype`` first, piece by piece; None leaves it in its own. A tied unembedding is quantized while
    the embedding table stays a table. Raises CorruptError where a weight is not a finite number, which integers would
    hide.
    """
    # A list of the matrices would keep them all.
    parents = [(place, part) for place, part in transformer.named_modules() if not isinstance(part, nn.Linear)]
    for place, parent in parents:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                _convert(child, f"{place}.{name}", dtype)
                setattr(parent, name, QuantizedLinear.of(child, kind))
        _convert(parent, place, dtype)
        runtime.give_back_memory()
    return transformer


def _convert(module: nn.Module, place: str, dtype: torch.dtype | None) -> None:
    """Turn a module's own parameters into ``dtype``."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        converted = parameter.detach().to(dtype or parameter.dtype)
        if not (converted.amax().isfinite() and converted.amin().isfinite()):
            message = f"{place}.{name} holds values that are not finite".removeprefix(".")
            raise CorruptError(message, "the weights are damaged: get them again")
        if converted.dtype is not parameter.dtype:
            setattr(module, name, nn.Parameter(converted, requires_grad=False))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, in]`` as int8 ``[R, in]`` and scales ``[R]``: a row's extreme value becomes 127 or -127."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    for rows in _chunks(weight):
        part = torch.empty_like(values[rows], dtype=torch.float32).copy_(
            weight[rows]
        )  # in order, and not the file's own
        scale[rows] = torch.maximum(part.amax(-1), part.amin(-1).neg_()).div_(127).clamp_(min=_TINY)
        values[rows] = part.div_(scale[rows, None]).round_()
    return values, scale


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, in]`` as packed uint8 ``[R, 16 G]`` and scales ``[R, G]``, laid out as ``QuantizedLinear`` says."""
    groups = -(-weight.shape[1] // GROUP)
    packed = torch.empty((len(weight), groups * GROUP // 2), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((len(weight), groups), dtype=torch.bfloat16, device=weight.device)
    for rows in _chunks(weight):
        part = F.pad(weight[rows].float(), (0, groups * GROUP - weight.shape[1])).unflatten(1, (groups, GROUP))
        values, scale[rows] = _least_squares(part)
        values = values.flatten(1)
        packed[rows] = values[:, 0::2] | (values[:, 1::2] << 4)
    return packed, scale


def _least_squares(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The levels ``[R, G, 32]`` and scales ``[R, G]`` of a few tried that are nearest to the values."""
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))  # [R, G, 1]
    best_levels, best_scale, least = grouped, extreme, torch.full_like(extreme, math.inf)
    for level in _EXTREMES:
        scale = (extreme / level).bfloat16().float()
        scale = torch.where(scale == 0, _TINY, scale)
        levels = (grouped / scale).round_().clamp_(-8, 7)
        error = torch.addcmul(grouped, levels, scale, value=-1).square_().sum(-1, keepdim=True)
        better = error < least
        best_levels, best_scale = torch.where(better, levels, best_levels), torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    return (best_levels + 8).to(torch.uint8), best_scale[..., 0].bfloat16()


def _chunks(weight: Tensor) -> Iterator[slice]:
    """The rows of a matrix, some at a time; on a device all at once."""
    size = max(1, _CHUNK // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return (slice(start, start + size) for start in range(0, len(weight), size))


def _pick(layer: QuantizedLinear) -> _Product:
    """The fastest product that is there for a matrix's device and kind."""
    if layer.weight.is_cuda:
        return _cuda_product(layer)
    if layer.kind == "int4":
        return _Int4()
    if not integers.available():
        return _unpacked
    return _integer_product


def _integer_product(layer: QuantizedLinear, x: Tensor) -> Tensor:
    return layer.integer_product()(x)


def _unpacked(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The matrix in the dtype of ``x``, then an ordinary product: many rows are worth that, one is not."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.dequantized(x.dtype), bias)


def _weight_only(layer: QuantizedLinear, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """What an op on ``[rows, in]`` makes, without the rows that fill its last tile, and with the bias."""
    made = product(x.reshape(-1, layer.in_features))[:, : layer.out_features].to(x.dtype)
    if layer.bias is not None:
        made = made + layer.bias.to(x.dtype)
    return made.unflatten(0, x.shape[:-1])


class _Int4:
    """The weight-only op: bfloat16 times the levels as they are kept. Its time grows with the rows."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None  # until few rows are asked for

    def _pack(self, layer: QuantizedLinear) -> Tensor:
        more = -layer.out_features % 16  # the op wants whole tiles
        if layer.weight.is_cuda:
            swapped = F.pad((layer.weight << 4) | (layer.weight >> 4), (0, 0, 0, more), value=0x88)
            packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8 if swapped.shape[1] % 64 == 0 else 2)
            self._op = torch.ops.aten._weight_int4pack_mm
        else:
            levels = F.pad(layer.levels().int(), (0, 0, 0, more), value=8)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
            self._op = torch.ops.aten._weight_int4pack_mm_for_cpu
        scale = F.pad(layer.scale, (0, 0, 0, more)).t()  # [G, R]
        self._scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), -1)
        return packed

    def __call__(self, layer: QuantizedLinear, x: Tensor) -> Tensor:
        if x.numel() <= _UNPACK_ROWS * layer.in_features:
            if self._packed is None:
                self._packed = self._pack(layer)
            return _weight_only(layer, x, self._product)
        dtype = torch.bfloat16 if runtime.is_fast(torch.bfloat16, x.device) else x.dtype
        return _unpacked(layer, x.to(dtype)).to(x.dtype)

    def _product(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows.bfloat16(), (0, -rows.shape[1] % GROUP))
        return self._op(rows, self._packed, GROUP, self._scale_and_zero)


def _cuda_int8(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """The weight-only op."""
    if x.numel() > _UNPACK_ROWS * layer.in_features:
        return _unpacked(layer, x)
    scale = layer.scale.to(x.dtype)
    return _weight_only(layer, x, lambda rows: torch._weight_int8pack_mm(rows, layer.weight, scale))


def _cuda_product(layer: QuantizedLinear) -> _Product:
    """The weight-only op where this GPU and torch have it for such a matrix, and it agrees with the slow twin."""
    x = torch.linspace(-1, 1, layer.in_features, device=layer.weight.device, dtype=torch.bfloat16)[None]
    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        product = _cuda_int8 if layer.kind == "int8" else _Int4()
        wanted = layer.slow(x).float()
        if (product(layer, x).float() - wanted).norm() <= 0.02 * wanted.norm():
            return product
    return _unpacked
