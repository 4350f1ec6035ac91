"""What comes next, as numbers: distributions and weighed continuations; without torch, as ``core/requests.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.errors import LimitError


@dataclass(frozen=True)
class Candidate:
    """A token that may come next: its logit as the model gives it, and its probability at the temperature asked for."""

    id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class Distribution:
    """The next token's distribution at one temperature.

    ``top`` are the likeliest tokens, best first; ``others`` is the probability of all the rest together.
    """

    temperature: float
    entropy_bits: float
    top: tuple[Candidate, ...]
    others: float


@dataclass(frozen=True)
class Continuation:
    """Token ids that may follow a prompt, and each one's log-probability given all before: nats, temperature 1."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Of the whole: the sum over its tokens."""
        return math.fsum(self.logprobs)

    @property
    def logprob_per_token(self) -> float:
        """The mean over its tokens, which does not favour short ones (Brown et al. 2020, GPT-3, section 2.4)."""
        return self.logprob / len(self.logprobs)


def normalized(logprobs: Sequence[float]) -> list[float]:
    """The probabilities of alternatives of which one is true: softmax of their log-probabilities (nats)."""
    most = max(logprobs)
    weights = [math.exp(each - most) for each in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def check_lengths(prompt: Sequence[int], choices: Sequence[Sequence[int]], context: int, model: str) -> None:
    """Raise LimitError where a prompt and a choice exceed a model's context.

    A choice's last token is predicted, never read, so it may stand one past the context.
    """
    longest = max(map(len, choices))
    if len(prompt) + longest - 1 > context:
        raise LimitError(
            f"the prompt is {len(prompt):,} tokens, the longest choice {longest:,}, and the context of {model} "
            f"is {context:,}",
            "shorten them, or let the prompt's beginning go with --truncate-prompt left",
        )
