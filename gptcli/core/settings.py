"""What a caller may ask of sampling; without torch, so that a wrong value is told at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gptcli.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How to choose a token; the defaults change nothing but to draw at temperature 1.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest (ties with the k-th too); 0 keeps all.
        top_p: keep the likeliest tokens until their probability reaches p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or text (Keskar et
            al. 2019, CTRL, section 4.1).
        frequency_penalty, presence_penalty: taken off a generated token's logit, per occurrence and once.
        logit_bias: token id -> what is added to its logit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top-k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min-p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        _check("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            _check(name.replace("_", "-"), value, math.isfinite(value), "a finite number")
        for token, bias in self.logit_bias.items():
            _check("logit-bias", f"{token}:{bias}", token >= 0 and not math.isnan(bias), "ID:NUMBER")

    @property
    def looks_back(self) -> bool:
        """Whether the choice depends on earlier tokens."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise UsageError(f"{name} {value} is out of range", f"it should be {wanted}")
