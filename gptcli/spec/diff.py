"""Two models on paper, side by side: what differs in their configurations, their categories, their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gptcli.spec.config import ModelConfig
from gptcli.spec.params import ParamCount, Tensor, count_layers, tensors


@dataclass(frozen=True)
class Change:
    """Parameters under one name in both models; 0 where a model has nothing of that name."""

    name: str
    a: int
    b: int

    @property
    def difference(self) -> int:
        return self.b - self.a

    @property
    def percent(self) -> float | None:
        """Of what the first has; None where that is nothing."""
        return 100 * self.difference / self.a if self.a else None

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "a": self.a, "b": self.b, "difference": self.difference, "percent": self.percent}


@dataclass(frozen=True)
class TensorChange:
    """A tensor that is only in one model, or in both with another shape or type; types where files say them."""

    name: str
    a: tuple[int, ...] | None
    b: tuple[int, ...] | None
    a_dtype: str | None
    b_dtype: str | None
    change: Change


def config_changes(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The axes on which two configurations differ, in the order of ``ModelConfig``."""
    ours, theirs = a.to_dict(), b.to_dict()
    return [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]


def category_changes(a: ParamCount, b: ParamCount) -> list[Change]:
    """The eight rows of the table, then what the lecture leaves out."""
    ours, theirs = ([*((row.name, row.parameters) for row in count.categories), *count.other] for count in (a, b))
    return _changes(ours, theirs)


def total_changes(a: ParamCount, b: ParamCount) -> list[Change]:
    """All parameters, as the lecture counts them and as a file stores them."""
    return [Change("Total", a.total, b.total), Change("Stored", a.total_stored, b.total_stored)]


def layer_changes(a: ModelConfig, b: ModelConfig) -> list[Change]:
    """Stop by stop in the order of the forward pass; blocks that only one has stand behind those of both."""
    ours, theirs = ([(layer.name, layer.parameters) for layer in count_layers(config)] for config in (a, b))
    order = {layer.name: (_stop(layer.name), layer.layer or 0) for c in (a, b) for layer in count_layers(c)}
    return sorted(_changes(ours, theirs), key=lambda change: order[change.name])


_ORDER = ("Embedding", "Positions", "Block", "Final norm", "Unembedding")


def _stop(name: str) -> int:
    return next(number for number, start in enumerate(_ORDER) if name.startswith(start))


def tensor_changes(
    a: ModelConfig, b: ModelConfig, a_dtypes: Mapping[str, str], b_dtypes: Mapping[str, str]
) -> list[TensorChange]:
    """The tensors that differ, by our names; ``dtypes`` are types of tensors by name, where a file says them."""
    ours, theirs = ({tensor.name: tensor for tensor in tensors(config)} for config in (a, b))
    changes = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        types = a_dtypes.get(name), b_dtypes.get(name)
        retyped = None not in types and types[0] != types[1]
        if _shape(ours.get(name)) != _shape(theirs.get(name)) or retyped:
            sizes = (models[name].parameters if name in models else 0 for models in (ours, theirs))
            change = Change(name, *sizes)
            changes.append(TensorChange(name, _shape(ours.get(name)), _shape(theirs.get(name)), *types, change))
    return changes


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.shape


def _changes(ours: Iterable[tuple[str, int]], theirs: Iterable[tuple[str, int]]) -> list[Change]:
    a, b = dict(ours), dict(theirs)
    return [Change(name, a.get(name, 0), b.get(name, 0)) for name in dict.fromkeys([*a, *b])]
