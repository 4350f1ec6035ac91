"""One prediction as data: every step from the text's tokens to the next one, named, measured and summed up.

``trace`` runs the model once with a tap, so what it tells is what the model computes, not a second implementation of
it. Stages are in the order of the computation, and named as the taps of ``core/model.py`` are, with ``tokens`` before
them, and ``probabilities`` and ``draw`` behind. Symbols are the letters of the legend there; B is 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.distribution import Distribution
from gptcli.core.generate import check_finite, check_prompt
from gptcli.core.model import Transformer, matrix_of
from gptcli.core.predict import distribution, probabilities
from gptcli.core.sampling import sample
from gptcli.core.settings import Sampling
from gptcli.errors import UsageError

_BLOCK = re.compile(r"blocks\.(\d+)(?:\.(\w+))?")
_SYMBOLS = {
    **dict.fromkeys(("embedding", "positions", "norm", "attention", "mlp", "block"), "B T C"),
    **{"tokens": "B T", "query": "B H T D", "key": "B K S D", "value": "B K S D", "pattern": "B H T S"},
    **{"hidden": "B T F", "logits": "B T V", "probabilities": "B V", "draw": "B"},
}
# Numbers of a vector that are shown as they are; tokens that a head looks at; neurons.
_FIRST, _LOOKED_AT, _NEURONS = 8, 3, 5


@dataclass(frozen=True)
class Stage:
    """One step of the data flow.

    ``summary`` holds plain numbers, lists and texts, for JSON. Of vectors: ``norms``, a length for each token;
    ``vector``, the first numbers of the last token's; ``turned_degrees``, for each token, by how much what was added
    turned the residual stream.
    """

    name: str
    symbols: str
    shape: tuple[int, ...]
    dtype: str
    summary: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"name": self.name, "symbols": self.symbols, "shape": list(self.shape), "dtype": self.dtype}
        return told | {"summary": self.summary}

    @property
    def layer(self) -> int | None:
        """The block that it is in, from 0."""
        found = _BLOCK.fullmatch(self.name)
        return int(found[1]) if found else None

    @property
    def kind(self) -> str:
        """Its name without the block's: ``attention`` of ``blocks.3.attention``; ``block`` for a whole one."""
        found = _BLOCK.fullmatch(self.name)
        return (found[2] or "block") if found else self.name


@dataclass(frozen=True)
class Guess:
    """The token that the logit lens reads off a place of the residual stream, and its probability at temperature 1."""

    id: int
    probability: float


@dataclass(frozen=True)
class Drawn:
    """The token that was drawn; ``rank`` 0 is the likeliest."""

    id: int
    probability: float
    rank: int
    seed: int


@dataclass
class Trace:
    """What one prediction was made of.

    ``logits`` are those ``[V]`` after the last token; ``streams`` the residual stream ``[T, C]`` before the first block
    and after each; ``patterns`` the attention ``[H, T, S]`` (float32) of the blocks that were asked for.
    """

    model: Model
    ids: list[int]
    stages: list[Stage]
    next: Distribution
    drawn: Drawn
    logits: Tensor
    streams: list[Tensor]
    patterns: dict[int, Tensor] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        """The stage of a name; KeyError if there is none."""
        return {stage.name: stage for stage in self.stages}[name]

    def pattern(self, layer: int, head: int | None = None) -> list[list[float]]:
        """Where each token ``[T]`` looked ``[S]``: one head's attention, or the mean over heads. Rows sum to 1.

        Raises UsageError for a block or head that the model does not have, KeyError for a block not asked for.
        """
        check_place(self.model, layer, head)
        kept = self.patterns[layer]
        shown: list[list[float]] = (kept.mean(0) if head is None else kept[head]).tolist()
        return shown

    @torch.inference_mode()
    def lens(self) -> list[list[Guess]]:
        """What each place would predict if the model ended there: ``[L + 1]`` rows, before the first block and after
        each, of ``[T]`` guesses; the last row is the model's own prediction.

        The stream goes through the final norm and the unembedding, as after the last block. Source: nostalgebraist
        2020, "interpreting GPT: the logit lens".
        """
        transformer = self.model.transformer
        rows = []
        for stream in self.streams:
            logits = transformer.unembedding(transformer.norm(stream[None]))[0].float()
            likeliest = logits.softmax(-1).max(-1)
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            rows.append([Guess(*pair) for pair in pairs])
        return rows


def check_place(model: Model, layer: int | None, head: int | None) -> None:
    """Raise UsageError for a block or a head that the model does not have; both count from 0."""
    for name, number, count in (("layer", layer, model.config.layers), ("head", head, model.config.heads)):
        if number is not None and not 0 <= number < count:
            raise UsageError(
                f"there is no {name} {number}: {model.name} has {count} of them", f"give one from 0 to {count - 1}"
            )


@torch.inference_mode()
def trace(
    model: Model,
    ids: Sequence[int],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    top: int = 10,
    patterns: Container[int] = (),
) -> Trace:
    """Predict the token after ``ids``, and tell how.

    Args:
        model: from ``open_model``.
        ids: at least one, at most the context.
        temperature, seed: of the draw; with the same two ``generate`` draws the same token.
        top: how many of the likeliest tokens to tell of.
        patterns: the blocks whose whole attention is kept; it grows with the square of the length.

    Raises LimitError for more ids than the context, CorruptError for weights whose logits are not finite.
    """
    check_prompt(model, ids)
    recorder = _Recorder(model, list(ids), patterns)
    logits = model.transformer(torch.tensor([list(ids)], device=model.device), tap=recorder.take)[0, -1]  # [V]
    check_finite(model, logits)
    found = distribution(logits, temperature, top)
    id_ = int(sample(logits[None], Sampling(temperature), [seed], [len(ids)]))
    chances = probabilities(logits, temperature)  # [V]
    # Of several with the same logit the first is ahead, as in ``distribution``.
    ahead = int((logits > logits[id_]).sum()) + int((logits[:id_] == logits[id_]).sum())
    drawn = Drawn(id_, chances[id_].item(), ahead, seed)
    recorder.end(found, drawn, float(chances.sum()))
    return Trace(model, list(ids), recorder.stages, found, drawn, logits, recorder.streams, recorder.patterns)


def head_outputs(transformer: Transformer, layer: int, weights: Tensor, value: Tensor) -> Tensor:
    """What each head of a block adds to one token's vector, ``[H, C]`` float32; with the bias they sum to attention's.

    ``weights`` ``[H, S]`` say where the token looks, ``value`` ``[K, S, D]`` what it finds there; a head's share goes
    through its own columns of the output matrix. Where attention's sum is normed before it is added, every share is
    scaled as the sum is.
    """
    block = transformer.blocks[layer]
    output_map, norm = block.get_submodule("attention.output"), block.get_submodule("attention_norm")
    values = value.float().repeat_interleave(len(weights) // len(value), 0)  # [H, S, D]
    gathered = (weights[:, None] @ values)[:, 0]  # [H, D]
    output = matrix_of(output_map)  # [C, H D]
    shares = torch.einsum("hd,chd->hc", gathered, output.float().unflatten(1, gathered.shape))
    return (
        _shares_of_norm(shares, getattr(output_map, "bias", None), norm) if transformer.config.norm_output else shares
    )


def _shares_of_norm(shares: Tensor, bias: Tensor | None, norm: Any) -> Tensor:
    """What each of the summands ``[H, C]`` is after the norm of their sum, with a bias that is in the sum too."""
    whole = shares.sum(0) if bias is None else shares.sum(0) + bias.float()
    if isinstance(norm, torch.nn.LayerNorm):
        shares, whole = shares - shares.mean(-1, keepdim=True), whole - whole.mean()
    return shares * norm.weight.float() * (whole.square().mean() + norm.eps).rsqrt()


class _Recorder:
    """Takes what the tap gives, sums it up at once, and keeps of the arrays only what is asked for."""

    def __init__(self, model: Model, ids: list[int], kept: Container[int]) -> None:
        self._model, self._ids, self._kept = model, ids, kept
        self.stages: list[Stage] = []
        self.streams: list[Tensor] = []
        self.patterns: dict[int, Tensor] = {}
        self._stream = torch.empty(0)  # the residual stream so far, [T, C]
        self._value = torch.empty(0)  # of the block that is running, [K, S, D]
        self._tellers: dict[str, Callable[[Tensor, int], dict[str, Any]]] = {
            **{"embedding": self._embedding, "positions": self._positions, "norm": self._norm, "logits": self._logits},
            **{"query": self._heads, "key": self._heads, "value": self._values, "pattern": self._pattern},
            **{"attention": self._added, "hidden": self._hidden, "mlp": self._added, "block": self._block},
        }
        texts = [self._text(id_) for id_ in ids]
        self._add("tokens", torch.tensor([ids]), {"ids": ids, "texts": texts})

    def take(self, name: str, value: Tensor) -> None:
        """The tap."""
        found = _BLOCK.fullmatch(name)
        kind = (found[2] or "block") if found else name
        self._add(name, value, self._tellers[kind](value[0], int(found[1]) if found else 0), kind)

    def end(self, found: Distribution, drawn: Drawn, total: float) -> None:
        """The two stages behind the model."""
        top = [
            {"id": one.id, "text": self._text(one.id), "logit": one.logit, "probability": one.probability}
            for one in found.top
        ]
        summary = {"temperature": found.temperature, "entropy_bits": found.entropy_bits, "sum": total, "top": top}
        vocabulary = self._model.config.vocab_size
        self.stages.append(Stage("probabilities", _SYMBOLS["probabilities"], (1, vocabulary), "float64", summary))
        chosen = {"id": drawn.id, "text": self._text(drawn.id), "probability": drawn.probability, "rank": drawn.rank}
        summary = chosen | {"seed": drawn.seed, "position": len(self._ids)}
        self.stages.append(Stage("draw", _SYMBOLS["draw"], (1,), "int64", summary))

    def _add(self, name: str, value: Tensor, summary: dict[str, Any], kind: str | None = None) -> None:
        dtype = str(value.dtype).removeprefix("torch.")
        self.stages.append(Stage(name, _SYMBOLS[kind or name], tuple(value.shape), dtype, summary))

    def _text(self, id_: int) -> str:
        return self._model.tokenizer.decode([id_])

    # What to tell of each kind of stage; values come without the batch axis.

    def _embedding(self, stream: Tensor, layer: int) -> dict[str, Any]:
        self._stream = stream
        self.streams = [stream]
        return _vectors(stream)

    def _positions(self, stream: Tensor, layer: int) -> dict[str, Any]:
        turned = _degrees(self._stream, stream)
        return self._embedding(stream, layer) | {"turned_degrees": turned}

    def _heads(self, vectors: Tensor, layer: int) -> dict[str, Any]:
        return {"norms": vectors[:, -1].float().norm(dim=-1).tolist()}  # a head each, of the last token

    def _values(self, vectors: Tensor, layer: int) -> dict[str, Any]:
        self._value = vectors
        return self._heads(vectors, layer)

    def _pattern(self, pattern: Tensor, layer: int) -> dict[str, Any]:
        if layer in self._kept:
            self.patterns[layer] = pattern.cpu()
        weights = pattern[:, -1]  # [H, S]
        entropy = -torch.special.xlogy(weights, weights).sum(-1) / math.log(2)
        moved = head_outputs(self._model.transformer, layer, weights, self._value).norm(dim=-1)  # [H]
        best = weights.topk(min(_LOOKED_AT, weights.shape[-1]), dim=-1)
        heads = []
        for head, (places, shares) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            top = [
                {"position": place, "id": self._ids[place], "text": self._text(self._ids[place]), "weight": share}
                for place, share in zip(places, shares, strict=True)
            ]
            told = {"entropy_bits": max(0.0, entropy[head].item()), "norm": moved[head].item(), "top": top}
            heads.append({"head": head} | told)
        return {"heads": heads}

    def _added(self, added: Tensor, layer: int) -> dict[str, Any]:
        after = self._stream + added
        turned = _degrees(self._stream, after)
        self._stream = after
        return _vectors(added) | {"turned_degrees": turned}

    def _hidden(self, neurons: Tensor, layer: int) -> dict[str, Any]:
        last = neurons[-1].float()  # [F]
        best = last.topk(min(_NEURONS, len(last)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        strongest = [{"neuron": neuron, "value": value} for neuron, value in pairs]
        return {"active": (last > 0).float().mean().item(), "neurons": strongest}

    def _block(self, stream: Tensor, layer: int) -> dict[str, Any]:
        before, self._stream = self.streams[-1], stream
        self.streams.append(stream)
        return _vectors(stream) | {"turned_degrees": _degrees(before, stream)}

    def _norm(self, stream: Tensor, layer: int) -> dict[str, Any]:
        return _vectors(stream)

    def _logits(self, logits: Tensor, layer: int) -> dict[str, Any]:
        last = logits[-1].float()
        best = last.topk(min(_LOOKED_AT, len(last)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        told = {"min": last.min().item(), "max": last.max().item(), "mean": last.mean().item()}
        return told | {"top": [{"id": id_, "text": self._text(id_), "logit": logit} for id_, logit in pairs]}


def _vectors(stream: Tensor) -> dict[str, Any]:
    return {"norms": stream.float().norm(dim=-1).tolist(), "vector": stream[-1, :_FIRST].float().tolist()}


def _degrees(before: Tensor, after: Tensor) -> list[float]:
    """The angle between two vectors, for each token; float64, since the cosine of a small angle is all but 1."""
    cosine = F.cosine_similarity(before.cpu().double(), after.cpu().double(), dim=-1)
    angles: list[float] = cosine.clamp(-1, 1).arccos().rad2deg().tolist()
    return angles
