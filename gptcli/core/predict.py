"""What comes next: one forward pass, and the distribution that softmax makes of its last logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.generate import check_prompt
from gptcli.errors import CorruptError


@dataclass(frozen=True)
class Candidate:
    """A token that may come next: its logit as the model gives it, and its probability at the temperature asked for."""

    id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class Distribution:
    """The next token's distribution at one temperature; ``top`` are the likeliest tokens, best first."""

    temperature: float
    entropy_bits: float
    top: tuple[Candidate, ...]


@torch.inference_mode()
def next_logits(model: Model, ids: Sequence[int]) -> Tensor:
    """The logits ``[V]`` of the token after ``ids``, on the model's device and in its dtype.

    Raises LimitError for more ids than the context, UsageError for an id that the model does not have, CorruptError
    for weights whose logits are not finite.
    """
    check_prompt(model, ids)
    batch = torch.tensor([list(ids)], device=model.device)
    logits = model.transformer(batch, last=torch.tensor([len(ids) - 1], device=model.device))[0]
    if not bool(torch.isfinite(logits).all()):
        raise CorruptError(f"the logits of {model.name} are not finite", "its weights are damaged: get them again")
    return logits


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of ``logits / temperature`` over the last axis, in float64 on the host, whatever the logits are in.

    Temperature 0 is its limit: all on the likeliest token, the first of several with the same logit.
    """
    wide = logits.float().cpu().double()
    if temperature == 0:
        return torch.nn.functional.one_hot(wide.argmax(-1), wide.shape[-1]).double()
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)


def distribution(logits: Tensor, temperature: float = 1.0, top: int = 10) -> Distribution:
    """The distribution over the next token that logits ``[V]`` give at a temperature, and its ``top`` likeliest tokens.

    The order is that of the logits, so it is the same at every temperature. The entropy is of the whole vocabulary, in
    bits.
    """
    chances = probabilities(logits, temperature)
    nats = -torch.special.xlogy(chances, chances).sum()
    best = logits.float().cpu().sort(descending=True, stable=True)
    ids = best.indices[:top]
    candidates = zip(ids.tolist(), best.values[:top].tolist(), chances[ids].tolist(), strict=True)
    return Distribution(
        temperature, max(0.0, nats.item() / math.log(2)), tuple(Candidate(*each) for each in candidates)
    )
