"""Every parameter of a model on paper: which tensors it has, and what the lecture's closing table says of them.

``tensors(config)`` is the one list that the model, the file layout and the report agree on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from gptcli.spec.config import ModelConfig

# The lecture's eight rows, in its order, then what it leaves out.
CATEGORIES = (
    "Embedding",
    "Key",
    "Query",
    "Value",
    "Output",
    "Up-projection",
    "Down-projection",
    "Unembedding",
)
OTHER = ("Positions", "Biases", "Norms")


@dataclass(frozen=True)
class Tensor:
    """One parameter tensor: our name, its shape as torch keeps it (``[out, in]``), where it counts."""

    name: str
    shape: tuple[int, ...]
    category: str
    layer: int | None = None

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def is_block_matrix(self) -> bool:
        return self.layer is not None and len(self.shape) > 1


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every stored tensor of the model, in the order of the forward pass; a tied unembedding is not stored."""
    width, vocab = config.width, config.vocab_size
    yield Tensor("embedding.weight", (vocab, width), "Embedding")
    if config.position == "learned":
        yield Tensor("positions.weight", (config.context + config.position_offset, width), "Positions")
    for layer in range(config.layers):
        yield from _block(config, layer)
    if config.norm_first:
        yield from _norm(config, "norm", None)
    if not config.tied:
        yield Tensor("unembedding.weight", (vocab, width), "Unembedding")


def _block(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    block = f"blocks.{layer}"
    width, queries, keys = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    yield from _norm(config, f"{block}.attention_norm", layer)
    yield from _linear(f"{block}.attention.query", queries, width, "Query", layer, config.qkv_bias)
    yield from _linear(f"{block}.attention.key", keys, width, "Key", layer, config.qkv_bias)
    yield from _linear(f"{block}.attention.value", keys, width, "Value", layer, config.qkv_bias)
    if config.qk_norm != "none":
        normed = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (queries, keys)
        for name, size in zip(("query_norm", "key_norm"), normed, strict=True):
            yield Tensor(f"{block}.attention.{name}.weight", (size,), "Norms", layer)
    yield from _linear(f"{block}.attention.output", width, queries, "Output", layer, config.output_bias)
    yield from _norm(config, f"{block}.mlp_norm", layer)
    if config.gated:
        yield from _linear(f"{block}.mlp.gate", config.mlp_width, width, "Up-projection", layer, config.mlp_bias)
    yield from _linear(f"{block}.mlp.up", config.mlp_width, width, "Up-projection", layer, config.mlp_bias)
    yield from _linear(f"{block}.mlp.down", width, config.mlp_width, "Down-projection", layer, config.mlp_bias)


def _linear(name: str, out: int, into: int, category: str, layer: int, bias: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, into), category, layer)
    if bias:
        yield Tensor(f"{name}.bias", (out,), "Biases", layer)


def _norm(config: ModelConfig, name: str, layer: int | None) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (config.width,), "Norms", layer)
    if config.norm == "layernorm":
        yield Tensor(f"{name}.bias", (config.width,), "Norms", layer)


def grouped(config: ModelConfig) -> Counter[Tensor]:
    """The tensors of a model and how often each is there: those of the first layer stand for all layers (all alike)."""
    return Counter({t: 1 if t.layer is None else config.layers for t in tensors(replace(config, layers=1))})


@dataclass(frozen=True)
class Category:
    """One row of the table: so many matrices of one shape (rows, columns), as the lecture draws them."""

    name: str
    matrices: int
    shape: tuple[int, int]
    parameters: int
    tied: bool = False


@dataclass(frozen=True)
class ParamCount:
    """The parameter report of one model.

    ``total`` counts a tied unembedding as its own matrix, as the lecture does; ``total_stored`` is what a file holds.
    """

    config: ModelConfig
    categories: tuple[Category, ...]
    other: tuple[tuple[str, int], ...]

    @property
    def matrices(self) -> int:
        return sum(row.matrices for row in self.categories)

    @property
    def matrix_parameters(self) -> int:
        return sum(row.parameters for row in self.categories)

    @property
    def total(self) -> int:
        return self.matrix_parameters + sum(count for _, count in self.other)

    @property
    def total_stored(self) -> int:
        return self.total - sum(row.parameters for row in self.categories if row.tied)


def count_params(config: ModelConfig) -> ParamCount:
    """Count every matrix and every parameter of a configuration.

    Key, Query and Value count one matrix a head and Output one a layer; a SwiGLU gate counts under Up-projection.
    Shapes are (rows, columns) of a matrix that multiplies a column vector, as in the lecture.
    """
    stored: dict[str, int] = dict.fromkeys(CATEGORIES + OTHER, 0)
    for tensor in tensors(config):
        stored[tensor.category] += tensor.parameters
    width, head, vocab = config.width, config.head_dim, config.vocab_size
    ups = 2 if config.gated else 1
    shapes: dict[str, tuple[int, tuple[int, int]]] = {
        "Embedding": (1, (width, vocab)),
        "Key": (config.kv_heads * config.layers, (head, width)),
        "Query": (config.heads * config.layers, (head, width)),
        "Value": (config.kv_heads * config.layers, (head, width)),
        "Output": (config.layers, (width, config.heads * head)),
        "Up-projection": (ups * config.layers, (config.mlp_width, width)),
        "Down-projection": (config.layers, (width, config.mlp_width)),
        "Unembedding": (1, (vocab, width)),
    }
    rows = []
    for name, (matrices, shape) in shapes.items():
        tied = name == "Unembedding" and config.tied
        parameters = stored["Embedding"] if tied else stored[name]
        rows.append(Category(name, matrices, shape, parameters, tied))
    return ParamCount(config, tuple(rows), tuple((name, stored[name]) for name in OTHER))


@dataclass(frozen=True)
class Layer:
    """One stop on the way through the model: a table, a block, the final norm, the unembedding.

    ``attention`` and ``mlp`` are matrices; ``biases`` are those of both. A table has neither: its ``parameters`` alone.
    """

    name: str
    layer: int | None
    attention: int
    mlp: int
    norms: int
    biases: int
    parameters: int
    tied: bool = False


_COLUMNS = {
    **dict.fromkeys(("Key", "Query", "Value", "Output"), "attention"),
    **dict.fromkeys(("Up-projection", "Down-projection"), "mlp"),
    "Norms": "norms",
    "Biases": "biases",
}


def count_layers(config: ModelConfig) -> tuple[Layer, ...]:
    """The parameters stop by stop, in the order of the forward pass.

    Sums to ``ParamCount.total``: a tied unembedding stands here once more, as in the lecture's table.
    """
    stops: dict[str, Layer] = {}
    for tensor in tensors(config):
        name = f"Block {tensor.layer}" if tensor.layer is not None else _STOPS[tensor.category]
        stop = stops.get(name) or Layer(name, tensor.layer, 0, 0, 0, 0, 0)
        column = _COLUMNS.get(tensor.category)
        more = {column: getattr(stop, column) + tensor.parameters} if column else {}
        stops[name] = replace(stop, parameters=stop.parameters + tensor.parameters, **more)
    if config.tied:
        table = config.vocab_size * config.width
        stops["Unembedding"] = Layer("Unembedding", None, 0, 0, 0, 0, table, tied=True)
    return tuple(stops.values())


_STOPS = {
    "Embedding": "Embedding",
    "Positions": "Positions",
    "Norms": "Final norm",
    "Unembedding": "Unembedding",
}
