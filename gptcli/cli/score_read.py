"""What ``gptcli score`` reads: sources to documents, and documents to tokens, keeping what is to be shown with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptcli.cli.input import Source, stdin_is_idle
from gptcli.text.documents import SEPARATOR, Part, parted

if TYPE_CHECKING:
    from gptcli.core.score import Mark
    from gptcli.text.tokenizer import Tokenizer


@dataclass
class Document:
    """A document on its way.

    Attributes:
        source: the number of the source that it stands in.
        gap: what stands before it and is no document.
        bytes: of its text, as far as it has been read.
        line: with ``--lines``, its text, with the line break.
        number: with ``--lines``, which line of its source it is, from 1.
    """

    source: int
    gap: str = ""
    bytes: int = 0
    line: str = ""
    number: int = 0


class Reader:
    """Reads sources once, as the ids that ``score`` takes; ``documents`` are those begun, in their order.

    Whoever has seen a document to its end takes it from there. ``rest`` is what stands behind the last one.
    """

    def __init__(self, found: Sequence[Source], errors: str, special: bool, *, lines: bool) -> None:
        self._found, self._errors, self._special, self._lines = found, errors, special, lines
        self.documents: deque[Document] = deque()
        self.rest = ""
        self.bytes = self.tokens = 0  # given to score so far

    def stream(self, tokenizer: Tokenizer) -> Iterator[Sequence[int] | Mark]:
        """The token ids of all documents, as ``core.score.Stream``."""
        from gptcli.core.score import Mark

        for number, source in enumerate(self._found):
            chunks = source.chunks(self._errors)
            if self._lines:
                yield from self._of_lines(tokenizer, number, chunks, source.is_stdin)
                continue
            parts = parted(chunks)
            for part in parts:
                if part.kind == "gap":
                    self.rest += part.text
                    continue
                document = self._begin(Document(number))
                for ids in tokenizer.encode_stream(self._text(document, part, parts), special=self._special):
                    self.tokens += len(ids)
                    yield ids
                yield Mark.END

    def _begin(self, document: Document) -> Document:
        document.gap, self.rest = self.rest, ""
        self.documents.append(document)
        return document

    def _text(self, document: Document, part: Part, parts: Iterator[Part]) -> Iterator[str]:
        """A document's text, from its first part to its end."""
        while part.kind == "text":
            self._count(document, part.text)
            yield part.text
            part = next(parts)

    def _count(self, document: Document, text: str) -> None:
        size = len(text) if text.isascii() else len(text.encode())
        document.bytes += size
        self.bytes += size

    def _of_lines(
        self, tokenizer: Tokenizer, source: int, chunks: Iterable[str], is_stdin: bool
    ) -> Iterator[Sequence[int] | Mark]:
        """Each line as a document; a separator is an empty one. When nothing more is there yet, results are due."""
        from gptcli.core.score import Mark

        for number, line in enumerate(_lines(chunks, stdin_is_idle if is_stdin else lambda: False), 1):
            if line is None:
                yield Mark.PAUSE
                continue
            document = self._begin(Document(source, line=line, number=number))
            text = line.removesuffix("\n")
            if text != SEPARATOR:
                self._count(document, text)
                ids = tokenizer.encode(text, special=self._special)
                self.tokens += len(ids)
                yield ids
            yield Mark.END


def _lines(chunks: Iterable[str], idle: Callable[[], bool]) -> Iterator[str | None]:
    """Lines with their line breaks, and None when more may take a while."""
    parts: list[str] = []
    for chunk in chunks:
        *whole, rest = chunk.split("\n")
        for line in whole:
            yield "".join([*parts, line, "\n"])
            parts = []
        if rest:
            parts.append(rest)
        if whole and idle():
            yield None
    if parts:
        yield "".join(parts)
