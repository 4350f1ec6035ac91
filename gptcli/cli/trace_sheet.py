"""What ``gptcli trace`` writes on: cards of lines that keep within a width, coloured where colour is wanted.

A card is what ``--step`` shows at once. Off a terminal there is no width: nothing is folded, and nothing is cut.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gptcli.cli.cells import cells, cut, pad
from gptcli.cli.out import Output, harmless
from gptcli.cli.shade import shade

GUTTER = 13  # cells for the titles at the left

# A quoted token stays in one piece, with what follows it up to the next space.
_WORD = re.compile(r'[^\s"]*"(?:\\.|[^"\\])*"\S*|\S+')


class Span(NamedTuple):
    """A piece of a line: text, and what gives it its colour."""

    text: str
    paint: Callable[[str], str] = str


class Sheet:
    """The cards of one view."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self.width = shutil.get_terminal_size().columns if out.on_terminal else None
        self.colored = out.colored()
        self.cards: list[list[str]] = []

    @property
    def room(self) -> int | None:
        """The cells beside the titles."""
        return None if self.width is None else max(20, self.width - GUTTER)

    def bold(self, text: str) -> Span:
        return Span(text, lambda shown: self._out.style(shown, "bold"))

    def dim(self, text: str) -> Span:
        return Span(text, lambda shown: self._out.style(shown, "dim"))

    def stripe(self, text: str, number: int) -> Span:
        return Span(text, lambda shown: self._out.stripe(shown, number))

    def heat(self, text: str, strength: float) -> Span:
        """Text on a background for a value from 0 to 1; small ones are told apart better than large ones."""
        return Span(text, lambda shown: shade(shown, max(0.0, strength) ** 0.5) if self.colored else shown)

    def card(self) -> None:
        """Begin a card."""
        self.cards.append([])

    def line(self, spans: Iterable[Span], title: str = "", indent: int | None = GUTTER) -> None:
        """A line of the card, cut at the width, under a title in the gutter."""
        left = [self.bold(pad(title, indent or 0))] if title else [Span(" " * (indent or 0))]
        self.cards[-1].append(self._render([*left, *spans]))

    def say(self, text: str, title: str = "", *, sizes: str = "", indent: int = GUTTER, dim: bool = False) -> None:
        """A sentence, folded beside its title; ``sizes`` stand dim behind it."""
        words = [(word, self.dim(word) if dim else Span(word)) for word in _WORD.findall(harmless(text))]
        words += [(sizes, self.dim(sizes))] if sizes else []
        limit = None if self.width is None else max(20, self.width - indent)
        line: list[Span] = []
        used = 0
        for word, span in words:
            if line and limit is not None and used + 1 + cells(word) > limit:
                self.line(line, title, indent)
                line, used, title = [], 0, ""
            used += (1 if line else 0) + cells(word)
            line += [Span(" "), span] if line else [span]
        self.line(line, title, indent)

    def _render(self, spans: Sequence[Span]) -> str:
        spans = list(spans)
        while spans and not spans[-1].text.strip() and spans[-1].paint is str:
            spans.pop()
        if spans and spans[-1].paint is str:
            spans[-1] = Span(spans[-1].text.rstrip())
        if self.width is not None and sum(cells(span.text) for span in spans) > self.width:
            spans = self._cut(spans, self.width)
        line = "".join(span.paint(span.text) if span.text else "" for span in spans)
        return line if self.colored else line.rstrip()

    @staticmethod
    def _cut(spans: Sequence[Span], width: int) -> list[Span]:
        kept, used = [], 0
        for span in spans:
            if used + cells(span.text) >= width:
                kept.append(Span(cut(span.text + "…", width - used), span.paint))
                break
            kept.append(span)
            used += cells(span.text)
        return kept
