"""Cutting text by tokens, never through a character."""

from __future__ import annotations

import tempfile
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from gptcli.text.tokenizer import Tokenizer


def truncate(tokenizer: Tokenizer, ids: Iterable[int], size: int, keep: str, *, special: bool = False) -> str:
    """The text of at most ``size`` of the tokens: the ``head``, the ``tail`` or the ``middle``.

    What comes out is again at most ``size`` tokens when it is encoded by itself, with ``special`` as in
    ``Tokenizer.encode``. A head reads no more than it needs.
    """
    if keep == "head":
        kept = list(islice(ids, size + 1))
        whole, kept = len(kept) <= size, kept[:size]
    elif keep == "tail":
        last = deque(ids, maxlen=size + 1)
        whole, kept = len(last) <= size, list(last)[-size:] if size else []
    else:
        count, kept = _middle(ids, size)
        whole = count <= size
    while True:
        data = tokenizer.decode_bytes(kept, follows=not whole and keep != "head")
        start, end = (0, len(data)) if whole else whole_characters(data)
        text = data[start:end].decode("utf-8", errors="replace")
        if whole or not kept or len(tokenizer.encode(text, special=special)) <= size:
            return text
        kept = kept[1:] if keep == "tail" else kept[:-1]


def _middle(ids: Iterable[int], size: int) -> tuple[int, list[int]]:
    """How many ids there are, and the ``size`` in their middle; kept on disk until their number is known."""
    width = array("I").itemsize
    source = iter(ids)
    count = 0
    with tempfile.TemporaryFile() as stream:
        while block := array("I", islice(source, 1 << 16)):
            block.tofile(stream)
            count += len(block)
        stream.seek(max(0, count - size) // 2 * width)
        kept = array("I")
        kept.frombytes(stream.read(size * width))
    return count, kept.tolist()


def split(
    tokenizer: Tokenizer, ids: Iterable[int], size: int, overlap: int = 0, *, special: bool = False
) -> Iterator[str]:
    """The text in pieces of at most ``size`` tokens, each sharing at least ``overlap`` with the one before.

    Without overlap the pieces joined are the text. A piece is longer than ``size`` only where a single character is,
    and shares less than ``overlap`` only where it could not go on otherwise. ``overlap`` is less than ``size``.
    """
    source = map(tokenizer.speller(), ids)
    data = b""
    ends: list[int] = []  # where each token ends in data; a token may end one character and begin the next
    while True:
        for token in islice(source, max(0, size + 8 - len(ends))):
            data += token
            ends.append(len(data))
        if not data:
            return
        end = _piece_end(tokenizer, data, ends, size, special)
        yield data[:end].decode("utf-8", errors="replace")
        if end == len(data):
            return
        start = _next_start(data, ends, end, overlap)
        data = data[start:]
        ends = [place - start for place in ends if place > start]


def _piece_end(tokenizer: Tokenizer, data: bytes, ends: list[int], size: int, special: bool) -> int:
    """Where the longest piece ends that begins the data and is at most ``size`` tokens when encoded by itself."""
    end = _character_start(data, ends[min(size, len(ends)) - 1])
    while end > 0 and len(tokenizer.encode(data[:end].decode("utf-8", errors="replace"), special=special)) > size:
        end = _character_start(data, end - 1)
    return end or _first_character_end(data)


def _next_start(data: bytes, ends: list[int], end: int, overlap: int) -> int:
    """Where the next piece begins: ``overlap`` whole tokens before ``end``, but past the first character."""
    if overlap == 0:
        return end
    first = bisect_right(ends, end) - overlap
    start = _character_start(data, ends[first - 1]) if first > 0 else 0
    return start or _first_character_end(data)


def _character_start(data: bytes, place: int) -> int:
    """The last place up to ``place`` where no character is cut."""
    while 0 < place < len(data) and data[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _first_character_end(data: bytes) -> int:
    place = 1
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def whole_characters(data: bytes) -> tuple[int, int]:
    """``(start, end)`` of the whole UTF-8 characters in ``data``, without halves at its ends."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    for back in range(1, min(4, len(data) - start) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:
            length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return start, len(data) - back if length > back else len(data)
    return start, len(data)
