"""A model in this process with what commands ask of one: the twin of ``serve.client.WarmModel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gptcli.core.build import Model
from gptcli.core.distribution import Continuation, Distribution
from gptcli.core.draft_model import check_pair
from gptcli.core.generate import generate, prompt_ids
from gptcli.core.predict import distribution, next_logits_batch, score_continuations
from gptcli.core.requests import Request, Step, Timing
from gptcli.core.settings import Sampling


class LocalModel:
    """A loaded model; attributes and methods as of ``WarmModel``."""

    def __init__(self, model: Model, *, draft: Model | None = None, lookup: bool = True) -> None:
        """``draft`` and ``lookup`` as of ``core.generate.generate``. Raises UsageError as ``check_pair`` does."""
        if draft is not None:
            check_pair(model, draft)
        self.model, self._draft, self._lookup = model, draft, lookup
        self.name, self.used = model.name, model.used
        self.load_seconds = model.load_seconds + (draft.load_seconds if draft else 0.0)
        self.draft_name = draft.name if draft else None
        self.context, self.vocab_size = model.config.context, model.config.vocab_size

    @property
    def told(self) -> str:
        """How its steps were taken."""
        return self.model.stepping.tell()

    @property
    def fell_back(self) -> bool:
        """Whether steps were to be compiled and could not be."""
        return self.model.stepping.fell_back

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """``core.generate.prompt_ids``."""
        return prompt_ids(self.model, text, special=special)

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        """The ids of a text alone; with ``follows`` one that goes on with another."""
        return self.model.tokenizer.encode(text, special=special, follows=follows)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of a token."""
        return self.model.tokenizer.token_bytes(id_)

    def distributions(
        self, prompts: Sequence[Sequence[int]], temperatures: Sequence[float], top: int
    ) -> list[list[Distribution]]:
        """For each prompt what comes next, at each temperature: see ``core.predict``."""
        logits = next_logits_batch(self.model, prompts)
        return [[distribution(each, temperature, top) for temperature in temperatures] for each in logits]

    def continuations(
        self, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
    ) -> list[list[Continuation]]:
        """``core.predict.score_continuations``."""
        return score_continuations(self.model, prompts, choices)

    def token_text(self, id_: int) -> str:
        """The text of a token."""
        return self.model.tokenizer.token_text(id_)

    def complete(self, prefix: str, **asked: Any) -> dict[str, Any]:
        """``core.complete.complete``, in plain values."""
        from gptcli.core.complete import complete

        return complete(self.model, prefix, **asked).plain(self.model)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        slide: bool = False,
        timing: Timing | None = None,
    ) -> Iterator[Step]:
        """``core.generate.generate``."""
        drafting: dict[str, Any] = {"draft": self._draft, "lookup": self._lookup}
        return generate(self.model, requests, sampling, logprobs=logprobs, slide=slide, timing=timing, **drafting)
