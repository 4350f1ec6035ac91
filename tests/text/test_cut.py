"""Cutting: a cut never breaks a character, never has too many tokens, and never gets stuck."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.text.cut import split, truncate, whole_characters
from gptcli.text.tokenizer import Tokenizer

KEEPS = ("head", "tail", "middle")
SIZES = (0, 1, 2, 3, 7, 50, 10_000)

any_text = st.lists(
    st.one_of(
        st.sampled_from(
            ["the ", " fox", "isn't", "\n\n", "   ", "123", "😀", "👩‍👩‍👧", "中文", "é", " é", "नमस्ते", "\u00a0"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    ),
    max_size=25,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers_(pairs: dict[str, Any]) -> list[Tokenizer]:
    return [pairs[name].ours for name in ("trained", "words", "permuted")]


# --- truncate -------------------------------------------------------------------------------------------------------


def _check_truncation(tokenizer: Tokenizer, text: str, size: int, keep: str) -> None:
    ids = tokenizer.encode(text)
    kept = truncate(tokenizer, iter(ids), size, keep)
    assert len(tokenizer.encode(kept)) <= size
    assert kept in text
    if len(ids) <= size:
        assert kept == text
    if keep == "head":
        assert text.startswith(kept)
    if keep == "tail":
        assert text.endswith(kept)
    assert "\ufffd" not in kept or "\ufffd" in text


@pytest.mark.parametrize("keep", KEEPS)
def test_truncate_the_texts(keep: str, nasty: str, tokenizers_: list[Tokenizer]) -> None:
    for size in SIZES:
        _check_truncation(tokenizers_[0], nasty[:3_000], size, keep)


@settings(max_examples=150, deadline=None)
@given(text=any_text, size=st.integers(0, 30), keep=st.sampled_from(KEEPS))
def test_truncate_any_text(tokenizers_: list[Tokenizer], text: str, size: int, keep: str) -> None:
    for tokenizer in tokenizers_:
        _check_truncation(tokenizer, text, size, keep)


def test_truncate_keeps_as_much_as_fits(tokenizers_: list[Tokenizer]) -> None:
    """A text of one token a character, so that what is kept can be said outright."""
    tokenizer = tokenizers_[0]
    text = "#1#2#3#4#5"
    assert len(tokenizer.encode(text)) == 10
    assert truncate(tokenizer, tokenizer.encode(text), 4, "head") == "#1#2"
    assert truncate(tokenizer, tokenizer.encode(text), 4, "tail") == "#4#5"
    assert truncate(tokenizer, tokenizer.encode(text), 4, "middle") == text[3:7]
    assert truncate(tokenizer, tokenizer.encode(text), 10, "middle") == text


def test_head_reads_no_more_than_it_needs(tokenizers_: list[Tokenizer]) -> None:
    taken = 0

    def ids() -> Iterator[int]:
        nonlocal taken
        for id_ in tokenizers_[0].encode("# " * 1_000):
            taken += 1
            yield id_

    truncate(tokenizers_[0], ids(), 5, "head")
    assert taken <= 6


# --- split ----------------------------------------------------------------------------------------------------------


def _check_split(tokenizer: Tokenizer, text: str, size: int, overlap: int) -> None:
    pieces = list(split(tokenizer, iter(tokenizer.encode(text)), size, overlap))
    assert all(pieces)
    assert len(pieces) <= len(text)
    for piece in pieces:
        assert piece in text
        assert len(piece) == 1 or len(tokenizer.encode(piece)) <= size
    if overlap == 0:
        assert "".join(pieces) == text
    elif pieces:
        assert text.startswith(pieces[0])
        assert text.endswith(pieces[-1])


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1_000])
def test_split_the_texts(size: int, nasty: str, tokenizers_: list[Tokenizer]) -> None:
    for overlap in {0, 1, size // 2, size - 1}:
        if overlap < size:
            _check_split(tokenizers_[0], nasty[:600], size, overlap)


@settings(max_examples=150, deadline=None)
@given(text=any_text, size=st.integers(1, 12), share=st.floats(0, 0.99))
def test_split_any_text(tokenizers_: list[Tokenizer], text: str, size: int, share: float) -> None:
    for tokenizer in tokenizers_:
        _check_split(tokenizer, text, size, int(size * share))


@settings(max_examples=100, deadline=None)
@given(starts=st.lists(st.integers(0, 3), min_size=1, max_size=60), size=st.integers(11, 24), overlap=st.integers(0, 4))
def test_pieces_cover_the_text_and_share_the_overlap(
    tokenizers_: list[Tokenizer], starts: list[int], size: int, overlap: int
) -> None:
    """A text in which no character stands twice, so that a piece's place in it is certain.

    A character is at most 4 tokens, so the overlap (up to 3 more, to a border) and one character more always fit.
    """
    blocks = (0x4E00, 0x41, 0x1F300, 0xC0)
    limits = (60, 26, 60, 60)
    places = [0, 0, 0, 0]
    text = ""
    for block in starts:
        if places[block] < limits[block]:
            text += chr(blocks[block] + places[block])
            places[block] += 1
    for tokenizer in tokenizers_:
        ids = tokenizer.encode(text)
        pieces = list(split(tokenizer, iter(ids), size, overlap))
        spans = [(text.index(piece), text.index(piece) + len(piece)) for piece in pieces]
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        tokens = list(tokenizer.pieces(ids))
        for (start, end), (next_start, next_end) in pairwise(spans):
            assert start < next_start <= end < next_end
            shared = range(len(text[:next_start].encode()), len(text[:end].encode()) + 1)
            assert sum(token.start in shared and token.end in shared for token in tokens) >= overlap


def test_split_says_what_it_says(tokenizers_: list[Tokenizer]) -> None:
    tokenizer = tokenizers_[0]
    ids = tokenizer.encode("#1#2#3#4#5")
    assert list(split(tokenizer, ids, 4)) == ["#1#2", "#3#4", "#5"]
    assert list(split(tokenizer, ids, 4, 2)) == ["#1#2", "#2#3", "#3#4", "#4#5"]
    assert list(split(tokenizer, ids, 10, 9)) == ["#1#2#3#4#5"]
    assert list(split(tokenizer, [], 4)) == []


def test_single_character_longer_than_the_size_stays_whole(tokenizers_: list[Tokenizer]) -> None:
    tokenizer = tokenizers_[0]
    text = "\U0010fffc\U0010fffb"
    assert len(tokenizer.encode(text[0])) > 1
    assert list(split(tokenizer, tokenizer.encode(text), 1)) == list(text)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 20])
def test_tokens_that_straddle_characters(size: int, tokenizers_: list[Tokenizer]) -> None:
    """A family of forty: nearly every token ends one character and begins the next, so no border of tokens will do."""
    text = "👩\u200d" * 40
    for tokenizer in tokenizers_:
        pieces = list(split(tokenizer, tokenizer.encode(text), size))
        assert "".join(pieces) == text
        assert all(len(piece) == 1 or len(tokenizer.encode(piece)) <= size for piece in pieces)


def test_split_reads_as_it_goes(tokenizers_: list[Tokenizer]) -> None:
    taken = 0

    def ids() -> Iterator[int]:
        nonlocal taken
        for id_ in tokenizers_[0].encode("# " * 5_000):
            taken += 1
            yield id_

    assert next(split(tokenizers_[0], ids(), 10))
    assert taken <= 30


# --- whole characters -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=8), data=st.data())
def test_whole_characters_of_a_slice(text: str, data: st.DataObject) -> None:
    """Against the twin that asks of every byte whether a character begins there."""
    every = text.encode()
    first = data.draw(st.integers(0, len(every)))
    last = data.draw(st.integers(first, len(every)))
    begins = {len(text[:i].encode()) for i in range(len(text) + 1)}
    inside = [place for place in range(first, last + 1) if place in begins]
    start, end = whole_characters(every[first:last])
    assert every[first:last][start:end].decode() == every[inside[0] : inside[-1]].decode() if inside else start >= end


@pytest.mark.parametrize(("data", "kept"), [(b"", b""), (b"a", b"a"), (b"\x80\x80", b""), (b"\xf0\x9f\x98", b"")])
def test_whole_characters_at_the_ends(data: bytes, kept: bytes) -> None:
    start, end = whole_characters(data)
    assert data[start:end] == kept
