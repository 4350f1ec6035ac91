"""Streams: TextStream never shows half a character, and a text encoded in chunks has the ids of the whole."""

from __future__ import annotations

import copy
import os
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.text import tokenizer as module
from gptcli.text.stream import TextStream
from gptcli.text.tokenizer import Tokenizer

ENCODINGS = ("r50k_base", "cl100k_base", "o200k_base")
needs_encodings = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs tiktoken's vocabularies in TIKTOKEN_CACHE_DIR"
)


def _cut(whole: Any, sizes: list[int]) -> list[Any]:
    """``whole`` in pieces of these sizes in turn, empty ones too."""
    pieces, position, turn = [], 0, 0
    while position < len(whole):
        size = sizes[turn % len(sizes)] if turn < 10_000 else len(whole)
        pieces.append(whole[position : position + size])
        position, turn = position + size, turn + 1
    return pieces


chunk_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


# --- bytes to text --------------------------------------------------------------------------------------------------


def _stream(pieces: list[bytes]) -> list[str]:
    stream = TextStream()
    return [*map(stream.push, pieces), stream.flush()]


near_utf8 = st.lists(
    st.one_of(
        st.binary(max_size=4),
        st.text(max_size=4).map(lambda text: text.encode("utf-8", errors="surrogatepass")),
        st.sampled_from([b"\xf0\x9f", b"\x98\x80", b"\xe2\x80", b"\xed\xa0\x80", b"\xf4\x90", b"\xc0\xaf", b"\xff"]),
    ),
    max_size=12,
).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(data=near_utf8, sizes=chunk_sizes)
def test_any_bytes_in_any_chunks_are_their_decoding(data: bytes, sizes: list[int]) -> None:
    assert "".join(_stream(_cut(data, sizes))) == data.decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(text=st.text(), sizes=chunk_sizes)
def test_never_half_a_character(text: str, sizes: list[int]) -> None:
    shown = ""
    for piece in _stream(_cut(text.encode(), sizes)):
        shown += piece
        assert text.startswith(shown)
    assert shown == text


def test_character_is_shown_with_its_last_byte_and_not_later() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""


def test_character_cut_short_is_replaced_at_the_end() -> None:
    stream = TextStream()
    assert stream.push("a😀".encode()[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_tokens_streamed_are_the_text(pair: Any, nasty: str) -> None:
    ids = pair.ours.encode(nasty)[:3_000]
    assert "".join(_stream([pair.ours.token_bytes(id_) for id_ in ids])) == pair.ours.decode(ids)


# --- text to ids ----------------------------------------------------------------------------------------------------


def _joined(tokenizer: Tokenizer, chunks: list[str], *, special: bool = False) -> tuple[list[int], int]:
    """The ids, and in how many pieces they came."""
    pieces = list(tokenizer.encode_stream(iter(chunks), special=special))
    return [id_ for piece in pieces for id_ in piece], len(pieces)


@pytest.mark.parametrize("size", [1, 7, 64, 1_000])
def test_stream_equals_the_whole(pair: Any, nasty: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", size)
    text = nasty[:6_000]
    chunks = _cut(text, [size])
    for special in (False, True):
        assert _joined(pair.ours, chunks, special=special)[0] == pair.ours.encode(text, special=special)


@needs_encodings
@pytest.mark.parametrize("name", ENCODINGS)
def test_stream_of_an_encoding_equals_the_whole(
    name: str, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Tokenizer.from_encoding(name)
    for size in (1, 5, 100):
        monkeypatch.setattr(module, "_CHUNK", size)
        for text in [*texts.values(), " ".join(text[:300] for text in texts.values())]:
            assert _joined(ours, _cut(text[:4_000], [size]))[0] == ours.encode(text[:4_000])


# What decides about a border: letters, marks, digits, blanks of all kinds, signs, apostrophes.
border_text = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "a",
                "Bc",
                "é",
                "e\u0301",
                "中",
                "م",
                "ः",
                "ǅ",
                "ª",
                "1",
                "٣",
                "½",
                " ",
                "  ",
                "\n",
                "\r\n",
                "\t",
                "\u00a0",
            ]
        ),
        st.sampled_from(
            ["\u3000", "\u2028", "\x85", "\x0b", "\x1c", "!", "。", "/", "'", "'s", "’", "'ll", "_", "😀\u200d"]
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=border_text, sizes=chunk_sizes, size=st.integers(1, 12))
def test_any_chunks_equal_the_whole(pairs: dict[str, Any], text: str, sizes: list[int], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", size)
        for name in ("trained", "words", "added"):
            ours = pairs[name].ours
            assert _joined(ours, _cut(text, sizes))[0] == ours.encode(text)


@needs_encodings
@settings(max_examples=100, deadline=None)
@given(text=border_text, sizes=chunk_sizes, size=st.integers(1, 12))
def test_any_chunks_of_an_encoding_equal_the_whole(text: str, sizes: list[int], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", size)
        for name in ENCODINGS:
            ours = Tokenizer.from_encoding(name)
            assert _joined(ours, _cut(text, sizes))[0] == ours.encode(text)


def test_stream_is_cut(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the tests above: were the text never cut, they would show nothing."""
    monkeypatch.setattr(module, "_CHUNK", 64)
    text = "the quick brown fox 12 isn't here\n" * 100
    assert _joined(pair.ours, _cut(text, [64]))[1] > 20


@needs_encodings
@pytest.mark.parametrize("name", ENCODINGS)
def test_stream_of_an_encoding_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 64)
    text = "the quick brown fox 12 isn't here\n" * 100
    assert _joined(Tokenizer.from_encoding(name), _cut(text, [64]))[1] > 20


def test_empty_stream(pair: Any) -> None:
    assert list(pair.ours.encode_stream([])) == []
    assert _joined(pair.ours, ["", ""])[0] == []


def test_surrogate_halves_in_two_chunks_are_one_character(pairs: dict[str, Any]) -> None:
    ours = pairs["trained"].ours
    assert _joined(ours, ["a \ud83d", "\ude00 b \ud83d"])[0] == ours.encode("a 😀 b \ufffd")


def _lazy(line: str, size: int) -> Iterator[str]:
    """``size`` characters made of ``line``, 64 kB at a time."""
    block = (line * (1 + (1 << 16) // len(line)))[: 1 << 16]
    for _ in range(size // len(block)):
        yield "".join(block)


def _longest_piece(tokenizer: Tokenizer, chunks: Iterator[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """``(longest text encoded at once, characters in all)``, without the work of encoding."""
    sizes: list[int] = []

    def encode(_: Tokenizer, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        sizes.append(len(text))
        return []

    monkeypatch.setattr(Tokenizer, "encode", encode)
    for _ in tokenizer.encode_stream(chunks):
        pass
    return max(sizes), sum(sizes)


LINES = {
    "words": "the quick brown fox 12 isn't here\n",
    "long lines": "word " * 5_000 + "\n",
    "indented": "x" + " " * 3_000 + "y\n",
    "chinese": "今天天气很好，我们去公园吧。\n",
    "quoted lines": '"one-two";"three-four";\n',
}


@pytest.mark.parametrize("kind", LINES)
def test_memory_is_bounded_by_a_few_chunks(kind: str, pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    size = 30_000_000
    for name in ("trained", "words"):
        longest, total = _longest_piece(pairs[name].ours, _lazy(LINES[kind], size), monkeypatch)
        monkeypatch.undo()
        assert total == size // (1 << 16) * (1 << 16)
        assert longest <= 4 * module._CHUNK


def test_measured_memory_is_bounded(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tracemalloc.start()
    try:
        _longest_piece(pairs["trained"].ours, _lazy(LINES["words"], 30_000_000), monkeypatch)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * module._CHUNK


def test_nothing_is_read_ahead(pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ids come before the second chunk is asked for."""
    monkeypatch.setattr(module, "_CHUNK", 16)

    def chunks() -> Iterator[str]:
        yield "the quick brown fox and more"
        raise AssertionError("read ahead")

    assert next(pairs["trained"].ours.encode_stream(chunks()))


# --- many texts, on all cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [False, True])
def test_an_array_of_ids_equals_the_list(pair: Any, nasty: str, special: bool) -> None:
    ids = pair.ours.encode_array(nasty, special=special)
    assert (ids.typecode, ids.tolist()) == ("I", pair.ours.encode(nasty, special=special))


def test_an_array_of_ids_without_tiktokens_buffer_is_the_same(pairs: dict[str, Any], texts: dict[str, str]) -> None:
    """Should tiktoken ever take it away."""

    class Bare:
        def __init__(self, encoding: Any) -> None:
            self._core_bpe, self.encode_ordinary = object(), encoding.encode_ordinary

    for name in ("trained", "permuted", "added"):
        ours = copy.copy(pairs[name].ours)
        ours._coder = copy.copy(ours._coder)
        ours._coder._encoding = Bare(ours._coder._encoding)
        for text in (*texts.values(), "a\ud800b"):
            assert ours.encode_array(text).tolist() == pairs[name].ours.encode(text)


def test_lone_surrogates_in_an_array_are_the_replacement_character(pairs: dict[str, Any]) -> None:
    for pair in pairs.values():
        for text in ("a\ud83db", "\udc4d", "\ud83d\udc4d x"):
            assert pair.ours.encode_array(text).tolist() == pair.ours.encode(text)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [7, 64, 1_000_000])
def test_streams_equal_one_after_the_other(
    pair: Any, texts: dict[str, str], size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", size)
    documents = ["", *(text[:2_000] for text in texts.values()), "", ""]
    for special in (False, True):
        found: list[list[int]] = [[]]
        for ids, last in pair.ours.encode_streams(
            (_cut(text, [11]) for text in documents), special=special, threads=threads
        ):
            found[-1] += ids
            if last:
                found.append([])
        assert found.pop() == []
        assert found == [pair.ours.encode(text, special=special) for text in documents]
