"""A file in units: a run of whole documents, or a part of one too large to be held.

Where a unit ends depends on the text alone, not on how it was read or where reading began: whoever goes on at the end
of a unit gets the same units as whoever read through.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from gptcli.train.documents import SEPARATOR, ends_early, json_text, not_utf8, tidy

# A unit is whole documents of at least so many bytes. More at once would only take memory.
_UNIT = 1 << 20
# A document of more bytes comes in parts.
LARGEST = 1 << 24
# Those parts have so many bytes, or a few less.
_PART = 1 << 20


@dataclass(frozen=True)
class Place:
    """A place in the unpacked text of a file: bytes before it, its line (in ``.jsonl``), whether within a document."""

    offset: int = 0
    line: int = 1
    inside: bool = False


@dataclass(frozen=True)
class Unit:
    """Text, where it began, where the next unit begins, and how much of the (packed) file was read by then.

    ``last``: the text goes to the end of the file.
    """

    data: bytes
    begin: Place
    end: Place
    read: int
    last: bool

    @property
    def is_part(self) -> bool:
        """Whether this is a part of one document."""
        return self.begin.inside or self.end.inside


def read_units(
    blocks: Iterable[tuple[bytes, int]], name: str, begin: Place, *, lines: bool, cut: Callable[[str], int]
) -> Iterator[Unit]:
    """The units of a file whose text from ``begin`` on is in ``blocks`` (see ``read_blocks``).

    ``lines``: each line is a document, held whole whatever its size. ``cut(text)`` is the last place where a text may
    be cut, 0 if there is none: a document is held whole, too, as long as there is none. Raises CorruptError for a large
    document that is not UTF-8.
    """
    cutter = _Cutter(name, begin, lines, cut)
    read = 0
    for block, read in blocks:
        cutter.buffer += block
        yield from cutter.units(read, at_end=False)
    yield from cutter.units(read, at_end=True)


class _Cutter:
    def __init__(self, name: str, begin: Place, lines: bool, cut: Callable[[str], int]) -> None:
        self.buffer = bytearray()
        self._name, self._begin, self._lines, self._cut = name, begin, lines, cut
        self._mark = b"\n" if lines else SEPARATOR.encode()
        self._largest = sys.maxsize if lines else LARGEST
        self._part = _PART
        self._searched = 0  # before here no mark begins, or none that matters

    def units(self, read: int, at_end: bool) -> Iterator[Unit]:
        while self.buffer:
            found = self._part_of_large(at_end) if self._begin.inside else self._whole(at_end)
            if found is None:
                return
            size, taken, inside = found
            data, last = bytes(self.buffer[:size]), at_end and size == len(self.buffer)
            del self.buffer[:taken]
            line = self._begin.line + (data.count(b"\n") + 1 if self._lines else 0)
            end = Place(self._begin.offset + taken, line, inside)
            yield Unit(data, self._begin, end, read, last)
            self._begin = end
            self._searched = max(0, self._searched - taken) if inside else 0
            self._part = _PART

    def _whole(self, at_end: bool) -> tuple[int, int, bool] | None:
        """The first unit: its size, that with the mark behind it, and whether it ends inside a document."""
        place = self._find(_UNIT)
        if 0 <= place <= self._largest:
            return place, place + len(self._mark), False
        if place < 0 and at_end and len(self.buffer) <= self._largest:
            return len(self.buffer), len(self.buffer), False
        if place < 0 and not at_end and len(self.buffer) - len(self._mark) <= self._largest:
            return None
        # Some document is large: not one before the last mark.
        place = self.buffer.rfind(self._mark, 0, _UNIT + len(self._mark) - 1)
        if place >= 0:
            return place, place + len(self._mark), False
        return self._part_of_large(at_end)

    def _part_of_large(self, at_end: bool) -> tuple[int, int, bool] | None:
        end = self._find(0)
        size = end if end >= 0 else len(self.buffer) if at_end else len(self.buffer) - len(self._mark) + 1
        while size > self._part:
            try:
                text, _ = codecs.utf_8_decode(self.buffer[: self._part])
            except UnicodeDecodeError as error:
                raise not_utf8(self._name, self._begin.offset + error.start) from None
            if place := self._cut(text):
                taken = len(text[:place].encode())
                return taken, taken, True
            self._part *= 2
        if end >= 0:
            return end, end + len(self._mark), False
        return (size, size, False) if at_end else None

    def _find(self, first: int) -> int:
        place = self.buffer.find(self._mark, max(first, self._searched))
        self._searched = place if place >= 0 else max(0, len(self.buffer) - len(self._mark) + 1)
        return place


def documents_of_unit(unit: Unit, name: str, field: str | None) -> Iterator[str]:
    """The documents of a unit that is not a part; those under ``field`` of each line where one is given.

    Raises CorruptError as ``read_documents`` does.
    """
    text = text_of(unit, name)
    if field is None:
        for document in text.split(SEPARATOR):
            yield from tidy(document)
    else:
        for number, line in enumerate(text.split("\n"), unit.begin.line):
            yield from json_text(line, field, name, number)


def text_of(unit: Unit, name: str) -> str:
    """The text of a unit. Raises CorruptError for bytes that are not UTF-8, with their offset."""
    try:
        return unit.data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = unit.begin.offset + error.start
        cut_short = unit.last and error.reason == "unexpected end of data"
        raise (ends_early if cut_short else not_utf8)(name, place) from None
