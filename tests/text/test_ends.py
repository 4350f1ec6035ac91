"""Where texts end, and that the kinds of tokens say the same as the texts that they make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.text.ends import UNTIL, Kind, end_of, ending_kinds, kind_of, parting_kinds
from gptcli.text.spelling import Spelling

TEXTS = st.text("ab1 .,!\n'\"\u4e2d\u3042\u3002e\u0301\U0001f600", max_size=8)


@pytest.mark.parametrize(
    ("text", "until", "shown"),
    [
        (" hello there", "word", " hello"),
        ("me, there", "word", "me"),
        ("don't go", "word", "don't"),
        ("'go' he", "word", "'"),
        ("... and", "word", "..."),
        (" caf\u0065\u0301 is", "word", " caf\u0065\u0301"),
        (" \u4e2d\u6587", "word", " \u4e2d"),
        ("a\u4e2d", "word", "a"),
        ("\nnext", "word", ""),
        ("to the end\nand", "line", "to the end"),
        ("to the end\r\nand", "line", "to the end"),
        (" ran. Then", "sentence", " ran."),
        (' "Hi!" Then', "sentence", ' "Hi!"'),
        (" Mr. Fox ran. Then", "sentence", " Mr. Fox ran."),
        (" of 3.14 m. Then", "sentence", " of 3.14 m."),
        ("\u662f\u7684\u3002\u597d", "sentence", "\u662f\u7684\u3002"),
        ("\u300c\u662f\u3002\u300d\u597d", "sentence", "\u300c\u662f\u3002\u300d"),
        ("The title\n\nOnce", "sentence", "The title"),
        ("one\nline\nmore. A", "sentence", "one\nline\nmore."),
    ],
)
def test_a_text_ends_where_a_reader_would_say(text: str, until: str, shown: str) -> None:
    end = end_of(text, until)
    assert end is not None
    assert text[:end] == shown


@pytest.mark.parametrize("text", ["", " ", "hello", " hello", "don't", "..."])
def test_a_text_that_may_go_on_has_not_ended(text: str) -> None:
    assert [end_of(text, until) for until in UNTIL] == [None] * 3


@pytest.mark.parametrize("text", ["3.14", "end.", 'end."', "\u3002", "Mr. Fox"])
def test_a_sentence_goes_on_until_something_follows_its_end(text: str) -> None:
    assert end_of(text, "sentence") is None


@given(TEXTS, TEXTS, st.sampled_from(UNTIL))
def test_the_kind_of_the_next_token_says_whether_a_text_ends_before_it(text: str, more: str, until: str) -> None:
    if not more or end_of(text, until) is not None:
        return
    kind = kind_of(more.encode())
    if kind in ending_kinds(text, until):
        assert end_of(text + more, until) == len(text)
    elif kind != Kind.SPACE and more[0] not in "'\u0301":  # spaces may hold a line end, quotes a contraction
        assert end_of(text + more, until) != len(text)


def test_words_part_at_spaces_and_punctuation_but_not_within() -> None:
    assert Kind.SPACE in parting_kinds("word")
    assert Kind.OTHER in parting_kinds("word")
    assert Kind.END in parting_kinds("word")
    assert not {Kind.WORD, Kind.CONTRACTION, Kind.INSIDE} & set(parting_kinds("word"))
    assert Kind.WORD in parting_kinds("word,")
    assert Kind.CLOSER not in parting_kinds("word,")
    assert not parting_kinds("")
    assert not parting_kinds("word ")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b" the", Kind.SPACE),
        (b"\n\n", Kind.LINE),
        (b"the", Kind.WORD),
        (b"'s", Kind.CONTRACTION),
        (b"'", Kind.CLOSER),
        (b'."', Kind.STOP),
        (b",", Kind.OTHER),
        ("\u4e2d".encode(), Kind.IDEOGRAPH),
        (b"\xe4\xb8", Kind.IDEOGRAPH),
        (b"\xf0\x9f", Kind.OTHER),
        (b"\xc3", Kind.WORD),
        (b"\x98\x80", Kind.INSIDE),
        (b"", Kind.NOTHING),
    ],
)
def test_a_token_has_the_kind_of_its_first_character(data: bytes, kind: Kind) -> None:
    assert kind_of(data) == kind


# --- Tokens by their bytes

_TOKENS = st.dictionaries(st.binary(min_size=1, max_size=4), st.integers(0, 1000), max_size=40)


@given(_TOKENS, st.binary(min_size=1, max_size=5))
def test_spelling_finds_what_a_look_at_all_tokens_does(tokens: dict[bytes, int], start: bytes) -> None:
    spelling = Spelling(tokens)
    assert list(spelling.extending(start)) == [tokens[data] for data in sorted(tokens) if data.startswith(start)]
    within = [tokens[data] for data in sorted(tokens) if start.startswith(data) and data != start]
    assert spelling.within(start) == within
    assert spelling.can_grow(start) == any(data.startswith(start) and data != start for data in tokens)


@given(_TOKENS)
def test_bytes_of_255_are_found_as_well(tokens: dict[bytes, int]) -> None:
    spelling = Spelling(tokens | {b"\xff\xff": 7, b"\xff": 8})
    assert {7, 8} <= set(spelling.extending(b"\xff"))
