"""Memory on paper: weights in each type that they are kept in, the KV cache, and what training keeps.

Quantized are weights only, and of those what is multiplied: the matrices of the blocks and the unembedding, as
``core/quantize.py`` keeps them. int8 has a float32 scale a row; int4 a bfloat16 one for every ``GROUP`` weights of a
row, which is filled up to whole groups. Tables, biases and norms stay in bfloat16, and so does the KV cache; a tied
table is kept beside its quantized copy. float16 takes what bfloat16 takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from gptcli.errors import LimitError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.params import Tensor, grouped
from gptcli.spec.plan import Dtype, Optimizer, State

Storage = Literal["float32", "bfloat16", "int8", "int4"]
STORAGES: tuple[Storage, ...] = ("float32", "bfloat16", "int8", "int4")
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")
TRAINED: tuple[Dtype, ...] = ("float32", "bfloat16")

# Weights of a row that share an int4 scale.
GROUP = 32
_BFLOAT16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class InferenceMemory:
    """Bytes of a model that answers: ``kv_cache`` is of all sequences at their full context."""

    dtype: Storage
    weights: int
    kv_cache_per_token: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache

    def to_dict(self) -> dict[str, Any]:
        """For JSON output; units stand in the names."""
        return {
            "dtype": self.dtype,
            "weights_bytes": self.weights,
            "kv_cache_bytes_per_token": self.kv_cache_per_token,
            "kv_cache_bytes": self.kv_cache,
            "total_bytes": self.total,
        }


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training keeps on one device whatever it is fed; activations come on top (``spec/plan.py``).

    Weights, gradients and optimizer state are float32 in every ``dtype``; ``copies`` are autocast's.
    """

    optimizer_name: Optimizer
    dtype: Dtype
    weights: int
    gradients: int
    optimizer: int
    copies: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies

    def to_dict(self) -> dict[str, Any]:
        """For JSON output; units stand in the names."""
        sizes = {name: size for name, size in asdict(self).items() if name not in ("optimizer_name", "dtype")}
        return {
            "optimizer": self.optimizer_name,
            "dtype": self.dtype,
            **{f"{name}_bytes": size for name, size in sizes.items()},
            "total_bytes": self.total,
        }


def inference_memory(config: ModelConfig, dtype: Storage, context: int, sequences: int = 1) -> InferenceMemory:
    """What a model takes to answer ``sequences`` texts of ``context`` tokens at once."""
    each = kv_bytes_per_token(config, dtype)
    weights = sum(count * tensor_bytes(tensor, tensor.shape, dtype) for tensor, count in held(config, dtype).items())
    return InferenceMemory(dtype, weights, each, each * context * sequences)


def training_memory(config: ModelConfig, optimizer: Optimizer, dtype: Dtype) -> TrainingMemory:
    """What ``gptcli train`` keeps on one device, whatever it is fed."""
    state = State.of(config, 1, "none", optimizer, dtype)
    return TrainingMemory(optimizer, dtype, state.weights, state.gradients, state.optimizer, state.gathered)


def kv_bytes_per_token(config: ModelConfig, dtype: Storage) -> int:
    """Keys and values of one token in all layers: ``2 L K D`` numbers, as ``core/cache.py`` keeps them."""
    return 2 * config.layers * config.kv_heads * config.head_dim * number_bytes(dtype)


def number_bytes(dtype: Storage) -> int:
    """Of a number that is not a quantized weight."""
    return _FLOAT32 if dtype == "float32" else _BFLOAT16


def held(config: ModelConfig, dtype: Storage) -> Counter[Tensor]:
    """The tensors that are kept, and how often each is: beside a tied table stands what multiplies, if quantized."""
    every = grouped(config)
    if config.tied and is_quantized(dtype):
        every[Tensor("unembedding.weight", (config.vocab_size, config.width), "Unembedding")] += 1
    return every


def is_quantized(dtype: Storage) -> bool:
    return dtype in ("int8", "int4")


def tensor_bytes(tensor: Tensor, shape: Iterable[int], dtype: Storage) -> int:
    """Bytes of a tensor, or of a part of it, of this ``shape`` (``[out, in]`` or ``[out]``)."""
    rows, *rest = shape
    columns = rest[0] if rest else 1
    multiplied = tensor.is_block_matrix or tensor.category == "Unembedding"
    if not (multiplied and is_quantized(dtype)):
        return rows * columns * number_bytes(dtype)
    if dtype == "int8":
        return rows * (columns + _FLOAT32)
    return rows * -(-columns // GROUP) * (GROUP // 2 + _BFLOAT16)


def check_use(config: ModelConfig, context: int | None, sequences: int) -> int:
    """The context that is asked for: None is the model's own.

    Raises UsageError for counts below 1, LimitError for more tokens than the model has positions.
    """
    for name, count in (("a context", context), ("a number of sequences", sequences)):
        if count is not None and count < 1:
            raise UsageError(f"{name} of {count} means nothing", "give a number of at least 1")
    if context is not None and context > config.context and config.position == "learned":
        raise LimitError(f"the model has {config.context:,} positions, not {context:,}", "ask for a shorter context")
    return config.context if context is None else context
