"""Texts as vectors, words as rows of the embedding table, and the geometry of both: cosines, directions, components.

Shapes as in ``core/model.py``; N is texts or words. Vectors are float32 on the host, whatever the model is in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.decode import padded
from gptcli.core.generate import check_finite
from gptcli.core.model import matrix_of
from gptcli.errors import CorruptError, LimitError, UsageError

Pool = Literal["last", "mean", "none"]
Table = Literal["embedding", "unembedding"]

# Padded tokens that go through the model together; fewer with a tap, for which each layer makes its pattern,
# [B, H, T, T] in float32.
_AT_ONCE = 8192
_AT_ONCE_TAPPED = 2048
# Texts that are sorted by length and batched before the first of them is handed out.
_WINDOW = 512
# Rows of the table that are made float32 at a time.
_ROWS = 16384


@dataclass(frozen=True)
class Vector:
    """A text and what it became: ``values`` is ``[C]``, or with pool ``none`` ``[T, C]``, one row a token."""

    ids: tuple[int, ...]
    values: Tensor

    def numbers(self) -> list[float]:
        """``[C]`` as numbers."""
        return self.values.tolist()

    @property
    def norm(self) -> float:
        """Its length (Euclid's)."""
        return self.values.double().norm().item()

    def tokens(self) -> list[Vector]:
        """One vector a token; a vector of a whole text is its own only one."""
        if self.values.dim() == 1:
            return [self]
        return [Vector((id_,), row) for id_, row in zip(self.ids, self.values, strict=True)]


@dataclass(frozen=True)
class Near:
    """A token, and the cosine of the angle between its row and what was asked for."""

    id: int
    cosine: float


@dataclass(frozen=True)
class Along:
    """A token, how far its row reaches along a direction (in the table's units), and the cosine with it."""

    id: int
    projection: float
    cosine: float


@dataclass(frozen=True)
class Components:
    """Vectors in the plane of their two principal components: ``points`` are N pairs, ``explained`` the two shares of
    the variance.
    """

    points: tuple[tuple[float, float], ...]
    explained: tuple[float, float]


# --- Texts


def resolve_layer(layer: int, layers: int) -> int:
    """A layer counted from 0 (the embedding) to L (the end), where -1 is L; raises UsageError beyond."""
    if not -layers - 1 <= layer <= layers:
        raise UsageError(
            f"--layer {layer} is out of range", f"the model has 0 (the embedding) to {layers}, or -1 for the last"
        )
    return layer % (layers + 1)


def text_vectors(
    model: Model, texts: Sequence[Sequence[int]], *, pool: Pool = "last", layer: int = -1, normalize: bool = False
) -> Iterator[Vector]:
    """The vector of each text, in order; many go through the model together, padded on the right.

    Args:
        texts: token ids, none empty, as ``prompt_ids`` makes them.
        pool: ``last`` takes the last token's vector, which alone has seen the whole text; ``mean`` the mean over the
            text's tokens (without the start token, which is none of its own); ``none`` keeps one vector a token.
        layer: 0 is the stream before the first block (embedding plus positions), N the stream after block N, and L
            (or -1) what the unembedding reads: after the last block and the final norm. The numbering, and that only
            the last is normed, is that of ``hidden_states`` in transformers.
        normalize: scale every vector to length 1.

    Raises LimitError for a text longer than the context, UsageError for a layer or an id that is not there,
    CorruptError for weights whose vectors are not finite.
    """
    layer = resolve_layer(layer, model.config.layers)
    for number, ids in enumerate(texts, 1):
        _check(model, ids, number)
    start = model.tokenizer.start_id
    most = _AT_ONCE if layer == model.config.layers else _AT_ONCE_TAPPED
    for first in range(0, len(texts), _WINDOW):
        window = texts[first : first + _WINDOW]
        done: dict[int, Tensor] = {}
        for places in _batches([len(ids) for ids in window], most):
            streams = _streams(model, [window[place] for place in places], layer)
            for place, stream in zip(places, streams, strict=True):
                skip = int(start is not None and window[place][0] == start and len(window[place]) > 1)
                done[place] = _pooled(stream, pool, skip)
        for place, ids in enumerate(window):
            values = done.pop(place)
            check_finite(model, values, "vectors")
            yield Vector(tuple(ids), _unit(values) if normalize else values)


def one_text_vector(model: Model, ids: Sequence[int], *, pool: Pool = "last", layer: int = -1) -> Tensor:
    """The slow twin of ``text_vectors``: one text alone, every layer's stream kept."""
    seen: dict[str, Tensor] = {}
    batch = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        stream = model.transformer.residual_stream(batch, tap=seen.__setitem__)
        streams = [
            seen.get("positions", seen["embedding"]),
            *(seen[f"blocks.{layer}"] for layer in range(model.config.layers - 1)),
            model.transformer.norm(stream),
        ]
    skip = int(model.tokenizer.start_id == ids[0] and len(ids) > 1)
    return _pooled(streams[layer][0].float().cpu(), pool, skip)


def _check(model: Model, ids: Sequence[int], number: int) -> None:
    context, vocabulary = model.config.context, model.config.vocab_size
    if len(ids) > context:
        raise LimitError(
            f"text {number} is {len(ids):,} tokens, and the context of {model.name} is {context:,}",
            f"shorten it, for instance with gptcli tokenize --truncate {context}",
        )
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise UsageError(
            f"text {number} has a token outside the vocabulary of {vocabulary:,}",
            "the tokenizer does not belong to this model",
        )


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Places of texts to go together: of similar length, so that there is little padding, ``most`` padded tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        rows = max(1, most // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


class _ReachedError(Exception):
    """The layer that was wanted is there; those above it need not be computed."""


@torch.inference_mode()
def _streams(model: Model, rows: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """The vectors ``[T, C]`` of each row at a layer. Padding stands behind every real token, so none sees it."""
    batch = torch.tensor(padded(rows), device=model.device)
    transformer = model.transformer
    if layer == model.config.layers:
        stream = transformer.norm(transformer.residual_stream(batch))
    else:
        name = f"blocks.{layer - 1}" if layer else "embedding" if transformer.positions is None else "positions"
        stream = _tapped(model, batch, name)
    stream = stream.float().cpu()  # [B, T, C]
    return [stream[place, : len(row)] for place, row in enumerate(rows)]


def _tapped(model: Model, batch: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []

    def keep(step: str, value: Tensor) -> None:
        if step == name:
            found.append(value)
            raise _ReachedError

    try:
        model.transformer.residual_stream(batch, tap=keep)
    except _ReachedError:
        return found[0]
    raise KeyError(name)


def _pooled(stream: Tensor, pool: Pool, skip: int) -> Tensor:
    """``[T, C]`` to ``[C]``, or as it is; the mean leaves out the first ``skip`` tokens."""
    if pool == "none":
        return stream.clone()  # not a view that keeps the whole batch
    return stream[-1].clone() if pool == "last" else stream[skip:].mean(0)


def _unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


# --- The table


class Rows:
    """The rows of an embedding table that stand for tokens: ``[V, C]``, left where and as they are.

    A padded vocabulary has more rows than the tokenizer has tokens; those at the end are left out. Raises CorruptError
    for values that are not finite.
    """

    def __init__(self, model: Model, table: Table = "embedding") -> None:
        weight = (
            model.transformer.embedding.weight if table == "embedding" else matrix_of(model.transformer.unembedding)
        )
        self.weight: Tensor = weight[: min(model.config.vocab_size, model.tokenizer.vocab_size)]
        if not bool(torch.isfinite(self.weight).all()):
            raise CorruptError(f"the {table} of {model.name} is not finite", "its weights are damaged: get them again")
        self.name = model.name

    def row(self, id_: int) -> Tensor:
        """One row ``[C]``; raises UsageError for an id that the table does not have."""
        if not 0 <= id_ < len(self.weight):
            raise UsageError(f"there is no token {id_}", f"{self.name} has tokens 0 to {len(self.weight) - 1:,}")
        return self.weight[id_].float().cpu()

    def vectors(self, ids: Sequence[int], *, normalize: bool = False) -> list[Vector]:
        """The rows of some tokens."""
        return [Vector((id_,), _unit(self.row(id_)) if normalize else self.row(id_)) for id_ in ids]

    def combination(self, weights: Mapping[int, float]) -> Tensor:
        """The weighted sum ``[C]`` of some rows, in float64. Raises UsageError when nothing is left of it."""
        parts = [weight * self.row(id_).double() for id_, weight in weights.items()]
        total = torch.stack(parts).sum(0)
        if total.norm() <= 1e-6 * max(part.norm() for part in parts):
            raise UsageError("the words cancel out: nothing is left that has a direction", "use different words")
        return total

    def nearest(self, vector: Tensor, count: int, *, exclude: Collection[int] = ()) -> list[Near]:
        """The ``count`` tokens whose rows have the largest cosine with ``vector`` ``[C]``, best first."""
        cosines = self._cosines(vector)
        order = _order(cosines, exclude)[:count].tolist()
        return [Near(id_, cosines[id_].item()) for id_ in order]

    def project(self, direction: Tensor, ids: Sequence[int]) -> list[Along]:
        """Some tokens' rows along a direction ``[C]``, in the order given."""
        unit = direction.double() / direction.double().norm()
        found = []
        for id_ in ids:
            row = self.row(id_).double()
            projection = (row @ unit).item()
            norm = row.norm().item()
            found.append(Along(id_, projection, projection / norm if norm else 0.0))
        return found

    def ends(self, direction: Tensor, count: int, *, exclude: Collection[int] = ()) -> list[Along]:
        """Of all tokens the ``count`` that point most along a direction and the ``count`` most against it, by cosine,
        most first.

        Not by projection: rows that training hardly touched (rare pieces, single bytes) are long, and all lean the same
        way.
        """
        order = _order(self._cosines(direction), exclude).tolist()
        ids = order if len(order) <= 2 * count else order[:count] + order[len(order) - count :]
        return self.project(direction, ids)

    def _cosines(self, direction: Tensor) -> Tensor:
        """Each row's cosine ``[V]`` with a direction; of a row of zeros 0. In float32, a chunk of rows at a time."""
        unit = (direction.double() / direction.double().norm()).float().to(self.weight.device)
        found = []
        for start in range(0, len(self.weight), _ROWS):
            chunk = self.weight[start : start + _ROWS].float()
            found.append(chunk @ unit / chunk.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny))
        return torch.cat(found).cpu()


def _order(values: Tensor, exclude: Collection[int]) -> Tensor:
    """Places from the largest value to the least, without some."""
    order = values.argsort(descending=True, stable=True)
    if not exclude:
        return order
    return order[~torch.isin(order, torch.tensor(sorted(exclude)))]


# --- Several vectors


def cosines(vectors: Sequence[Vector]) -> list[list[float]]:
    """The cosine of each vector ``[C]`` with each: N lists of N, computed in float64; 1 on the diagonal."""
    unit = _unit(torch.stack([vector.values for vector in vectors]).double())
    return (unit @ unit.T).clamp(-1, 1).tolist()


def principal_components(vectors: Sequence[Vector]) -> Components:
    """N vectors ``[C]`` as points in the plane in which they differ most.

    A component's sign is not determined; here its largest entry is positive, so that the same vectors give the same
    picture. Source: Pearson 1901, by the singular values of the centred matrix. Raises UsageError for fewer than two
    different vectors.
    """
    matrix = torch.stack([vector.values for vector in vectors]).double()
    centred = matrix - matrix.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    variance = values.square()
    if len(vectors) < 2 or values[0] <= 1e-9 * matrix.norm():
        raise UsageError("a plot needs at least two different vectors", "give more texts")
    if len(axes) == 1:  # vectors of a single number
        axes, variance = torch.cat([axes, torch.zeros_like(axes)]), torch.cat([variance, variance.new_zeros(1)])
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    points = centred @ (axes * torch.where(largest < 0, -1.0, 1.0)).T  # [N, 2]
    shares = (variance[:2] / variance.sum()).tolist()
    return Components(tuple((x, y) for x, y in points.tolist()), (shares[0], shares[1]))
