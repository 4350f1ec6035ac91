"""What is asked of generating and what comes back; without torch, so that a caller of the warm process needs none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptcli.errors import LimitError

Finish = Literal["stop", "length", "context", "eos"]


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: its token ids, at least one (``start_ids`` for an empty text).
        seed: of the noise.
        max_tokens: to make; -1 goes on to the end of the text or the context.
        stop: strings that end the text and are not shown.
        ignore_eos: go on past the end-of-text token, which is then an ordinary one.
    """

    prompt: Sequence[int]
    seed: int
    max_tokens: int = 128
    stop: Sequence[str] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Choice:
    """A token and the model's own log-probability for it (nats, at temperature 1, before any filter)."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Step:
    """One step of one row.

    Attributes:
        row: which request.
        token: the id drawn; None when the end-of-text token was, or the step only hands over held-back text.
        text: what may now be shown: never half a character, never part of a stop.
        chosen: the token's log-probability, if asked for; ``top`` the likeliest tokens, best first.
        finish: why the row ended, on its last step.
        slid: how many of the oldest tokens were just let go to make room (with ``slide``).
    """

    row: int
    token: int | None
    text: str
    chosen: Choice | None = None
    top: tuple[Choice, ...] = ()
    finish: Finish | None = None
    slid: int = 0


@dataclass
class Timing:
    """Seconds spent, filled in as it goes; and tokens, of which some were ``drafted`` and then ``accepted``."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the prompt not counted."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


def check_length(prompt: Sequence[int], context: int, model: str) -> None:
    """Raise LimitError for a prompt longer than a model's context."""
    if len(prompt) > context:
        raise LimitError(
            f"the prompt is {len(prompt):,} tokens, and the context of {model} is {context:,}",
            "shorten it, or let its beginning go with --truncate-prompt left",
        )
