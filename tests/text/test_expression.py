"""Arithmetic on words: what an expression means, and where a bad one goes wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import UsageError
from gptcli.text.expression import combined, parse, quote
from gptcli.text.tokenizer import Tokenizer
from gptcli.text.words import forms, single_token
from tests.conftest import ROOT


def meaning(expression: str) -> list[tuple[float, str]]:
    return [(term.weight, term.text) for term in parse(expression)]


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ('" king"', [(1, " king")]),
        ('" Italy" - " Germany" + " Hitler"', [(1, " Italy"), (-1, " Germany"), (1, " Hitler")]),
        ("\" king\"-' man'", [(1, " king"), (-1, " man")]),
        ('2 * " a" + -0.5*" b"', [(2, " a"), (-0.5, " b")]),
        ('" a" * 2 / 4 - " b" / 8', [(0.5, " a"), (-0.125, " b")]),
        ('-(" a" - 3 * (" b" + "c"))', [(-1, " a"), (3, " b"), (3, "c")]),
        ('(" a" + " b") / (1 + 1)', [(0.5, " a"), (0.5, " b")]),
        ('--" a"', [(1, " a")]),
        ('.5e1 * " a"', [(5, " a")]),
        ('  " a"\n\t+" b"  ', [(1, " a"), (1, " b")]),
        ("'it\\'s' - \"\\\"\" + '\\n\\x41\\u00e9'", [(1, "it's"), (-1, '"'), (1, "\nAé")]),
        ('"a + (b"', [(1, "a + (b")]),
    ],
)
def test_an_expression_is_a_weighted_sum_of_words(expression: str, terms: list[tuple[float, str]]) -> None:
    assert meaning(expression) == terms


def test_a_token_may_be_named_by_its_id_and_places_are_kept() -> None:
    first, second = parse(' " a" - 2*#123')
    assert (first.id, first.place) == (None, 1)
    assert (second.weight, second.id, second.place) == (-2, 123, 10)


def test_weights_of_the_same_token_are_added() -> None:
    terms = parse('" a" - " b" + 2 * " a"')
    assert combined(terms, [7, 9, 7]) == {7: 3.0, 9: -1.0}


@pytest.mark.parametrize(
    ("expression", "character", "what"),
    [
        ("", 1, "missing at the end"),
        ('" a" +', 7, "missing at the end"),
        ('" a" - + " b"', 8, "'+'"),
        ('" a" " b"', 6, "another word"),
        ("king - man", 1, "in quotes"),
        ('" a" - man', 8, "in quotes"),
        ('" a" + 2', 6, "no sum"),
        ('2 - " a"', 3, "no difference"),
        ('" a" * " b"', 6, "no product"),
        ('1 / " a"', 3, "divide by a number"),
        ('" a" / 0', 6, "zero"),
        ("3 * 4", 1, "without any word"),
        ('(" a" + " b"', 1, "not closed"),
        ('(" a" " b")', 7, "another word"),
        ('" a")', 5, "')'"),
        ('" a" - " b', 8, "not closed"),
        ('" a" - ""', 8, "empty"),
        ('"\\q"', 2, "escape"),
        ('"\\U00110000"', 2, "escape"),
        ('2 " a"', 3, "another word"),
        ('1e400 * " a"', 1, "too large"),
        ('1e300 * 1e300 * " a"', 7, "too large"),
        ('" a" + #x', 8, "'#'"),
        ("(" * 100 + '" a"' + ")" * 100, 51, "deep"),
        ('__import__("os")', 1, "'_'"),
    ],
)
def test_a_bad_expression_points_at_the_character(expression: str, character: int, what: str) -> None:
    with pytest.raises(UsageError, match=f"at character {character}:") as caught:
        parse(expression)
    assert what in caught.value.message
    shown = caught.value.hint.removeprefix("here: ").removeprefix("...")
    before, after = shown.removesuffix("...").split(" >>> ")
    assert expression[: character - 1].endswith(before)
    assert expression[character - 1 :].startswith(after)


@given(
    st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(-9, 9)), min_size=1)
)
def test_what_is_quoted_is_read_back(words: list[tuple[str, int]]) -> None:
    expression = " + ".join(f"{weight}*{quote(word)}" for word, weight in words)
    assert meaning(expression) == [(weight, word) for word, weight in words]


@given(st.text(alphabet="\"' ab#12.e*/+-()\\"))
def test_whatever_is_typed_is_parsed_or_pointed_at(expression: str) -> None:
    try:
        terms = parse(expression)
    except UsageError as error:
        place = int(error.message.split("at character ")[1].split(":")[0])
        assert 1 <= place <= len(expression) + 1
    else:
        assert terms


@pytest.fixture(scope="module")
def fable() -> Tokenizer:
    return Tokenizer.from_folder(ROOT / "weights" / "fable")


def test_a_word_of_one_token_is_that_token(fable: Tokenizer) -> None:
    assert fable.decode([single_token(fable, " king")]) == " king"
    assert single_token(fable, "<|endoftext|>", special=True) == 0


def test_a_word_of_several_tokens_is_said_so_with_its_forms(fable: Tokenizer) -> None:
    with pytest.raises(UsageError, match="tokens") as caught:
        single_token(fable, "queen")
    pieces = " + ".join(quote(fable.decode([id_])) for id_ in fable.encode("queen"))
    assert caught.value.message.startswith(f'"queen" is {len(fable.encode("queen"))} tokens ({pieces})')
    assert caught.value.hint == 'one token each: " queen", " Queen"'
    assert forms(fable, " QUEEN ") == [" queen", " Queen"]
    assert forms(fable, " king") == ["king", " King"]
    with pytest.raises(UsageError, match="Bavaria") as caught:
        single_token(fable, " Bavaria")
    assert "no other form" in caught.value.hint


def test_a_line_end_behind_a_word_is_explained(fable: Tokenizer) -> None:
    with pytest.raises(UsageError) as caught:
        single_token(fable, "Bavaria\n")
    assert "--lines" in caught.value.hint
    with pytest.raises(UsageError, match="empty"):
        single_token(fable, "")
