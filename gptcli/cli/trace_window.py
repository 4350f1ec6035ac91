"""The part of a prediction that fits a page: its last tokens, and what is told of them, as numbers and texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcli.cli.out import harmless
from gptcli.cli.tokens import visible

if TYPE_CHECKING:
    from gptcli.core.trace import Guess, Stage, Trace

MOST_TOKENS = 64
_LONGEST = 24  # characters of a token
_FIRST = 8  # numbers of a vector, as many as the stages tell
# What XML 1.0 can't hold even escaped; control characters are shown already.
_NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Token:
    """A token at its place in the text; ``text`` is on one line and can't harm, but is not escaped."""

    place: int
    id: int
    text: str


class Window:
    """A trace and the tokens of it that are shown: all, or the last 64. Stages are looked up by name."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.first = max(0, len(trace.ids) - MOST_TOKENS)
        self.tokens = [Token(place, id_, self.text(id_)) for place, id_ in enumerate(trace.ids)][self.first :]
        self.config = trace.model.config
        self.stages: dict[str, Stage] = {stage.name: stage for stage in trace.stages}
        self._patterns: dict[int, list[list[list[int]]]] | None = None
        self._lens: list[list[Guess]] | None = None

    def text(self, id_: int) -> str:
        """A token as it is shown; an id without text by its number."""
        shown = plain(visible(self.trace.model.tokenizer.token_bytes(id_))) or f"#{id_}"
        return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"

    def patterns(self) -> dict[int, list[list[list[int]]]]:
        """The kept attention in thousandths, ``layer -> [head][row]``: lower triangles over the tokens that are shown.

        Where tokens before them are not shown, a row begins with the sum of what looks there.
        """
        if self._patterns is None:
            heads = range(self.config.heads)
            self._patterns = {
                layer: [self._triangle(self.trace.pattern(layer, head)) for head in heads]
                for layer in sorted(self.trace.patterns)
            }
        return self._patterns

    def _triangle(self, pattern: list[list[float]]) -> list[list[int]]:
        rows = []
        for place in range(self.first, len(pattern)):
            seen = pattern[place]
            earlier = [sum(seen[: self.first])] if self.first else []
            rows.append([round(1000 * weight) for weight in earlier + seen[self.first : place + 1]])
        return rows

    def lens(self) -> list[list[Guess]]:
        """What each layer would predict at each token that is shown."""
        if self._lens is None:
            self._lens = [row[self.first :] for row in self.trace.lens()]
        return self._lens

    def columns(self) -> list[list[float]]:
        """The first numbers of each shown token's vector, as it enters the first block."""
        entering: list[list[float]] = self.trace.streams[0].float().tolist()
        return [vector[:_FIRST] for vector in entering[self.first :]]

    def shown(self, values: list[float]) -> list[float]:
        """Of a number for each token, those of the tokens that are shown."""
        return values[self.first :]

    def block(self, layer: int, kind: str = "") -> Stage:
        """A stage of a block, or the whole one."""
        return self.stages[f"blocks.{layer}.{kind}" if kind else f"blocks.{layer}"]


def plain(text: str) -> str:
    """A text whose characters can all stand in XML."""
    return _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str, longest: int) -> str:
    """The end of a text on one line, for titles."""
    shown = plain(harmless(" ".join(text.split())))
    if len(shown) <= longest:
        return shown
    cut = shown[1 - longest :]
    word = cut.find(" ")
    return "… " + cut[word + 1 :] if 0 <= word < longest // 3 else "…" + cut
