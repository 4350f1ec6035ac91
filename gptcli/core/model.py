"""The transformer, as the lecture draws it: embedding, then blocks of attention and MLP, then unembedding.

Each block adds to the residual stream, never replaces it: attention lets every vector gather from the ones before it,
the MLP then works on each vector alone.

Shapes, here and everywhere in ``core`` and ``train``:

    B  batch            T  query tokens         S  cached + query tokens     C  width of the residual stream
    H  heads            K  key-value heads      D  head dimension            F  MLP width
    V  vocabulary       L  layers

Sources: Radford et al. 2019 (GPT-2), Vaswani et al. 2017 (attention); the lecture is 3Blue1Brown's on GPTs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.core.attention import attend, attention_pattern
from gptcli.core.cache import KVCache, Mask, masks_of_layers, whole_sequence
from gptcli.core.rope import Rotation, rotate, rotation
from gptcli.spec.config import ModelConfig

# tap(name, value) is called with every named step of the data flow; None costs nothing.
Tap = Callable[[str, Tensor], None]


class Linear(nn.Linear):
    """A matrix that is filled from outside: torch's own initial values would cost time and be thrown away."""

    def reset_parameters(self) -> None:
        """Leave them unset."""


class Embedding(nn.Embedding):
    """A table that is filled from outside, as ``Linear``."""

    def reset_parameters(self) -> None:
        """Leave them unset."""


class Transformer(nn.Module):
    """A decoder-only transformer over token ids; parameters are named as ``spec.params.tensors`` lists them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        places = config.context + config.position_offset
        self.positions = Embedding(places, config.width) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config)
        self.unembedding = Linear(config.width, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the unembedding the embedding's own matrix again, where the configuration says so.

        One that was replaced by something of its own (a quantized matrix) stays.
        """
        if self.config.tied and isinstance(self.unembedding, nn.Linear):
            self.unembedding.weight = self.embedding.weight

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, *, last: Tensor | None = None, tap: Tap | None = None
    ) -> Tensor:
        """Logits of the next token after each query token.

        Args:
            ids: ``[B, T]`` int64 token ids; with a cache they follow what it holds, and are added to it.
            cache: keys and values of earlier tokens, owned and kept by the caller; None sees only ``ids``.
            last: ``[B]`` int64, the one query per row whose logits are wanted; None wants all.
            tap: called with the name and value of every step, for the view inside.

        Returns:
            ``[B, T, V]``, or ``[B, V]`` with ``last``, in the weights' dtype.

        Raises:
            LimitError: from the cache, when the tokens do not fit; the configured context is the caller's to check.
        """
        stream = self.residual_stream(ids, cache, tap)
        if last is not None:
            stream = stream[torch.arange(len(stream), device=stream.device), last]  # [B, C]
        stream = self.norm(stream)
        logits: Tensor = self.unembedding(stream)
        if tap:
            tap("norm", stream)
            tap("logits", logits)
        return logits

    def residual_stream(
        self, ids: Tensor, cache: KVCache | None = None, tap: Tap | None = None, *, documents: Tensor | None = None
    ) -> Tensor:
        """The vectors ``[B, T, C]`` that leave the last block, before the final norm; arguments as in ``forward``.

        ``documents``, ``[B, T]``, numbers the document of each id where several are packed in a row and none is to see
        another; without a cache only.
        """
        c = self.config
        positions, mask = whole_sequence(ids, documents) if cache is None else cache.begin(ids)
        masks = masks_of_layers(mask, positions, c)
        stream = self.embedding(ids)
        if tap:
            tap("embedding", stream)
        if self.positions is not None:
            stream = stream + self.positions(positions + c.position_offset if c.position_offset else positions)
            if tap:
                tap("positions", stream)
            turn = None
        else:
            turn = rotation(positions, c.rope_dim or c.head_dim, c.rope_theta, stream.dtype, c.rope_scaling)
        for layer, block in enumerate(self.blocks):
            turned = None if layer in c.unrotated else turn
            stream = block(stream, turned, masks[layer], cache, layer, tap)
        if cache is not None:
            cache.advance(ids.shape[1])
        return stream

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype) -> KVCache:
        """An empty cache with room for ``capacity`` tokens in each row."""
        return KVCache(self.config, rows, capacity, device=self.embedding.weight.device, dtype=dtype)


class Block(nn.Module):
    """One layer: the stream plus what attention gathers, plus what the MLP makes of it.

    The MLP reads the stream after attention, or, where both are parallel, as attention does. Each part has a norm, of
    what it reads or of what it made.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel, self.norm_output = config.parallel, config.norm_output
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self, stream: Tensor, turn: Rotation | None, mask: Mask, cache: KVCache | None, layer: int, tap: Tap | None
    ) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        gathered = self._normed(self.attention_norm, self.attention, stream, turn, mask, cache, layer, tap)
        if tap:
            tap(f"blocks.{layer}.attention", gathered)
        after = stream + gathered
        made = self._normed(self.mlp_norm, self.mlp, stream if self.parallel else after, layer, tap)
        stream = after + made
        if tap:
            tap(f"blocks.{layer}.mlp", made)
            tap(f"blocks.{layer}", stream)
        return stream

    def _normed(self, norm: nn.Module, part: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        # In training the stream is float32, and what a matrix made of it is not.
        made: Tensor = norm(part(x, *rest).to(x.dtype)) if self.norm_output else part(norm(x), *rest)
        return made


class Attention(nn.Module):
    """Every token asks a question (query), finds the earlier tokens that answer it (key), and takes their values.

    Heads are inferred from the matrices, so the same forward runs on all of them or on a shard.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(config.width, queries, bias=config.qkv_bias)
        self.key = Linear(config.width, keys, bias=config.qkv_bias)
        self.value = Linear(config.width, keys, bias=config.qkv_bias)
        self.output = Linear(queries, config.width, bias=config.output_bias)
        # Widths of what is normed as one: each head, or all of them.
        widths = {"none": (0, 0), "head": (config.head_dim, config.head_dim), "whole": (queries, keys)}[config.qk_norm]
        self.query_norm, self.key_norm = (PartsNorm(width, eps=config.norm_eps) if width else None for width in widths)

    def forward(
        self, x: Tensor, turn: Rotation | None, mask: Mask, cache: KVCache | None, layer: int, tap: Tap | None
    ) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``: what each token gathers from itself and those before it."""
        query, key, value = self.query(x), self.key(x), self.value(x)  # [B, T, H D], and [B, T, K D] twice
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.append(layer, key, value)  # [B, K, S, D]
        gathered = self.output(attend(query, key, value, mask).transpose(1, 2).flatten(2))  # [B, T, C]
        if tap:
            tap(f"blocks.{layer}.query", query)
            tap(f"blocks.{layer}.key", key)
            tap(f"blocks.{layer}.value", value)
            tap(f"blocks.{layer}.pattern", attention_pattern(query, key, mask))
        return gathered

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, H, T, D]


class MLP(nn.Module):
    """Up into F directions, through the activation (beside a gate, or not), and down again; each vector alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(config.width, config.mlp_width, bias=config.mlp_bias) if config.gated else None
        self.up = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor, layer: int, tap: Tap | None) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        if self.gate is None:
            hidden = self.activation(self.up(x))  # [B, T, F]
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        made: Tensor = self.down(hidden)
        if tap:
            tap(f"blocks.{layer}.hidden", hidden)
        return made


class PartsNorm(nn.RMSNorm):
    """An RMS norm of each so many numbers on their own: of every head beside the others, or of all as one."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., N]``, N a multiple of the norm's width, to the same."""
        x = x.to(self.weight.dtype)  # which in training is more exact than what a matrix made
        return super().forward(x.unflatten(-1, (-1, *self.normalized_shape))).flatten(-2)


def matrix_of(linear: nn.Module) -> Tensor:
    """The matrix ``[out, in]`` of a linear map, also of one that keeps it in another form."""
    in_few_bits: Callable[[], Tensor] | None = getattr(linear, "dequantized", None)
    return linear.get_parameter("weight") if in_few_bits is None else in_few_bits()


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of a configuration, over the last axis."""
    kinds = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
    return kinds[config.norm](config.width, eps=config.norm_eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
