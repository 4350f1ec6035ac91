"""From the engine's steps to what an answer shows: text, and beside it the tokens that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.core.requests import Choice, Step
from gptcli.text.stream import TextStream
from gptcli.text.tokenizer import Tokenizer
from gptcli.text.transcript import Trim

# Finish as the API has it.
FINISH = {"stop": "stop", "eos": "stop", "length": "length", "context": "length"}


@dataclass(frozen=True)
class Told:
    """A token with its log-probability (None: it stands behind nothing), and the likeliest in its place.

    ``offset``: the character of the text at which it begins, or in whose middle.
    """

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    offset: int

    @property
    def text(self) -> str:
        return spelled(self.data)


def spelled(data: bytes) -> str:
    """A token's bytes as a string; of what is only part of a character, as OpenAI writes it: ``bytes:\\xe2\\x82``."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def told_of(
    tokenizer: Tokenizer, ids: Sequence[int], reports: Sequence[tuple[Choice | None, tuple[Choice, ...]]]
) -> list[Told]:
    """A prompt's tokens, from ``read_prompt``."""
    stream, offset, found = TextStream(), 0, []
    spell = tokenizer.speller()
    for id_, (chosen, top) in zip(ids, reports, strict=True):
        data = spell(id_)
        found.append(Told(data, chosen.logprob if chosen else None, _spelled(tokenizer, top), offset))
        offset += len(stream.push(data))
    return found


def _spelled(tokenizer: Tokenizer, top: Sequence[Choice]) -> tuple[tuple[bytes, float], ...]:
    return tuple((tokenizer.token_bytes(choice.id), choice.logprob) for choice in top)


class Writer:
    """One choice as it grows."""

    def __init__(
        self, tokenizer: Tokenizer, echo: str = "", echoed: Sequence[Told] = (), trim: Trim | None = None
    ) -> None:
        """``echo``: a text to begin with, with its tokens; ``trim`` takes white space off the ends of what is shown."""
        self._trim = trim
        self.made = 0
        self._tokenizer = tokenizer
        self._echo, self._echoed = echo, list(echoed)
        self._shown = self._began = len(echo)  # characters: shown, and before the next token
        self._stream = TextStream()
        self._held: list[Told] = []

    def take(self, steps: Sequence[Step]) -> tuple[str, list[Told], str | None]:
        """What new steps show: text, the tokens that begin in it (where they are told), and why it ended, if it did.

        A token whose text is held back since it may belong to a stop is told when its text is shown, or never.
        """
        text, finish = self._echo, None
        tokens, self._echo, self._echoed = self._echoed, "", []
        for step in steps:
            self.made += step.token is not None
            text += step.text
            self._shown += len(step.text)
            finish = step.finish
            if step.token is None or step.chosen is None:
                continue
            data = self._tokenizer.token_bytes(step.token)
            top = _spelled(self._tokenizer, step.top)
            self._held.append(Told(data, step.chosen.logprob, top, self._began))
            self._began += len(self._stream.push(data))
        if self._held:
            keep = [told for told in self._held if told.offset >= self._shown]
            if finish is not None and finish != "stop":  # of a text that was not cut all tokens are told
                keep = []
            tokens = tokens + self._held[: len(self._held) - len(keep)]
            self._held = keep
        if self._trim is not None:
            text = self._trim.push(text)
        return text, tokens, FINISH[finish] if finish else None
