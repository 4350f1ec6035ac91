"""A text to its documents: a line holding only ``<|endoftext|>`` parts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

SEPARATOR = "<|endoftext|>"

# As much as has to be seen of a line to know whether it is a separator, with the line breaks on both sides.
_SEAM = len(SEPARATOR) + 2


class Part(NamedTuple):
    """A piece of a text: of a document (``text``), what stands between documents (``gap``), or a document's ``end``."""

    kind: Literal["text", "gap", "end"]
    text: str = ""


def parted(chunks: Iterable[str]) -> Iterator[Part]:
    """The documents of a text that comes in pieces, and what stands between them; joined, they are the text again.

    The line break on either side of a separator belongs to it, and between separators what is blank is no document, as
    ``train`` has it (``train/documents.py``). In a text with separators the last line break is theirs too; one without
    any is one document as it is, empty or not. Memory does not grow with the text, unless it is blank.
    """
    is_parted = False
    blank = ""  # begins a document, unless nothing follows
    inside = False

    def document(text: str) -> Iterator[Part]:
        nonlocal blank, inside
        if not inside and (not text or text.isspace()):
            blank += text
        elif text:
            inside = True
            yield Part("text", blank + text)
            blank = ""

    def end() -> Iterator[Part]:
        nonlocal blank, inside
        yield Part("end") if inside else Part("gap", blank)
        blank, inside = "", False

    for text, separates in _separators(chunks):
        if not separates:
            yield from document(text)
            continue
        is_parted = True
        yield from end()
        yield Part("gap", text)
    if is_parted:
        yield from end()
    else:
        yield Part("text", blank)
        yield Part("end")


def _separators(chunks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """A text in pieces: what is no separator, and each separator with its line breaks (True)."""
    buffer, before = "", "\n"  # before: the character before the buffer
    found = False

    def cut(last: bool) -> Iterator[tuple[str, bool]]:
        nonlocal buffer, before, found
        place = 0
        while (place := buffer.find(SEPARATOR, place)) >= 0:
            end = place + len(SEPARATOR)
            if end == len(buffer) and not last:
                break  # the line may go on
            if (buffer[place - 1] if place else before) != "\n" or buffer[end : end + 1] not in ("\n", ""):
                place = end
                continue
            first = place - 1 if place else 0
            end = min(end + 1, len(buffer))
            yield buffer[:first], False
            yield buffer[first:end], True
            buffer, before, place, found = buffer[end:], "\n", 0, True
        keep = 0 if last else min(_SEAM, len(buffer))
        sure = buffer[: len(buffer) - keep]
        if last and found and buffer.endswith("\n"):
            yield buffer[:-1], False
            yield "\n", True
            return
        if sure:
            yield sure, False
            buffer, before = buffer[len(sure) :], sure[-1]

    for chunk in chunks:
        buffer += chunk
        yield from cut(last=False)
    yield from cut(last=True)
