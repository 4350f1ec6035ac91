"""Where a word, a line or a sentence ends, and which tokens let a text end before them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from enum import IntEnum
from functools import lru_cache

UNTIL = ("line", "word", "sentence")


class Kind(IntEnum):
    """What a token begins with, as far as it matters to where the text before it ends."""

    NOTHING = 0  # no text: a special token, or padding of the vocabulary
    END = 1  # the end of the text
    INSIDE = 2  # the middle of a character
    LINE = 3
    SPACE = 4
    WORD = 5
    IDEOGRAPH = 6  # written without spaces: each may be taken as a word
    CONTRACTION = 7
    STOP = 8
    CLOSER = 9
    OTHER = 10


# A text for each kind: what holds for it holds for all tokens of the kind.
_SAMPLE = {
    Kind.LINE: "\n",
    Kind.SPACE: " ",
    Kind.WORD: "a",
    Kind.IDEOGRAPH: "\u4e2d",
    Kind.CONTRACTION: "'s",
    Kind.STOP: ".",
    Kind.CLOSER: '"',
    Kind.OTHER: ",",
}
_LINE_ENDS = "\r\n"
_APOSTROPHES = "'\u2019"
_STOPS = ".!?\u2026\u3002\uff01\uff1f"
_CLOSERS = "'\"\u201d\u2019\u00bb)]\u300d\u300f\uff09"
_AFTER = re.escape(_STOPS + _CLOSERS)
# A full stop and what closes behind it, if white space follows, but not of a common title; the full stops of Chinese
# and Japanese, which anything may follow; or a blank line.
_SENTENCE = re.compile(
    rf"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)[.!?\u2026][{_AFTER}]*(?=\s)"
    rf"|[\u3002\uff01\uff1f][{_AFTER}]*(?=[^{_AFTER}])"
    r"|(?<=\S)(?=[^\S\n]*\n[^\S\n]*\n)"
)


def end_of(text: str, until: str) -> int | None:
    """Where the first word (with the space before it), line or sentence of ``text`` ends; None where it may go on.

    0 is a text that ends before it has begun: a line end stands first. Punctuation in a row counts as a word.
    """
    if until == "word":
        return _end_of_word(text)
    if until == "line":
        return next((place for place, char in enumerate(text) if char in _LINE_ENDS), None)
    found = _SENTENCE.search(text)
    return found.end() if found else None


def _end_of_word(text: str) -> int | None:
    length = len(text)
    start = next((place for place, char in enumerate(text) if not char.isspace() or char in _LINE_ENDS), length)
    if start == length:
        return None
    if text[start] in _LINE_ENDS:
        return 0
    end = start + 1
    while end < length and not _parted(text, end):
        end += 1
    return end if end < length else None


def ending_kinds(text: str, until: str) -> Collection[Kind]:
    """The kinds of tokens before which ``text``, which has not ended so far, ends there."""
    return _ending(text if until != "line" else "", until)


@lru_cache(4096)
def _ending(text: str, until: str) -> Collection[Kind]:
    return {Kind.END} | {kind for kind, sample in _SAMPLE.items() if end_of(text + sample, until) == len(text)}


def parting_kinds(text: str) -> Collection[Kind]:
    """The kinds of tokens before which ``text`` ends with a whole word, or with all of some punctuation."""
    return _parting(text[-2:]) if text and not text[-1].isspace() else ()


@lru_cache(4096)
def _parting(text: str) -> Collection[Kind]:
    return {Kind.END} | {kind for kind, sample in _SAMPLE.items() if _parted(text + sample, len(text))}


def _parted(text: str, place: int) -> bool:
    """Whether one word ends and another begins, or space does, at a place within the text."""
    last, char = text[place - 1], text[place]
    if char.isspace() or is_ideograph(char) or is_ideograph(last):
        return True
    if char in _APOSTROPHES and _wordy(last):
        return not _wordy(text[place + 1 : place + 2])
    if last in _APOSTROPHES and _wordy(char):
        return not _wordy(text[max(0, place - 2) : place - 1])
    return _wordy(last) != _wordy(char)


def _wordy(char: str) -> bool:
    """A letter, a digit, a mark on one, what joins letters, an underscore."""
    return bool(char) and (char.isalnum() or char in "_\u200c\u200d" or unicodedata.category(char)[0] == "M")


def is_ideograph(char: str) -> bool:
    """Of Chinese or Japanese, which is written without spaces."""
    return "\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0003ffff"


def kind_of(data: bytes) -> Kind:
    """The kind of a token by its bytes."""
    lead = data[:1]
    if not lead:
        return Kind.NOTHING
    if lead in (b"'", "\u2019".encode()):
        return Kind.CONTRACTION if data[1:2].isalpha() else Kind.CLOSER
    size = 1 if lead < b"\xc0" else 2 if lead < b"\xe0" else 3 if lead < b"\xf0" else 4
    return _kind_of_first(data[:size])


@lru_cache(8192)
def _kind_of_first(data: bytes) -> Kind:
    """By the bytes of the first character, of which the last may be missing."""
    if b"\x80" <= data[:1] < b"\xc0":
        return Kind.INSIDE
    try:
        char = data.decode("utf-8")
    except UnicodeDecodeError:
        lead = data[0]  # what most characters are that begin so
        return Kind.IDEOGRAPH if 0xE3 <= lead <= 0xE9 else Kind.OTHER if lead == 0xE2 or lead >= 0xEE else Kind.WORD
    if char in _LINE_ENDS:
        return Kind.LINE
    if char.isspace():
        return Kind.SPACE
    if is_ideograph(char):
        return Kind.IDEOGRAPH
    if _wordy(char):
        return Kind.WORD
    return Kind.STOP if char in _STOPS else Kind.CLOSER if char in _CLOSERS else Kind.OTHER
