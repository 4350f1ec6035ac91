"""Tensor parallelism on paper: which slice of each tensor each of some ranks holds.

Query, key, value, gate and up hold some of their outputs, output and down the inputs that come of them; so a rank
computes its own heads and its own part of the MLP from beginning to end, and the ranks add up twice a block (Shoeybi et
al. 2019, "Megatron-LM", section 3). The tables are dealt out by tokens. Norms and positions are small, and everywhere.

Loading, the plan before it and the report all read the one table here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from gptcli.errors import UnsupportedError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.params import Tensor, tensors

# What is dealt out: heads with their D numbers each, the MLP's F, or tokens. ``first``: rank 0 alone has it, since what
# is added up over the ranks is to have it once.
By = Literal["heads", "kv_heads", "hidden", "vocabulary", "first", "whole"]

# Our tensor names, by what they are dealt out and along which dimension; what stands nowhere here is whole everywhere.
TABLE: tuple[tuple[str, By, int], ...] = (
    ("embedding.weight", "vocabulary", 0),
    ("blocks.*.attention.query.*", "heads", 0),
    ("blocks.*.attention.key.*", "kv_heads", 0),
    ("blocks.*.attention.value.*", "kv_heads", 0),
    ("blocks.*.attention.query_norm.weight", "heads", 0),
    ("blocks.*.attention.key_norm.weight", "kv_heads", 0),
    ("blocks.*.attention.output.weight", "heads", 1),
    ("blocks.*.attention.output.bias", "first", 0),
    ("blocks.*.mlp.gate.*", "hidden", 0),
    ("blocks.*.mlp.up.*", "hidden", 0),
    ("blocks.*.mlp.down.weight", "hidden", 1),
    ("blocks.*.mlp.down.bias", "first", 0),
    ("unembedding.weight", "vocabulary", 0),
)


@dataclass(frozen=True)
class Slice:
    """``[start, stop)`` of a tensor along ``dim``; all of it where ``dim`` is None, nothing where both are the same."""

    by: By
    dim: int | None = None
    start: int = 0
    stop: int = 0

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """What is left of a shape."""
        if self.dim is None:
            return whole
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])

    @property
    def empty(self) -> bool:
        return self.dim is not None and self.start == self.stop


WHOLE = Slice("whole")


@dataclass(frozen=True)
class Share:
    """What one of ``ranks`` holds of a model. Raises as ``check_split``."""

    config: ModelConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        check_split(self.config, self.ranks)

    def slice(self, name: str) -> Slice:
        """This rank's slice of the tensor of that name."""
        by, dim = next(((by, dim) for pattern, by, dim in TABLE if fnmatchcase(name, pattern)), ("whole", 0))
        each_head = self.config.qk_norm == "head" and "_norm." in name  # whose norm is one for all heads
        if by == "whole" or self.ranks == 1 or each_head:
            return WHOLE
        if by == "first":
            return WHOLE if self.rank == 0 else Slice("first", 0, 0, 0)
        return Slice(by, dim, *self.span(by))

    def span(self, by: By) -> tuple[int, int]:
        """From where to where this rank has rows of what is dealt out; neighbours differ by one where it is uneven.

        Where there are fewer key-value heads than ranks, each is held by as many ranks as its queries are on.
        """
        config = self.config
        if by == "kv_heads" and config.kv_heads < self.ranks:
            first = self.rank * config.kv_heads // self.ranks
            return first * config.head_dim, (first + 1) * config.head_dim
        counts = {
            "heads": (config.heads, config.head_dim),
            "kv_heads": (config.kv_heads, config.head_dim),
            "hidden": (config.mlp_width, 1),
            "vocabulary": (config.vocab_size, 1),
        }
        count, size = counts[by]
        start, stop = (rank * count // self.ranks for rank in (self.rank, self.rank + 1))
        return start * size, stop * size

    @property
    def part(self) -> ModelConfig:
        """The configuration of what this rank computes: its own heads and its own width of the MLP.

        The vocabulary stays whole, since whoever asks for logits gets those of all tokens.
        """
        config = self.config
        start, stop = self.span("hidden")
        heads, kv_heads = config.heads // self.ranks, max(1, config.kv_heads // self.ranks)
        return replace(config, heads=heads, kv_heads=kv_heads, mlp_width=stop - start)

    def tensors(self) -> list[tuple[Tensor, Slice]]:
        """The model's tensors, whole, with this rank's slice of each; those it has nothing of are left out."""
        every = ((tensor, self.slice(tensor.name)) for tensor in tensors(self.config))
        return [(tensor, slice_) for tensor, slice_ in every if not slice_.empty]

    @property
    def parameters(self) -> int:
        """How many numbers this rank holds."""
        return sum(prod(slice_.shape(tensor.shape)) for tensor, slice_ in self.tensors())


def check_split(config: ModelConfig, ranks: int) -> None:
    """Raise UsageError where a model can't be dealt out to so many ranks, and UnsupportedError where no model like it.

    Query heads go out evenly; key-value heads too, or each of them to as many ranks.
    """
    if not config.norm_first:
        raise UnsupportedError(f"the family {config.family} is here for counting only", "use a GPT-2 model")
    if ranks == 1:
        return
    heads, kv_heads = config.heads, config.kv_heads
    if ranks < 1 or heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        even = ", ".join(map(str, split_sizes(config)))
        what = f"{heads} heads" + (f" and {kv_heads} key-value heads" if kv_heads != heads else "")
        raise UsageError(f"{what} can't be dealt out evenly to {ranks} ranks", f"use --tp with one of {even}")
    if min(config.vocab_size, config.mlp_width) < ranks:
        raise UsageError(f"the model is too small for {ranks} ranks", "use fewer")


def split_sizes(config: ModelConfig, most: int = 64) -> list[int]:
    """Over how many ranks a model can be dealt out, up to ``most``."""
    heads, kv_heads = config.heads, config.kv_heads
    sizes = (n for n in range(1, min(heads, most) + 1) if heads % n == 0)
    return [n for n in sizes if kv_heads % n == 0 or n % kv_heads == 0]
