"""The same forward with fewer operators: for a CPU, where a small operator costs as much as what it computes.

The transformer's own forward is the readable one, and the oracle of this one in the tests. What differs: matrices are
packed once in the order in which their kernel reads them; query, key and value are one product; activations and what is
added to the stream are computed within the products; one query goes through the cache in float32; and of the last
layer only what is asked for is computed. Quantized matrices (``core/quantize.py``) keep their own products, and the
stream is then float32, which those work in.

Packing copies every matrix: whether that is worth it says ``worth_packing``. Shapes as in ``core/model.py``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.core import runtime
from gptcli.core.attention import attend, causal_in_blocks, in_window
from gptcli.core.cache import KVCache, Mask, masks_of_layers, whole_sequence
from gptcli.core.model import ACTIVATIONS, Transformer
from gptcli.core.rope import Rotation, rotate, rotation
from gptcli.spec.config import ModelConfig

# Steps, or tokens of prompts, from which the time that is saved makes up for packing: measured on GPT-2 124M.
_WORTH_STEPS, _WORTH_TOKENS = 32, 512
# Tokens from which blocks beat torch's attention in bfloat16, and up to which their patterns are small beside the rest.
_BLOCKS = range(128, 2049)
# Tokens that go through quantized matrices at once: what is between two products stays in the processor's cache.
_PIECE = 384
# Numbers from which it pays to compute GELU in several small steps.
_MANY_NUMBERS = 1 << 16


def worth_packing(prompt_tokens: int, max_tokens: int, rows: int = 1) -> bool:
    """Whether building a ``Lean`` pays off for so many rows with prompts and answers so long; -1 is an open end."""
    return max_tokens < 0 or max_tokens >= _WORTH_STEPS or prompt_tokens * rows >= _WORTH_TOKENS


class Lean:
    """A transformer's forward on a CPU, without tap and gradient.

    Attributes:
        cache_dtype: in which a cache for it is fastest; others do.
    """

    def __init__(self, transformer: Transformer) -> None:
        """Pack the matrices, layer by layer; the transformer stays as it is."""
        self.config = transformer.config
        self._table = transformer.embedding.weight
        self._positions = None
        if transformer.positions is not None:
            self._positions = transformer.positions.weight[self.config.position_offset :]
        quantized = not isinstance(transformer.unembedding, nn.Linear)
        self._dtype = torch.float32 if quantized else self._table.dtype
        self.cache_dtype = torch.float32 if self._table.device.type == "cpu" else self._table.dtype
        self._layers: list[_Layer] = []
        for block in transformer.blocks:
            self._layers.append(_Layer(block, self.config, self._table.dtype, self._dtype))
            runtime.give_back_memory()
        # Every layer of a prompt takes and frees the same large tensors.
        runtime.keep_freed_memory()
        self._norm = _norm(transformer.norm, self._dtype)
        self._unembedding = _map(transformer.unembedding)

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: KVCache | None = None, *, last: Tensor | None = None) -> Tensor:
        """Logits of the next token after each query token: arguments, shapes and errors as of ``Transformer.forward``.

        The logits are float32 where the matrices are quantized, else in the weights' dtype.
        """
        c = self.config
        positions, mask = whole_sequence(ids) if cache is None else cache.begin(ids)
        masks = masks_of_layers(mask, positions, c)
        stream = F.embedding(ids, self._table)
        turn = None
        if self._positions is not None:
            stream = stream + F.embedding(positions, self._positions)
        stream = stream.to(self._dtype)
        if self._positions is None:
            turn = rotation(positions, c.rope_dim or c.head_dim, c.rope_theta, self._dtype, c.rope_scaling)
        for number, layer in enumerate(self._layers):
            turned = None if number in c.unrotated else turn
            final = number == len(self._layers) - 1
            stream = layer(stream, turned, masks[number], cache, number, last if final else None)
        if cache is not None:
            cache.advance(ids.shape[1])
        logits = self._unembedding(self._norm(stream))
        return logits if last is None else logits[:, 0]  # [B, V]


class _Layer:
    """``core.model.Block``."""

    def __init__(self, block: nn.Module, config: ModelConfig, dtype: torch.dtype, stream: torch.dtype) -> None:
        part: Any = block
        attention, mlp = part.attention, part.mlp
        self._dtype = dtype
        self._quantized = not isinstance(mlp.up, nn.Linear)
        # Before it is rotated, nothing is rounded.
        self._attended = dtype if config.position == "learned" else stream
        self._heads, self._kv_heads, self._head_dim = config.heads, config.kv_heads, config.head_dim
        self._parallel, self._norm_output = config.parallel, config.norm_output
        self._attention_norm, self._mlp_norm = (_norm(norm, stream) for norm in (part.attention_norm, part.mlp_norm))
        self._query_norm, self._key_norm = (
            None if norm is None else _parts_norm(norm, stream) for norm in (attention.query_norm, attention.key_norm)
        )
        self._qkv = _map(_beside(attention.query, attention.key, attention.value))
        self._output = _map(attention.output)
        self._activation = config.activation
        self._gate = None if mlp.gate is None else _map(mlp.gate)
        self._up, self._down = _map(mlp.up), _map(mlp.down)

    def __call__(
        self, stream: Tensor, turn: Rotation | None, mask: Mask, cache: KVCache | None, layer: int, last: Tensor | None
    ) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``, or, with ``last`` (``[B]``, a query a row), to ``[B, 1, C]``."""
        batch, count, _ = stream.shape
        qkv = self._query_key_value(stream)
        if count == 1:
            heads = qkv.view(batch, -1, 1, self._head_dim)  # [B, H + 2 K, T, D]
        else:
            heads = qkv.view(batch, count, -1, self._head_dim).transpose(1, 2)
        query, key, value = heads.split((self._heads, self._kv_heads, self._kv_heads), 1)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            keys, values = cache.append(layer, key, value)
            # Without anything before these are as good; but the cache's are in order, and copied already.
            if keys.shape[2] > count or keys.dtype is key.dtype:
                key, value = keys, values
        if last is not None and count > 1:
            rows = torch.arange(batch, device=stream.device)
            query, stream = query[rows, :, last, None], stream[rows, last, None]  # [B, H, 1, D] and [B, 1, C]
            mask = _of_last(mask, last, key.shape[2])
        gathered = _attend(query, key, value, mask, self._dtype)
        return self._in_pieces(self._rest, stream, stream, gathered)

    def _query_key_value(self, stream: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, (H + 2 K) D]``."""
        if stream.shape[1] == 1:
            return self._project(stream)
        width = (self._heads + 2 * self._kv_heads) * self._head_dim
        made = stream.new_empty((*stream.shape[:2], width), dtype=self._attended)
        return self._in_pieces(self._project, made, stream)

    def _project(self, stream: Tensor) -> Tensor:
        made = self._qkv(stream if self._norm_output else self._attention_norm(stream))
        if self._query_norm is None or self._key_norm is None:
            return made
        keys = self._kv_heads * self._head_dim
        query, key, value = made.split((self._heads * self._head_dim, keys, keys), -1)
        return torch.cat((self._query_norm(query), self._key_norm(key), value), -1)

    def _in_pieces(self, function: Callable[..., Tensor], made: Tensor, *given: Tensor) -> Tensor:
        """``function`` of tensors ``[B, T, ...]``, whose rows are independent: of some at a time, into ``made``."""
        count = given[0].shape[:2].numel()
        if not self._quantized or count <= _PIECE:
            return function(*given).to(made.dtype)
        size = -(-count // -(-count // _PIECE))  # all about as large
        for place, *parts in zip(*(x.flatten(0, 1).split(size) for x in (made, *given)), strict=True):
            place.copy_(function(*parts))
        return made

    def _rest(self, stream: Tensor, gathered: Tensor) -> Tensor:
        """The stream with what attention gathered, and then with what the MLP adds; both ``[..., C]``."""
        gathered = gathered.to(stream.dtype)
        if self._norm_output:
            after = stream + self._attention_norm(self._output(gathered))
            return after + self._mlp_norm(self._down(self._hidden(stream if self._parallel else after)))
        after = self._output.added(gathered, stream)
        hidden = self._hidden(self._mlp_norm(stream if self._parallel else after))
        return self._down.added(hidden, after)

    def _hidden(self, x: Tensor) -> Tensor:
        if self._gate is None:
            return self._up.activated(x, self._activation)
        return self._gate.activated(x, self._activation) * self._up(x)


def _of_last(mask: Mask, last: Tensor, length: int) -> Mask:
    """What one query a row sees, ``[B, 1, 1, S]``, of a mask for all."""
    if isinstance(mask, Tensor):
        return mask.expand(len(last), -1, -1, -1)[torch.arange(len(last), device=last.device), :, last, None]
    if mask is None:
        return None
    seen, own = torch.arange(length, device=last.device), last[:, None, None, None]
    return (seen <= own) & (seen > own - mask) if isinstance(mask, int) else seen <= own


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dtype: torch.dtype) -> Tensor:
    """What each query gathers, ``[B, T, H D]``; arguments as of ``attend``, in types that may differ.

    ``dtype`` is the model's: where that is bfloat16, many queries are computed in it.
    """
    batch, heads, count, dim = query.shape
    if isinstance(mask, int):
        key, value, mask = in_window(query, key, value, mask)
    if count == 1 and not isinstance(mask, str | int):
        # torch's attention of one query is slow in bfloat16: copies in float32 take a third of its time. Heads that
        # share keys go as so many queries.
        found = F.scaled_dot_product_attention(
            query.reshape(batch, key.shape[1], -1, dim).float(), key.float(), value.float(), mask
        )
        return found.reshape(batch, 1, heads * dim).to(query.dtype)
    if isinstance(mask, str) and heads == key.shape[1] and dtype is torch.bfloat16 and count in _BLOCKS:
        found = causal_in_blocks(query.to(dtype), key.to(dtype), value.to(dtype))
    else:
        found = attend(query.to(key.dtype), key, value, mask)
    return found.to(query.dtype).transpose(1, 2).flatten(2)


def _beside(*linears: nn.Module) -> nn.Module:
    """Maps of the same input as one, whose output is theirs in this order."""
    first: Any = linears[0]
    if not isinstance(first, nn.Linear):
        return first.beside(linears[1:])  # a quantized one
    rows = sum(len(linear.get_parameter("weight")) for linear in linears)
    with torch.device("meta"):
        whole = nn.Linear(first.in_features, rows, bias=first.bias is not None)
    for name, _ in list(whole.named_parameters()):
        joined = torch.cat([linear.get_parameter(name).detach() for linear in linears])
        setattr(whole, name, nn.Parameter(joined, requires_grad=False))
    return whole


def _norm(norm: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    module: Any = norm
    shape, weight, eps = module.normalized_shape, module.weight.to(dtype), module.eps
    if isinstance(norm, nn.RMSNorm):
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = module.bias.to(dtype)
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _parts_norm(norm: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``core.model.PartsNorm``."""
    one, width = _norm(norm, dtype), norm.get_parameter("weight").shape
    return lambda x: one(x.unflatten(-1, (-1, *width))).flatten(-2)


class _Map:
    """A linear map as its module computes it, and what commonly follows."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self._module.forward(x)  # no module of these has hooks

    def activated(self, x: Tensor, activation: str) -> Tensor:
        made = self(x)
        return _gelu_tanh(made) if activation == "gelu_tanh" and _is_large(made) else ACTIVATIONS[activation](made)

    def added(self, x: Tensor, stream: Tensor) -> Tensor:
        """The sum of both."""
        return self(x).add_(stream)


def _is_large(x: Tensor) -> bool:
    return x.numel() >= _MANY_NUMBERS and x.dtype is torch.float32


def _gelu_tanh(x: Tensor) -> Tensor:
    """``x (1 + tanh u) / 2`` is ``x sigmoid(2 u)``: torch's tanh takes longer than all of this."""
    two = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * two).add_(two).mul_(x).sigmoid_().mul_(x)


# The activations as oneDNN names them: the operation and its variant.
_FUSED = {"gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "relu": ("relu", ""), "silu": ("swish", "")}


class _Packed(_Map):
    """The same by oneDNN, from a matrix in its own order."""

    def __init__(self, linear: nn.Linear) -> None:
        # One row is what it is packed for; it serves many as well.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 1)
        self._bias = linear.bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._sum = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight, self._bias, "none", [], "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        name, variant = _FUSED[activation]
        return self._product(x, self._weight, self._bias, name, [], variant)

    def added(self, x: Tensor, stream: Tensor) -> Tensor:
        return self._sum(x, stream, self._weight, self._bias, "add")


def _map(linear: nn.Module) -> _Map:
    """A matrix packed where this torch and CPU can, else as it is."""
    if isinstance(linear, nn.Linear) and linear.weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
            packed = _Packed(linear)
            packed(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype))
            return packed
    return _Map(linear)
