"""Cutting text by tokens, never through a character."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from gptcli.text.tokenizer import Tokenizer


def truncate(tokenizer: Tokenizer, ids: Iterable[int], size: int, keep: str) -> str:
    """The text of at most ``size`` of the tokens: the ``head``, the ``tail`` or the ``middle``.

    What comes out is again at most ``size`` tokens when it is encoded by itself. A head reads no more than it needs.
    """
    if keep == "head":
        kept = list(islice(ids, size + 1))
        whole, kept = len(kept) <= size, kept[:size]
    elif keep == "tail":
        last = deque(ids, maxlen=size + 1)
        whole, kept = len(last) <= size, list(last)[-size:] if size else []
    else:
        every = array("L", ids)
        whole, skipped = len(every) <= size, max(0, len(every) - size) // 2
        kept = list(every[skipped : skipped + size])
    while True:
        data = tokenizer.decode_bytes(kept)
        start, end = (0, len(data)) if whole else whole_characters(data)
        text = data[start:end].decode("utf-8", errors="replace")
        if whole or not kept or len(tokenizer.encode(text)) <= size:
            return text
        kept = kept[1:] if keep == "tail" else kept[:-1]


def split(tokenizer: Tokenizer, ids: Iterable[int], size: int, overlap: int = 0) -> Iterator[str]:
    """The text in pieces of at most ``size`` tokens, each sharing at least ``overlap`` with the one before.

    Without overlap the pieces joined are the text. Only a single character that is itself more than ``size`` tokens
    makes a longer piece. ``overlap`` is less than ``size``.
    """
    source = iter(ids)
    window: list[tuple[int, bytes]] = []
    while True:
        more = size + 8 - len(window)  # a border is decided by the token behind it
        window += [(id_, tokenizer.token_bytes(id_)) for id_ in islice(source, max(0, more))]
        if not window:
            return
        borders = [i for i in range(1, len(window)) if not _continues(window[i][1])] + [len(window)]
        text, end = _piece(tokenizer, window, borders, size)
        yield text
        if end == len(window):
            return
        back = [border for border in borders if border <= end - overlap]
        window = window[(back[-1] if back else borders[0]) :]


def _piece(tokenizer: Tokenizer, window: list[tuple[int, bytes]], borders: list[int], size: int) -> tuple[str, int]:
    """The longest piece from the window's start that fits, and the border where it ends."""
    for end in reversed([border for border in borders if border <= size]):
        text = b"".join(data for _, data in window[:end]).decode("utf-8", errors="replace")
        if len(tokenizer.encode(text)) <= size:
            return text, end
    return b"".join(data for _, data in window[: borders[0]]).decode("utf-8", errors="replace"), borders[0]


def _continues(data: bytes) -> bool:
    """Whether a token begins within a character."""
    return bool(data) and data[0] & 0xC0 == 0x80


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
