"""A model in this process with what commands ask of one: the twin of ``serve.client.WarmModel``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gptcli.core.build import Model
from gptcli.core.distribution import Continuation, Distribution
from gptcli.core.generate import generate, prompt_ids
from gptcli.core.predict import distribution, next_logits_batch, score_continuations
from gptcli.core.requests import Request, Step, Timing
from gptcli.core.settings import Sampling


class LocalModel:
    """A loaded model; attributes and methods as of ``WarmModel``."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.name, self.used, self.load_seconds = model.name, model.used, model.load_seconds
        self.context, self.vocab_size = model.config.context, model.config.vocab_size

    @property
    def told(self) -> str:
        """How its steps were taken."""
        return self.model.stepping.told

    def prompt_ids(self, text: str, *, special: bool = False) -> list[int]:
        """``core.generate.prompt_ids``."""
        return prompt_ids(self.model, text, special=special)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text alone."""
        return self.model.tokenizer.encode(text, special=special)

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
        return self.model.tokenizer.decode([id_])

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
        return generate(self.model, requests, sampling, logprobs=logprobs, slide=slide, timing=timing)
