"""What ghost text does while one types: it stays, shrinks, comes back, goes."""

from __future__ import annotations

import pytest

from gptcli.cli.edit_ghost import Found, Ghost, clean, first_word, on_one_line


@pytest.fixture
def ghost() -> Ghost:
    ghost = Ghost()
    ghost.show("Once upon", "", [Found(" a time", 0.5)])
    return ghost


def test_it_belongs_to_its_place(ghost: Ghost) -> None:
    assert ghost.text("Once upon", "") == " a time"
    assert ghost.text("Once upo", "") == ""
    assert ghost.text("Once upon", " there") == ""
    assert ghost.text("once upon", "") == ""


def test_what_is_typed_as_it_says_shortens_it_and_what_is_taken_back_lengthens_it(ghost: Ghost) -> None:
    assert ghost.text("Once upon a t", "") == "ime"
    assert ghost.text("Once upon a time", "") == ""
    assert ghost.text("Once upon a ", "") == "time"
    assert ghost.text("Once upon b", "") == ""


def test_a_menu_covers_what_was_shown_and_uncovers_it_when_it_is_closed(ghost: Ghost) -> None:
    ghost.show("Once upon", "", [Found(" one", 0.2), Found(" two", 0.1)], menu=True)
    assert (ghost.menu, ghost.text("Once upon", "")) == (True, " one")
    ghost.choose(1)
    assert ghost.text("Once upon", "") == " two"
    ghost.choose(1)
    assert ghost.text("Once upon", "") == " one"
    ghost.choose(-1)
    assert ghost.text("Once upon", "") == " two"
    ghost.close()
    assert (ghost.menu, ghost.text("Once upon", "")) == (False, " a time")


def test_what_was_chosen_stays_when_one_goes_on(ghost: Ghost) -> None:
    ghost.show("Once upon", "", [Found(" one", 0.2), Found(" two", 0.1)], menu=True)
    ghost.choose(1)
    ghost.settle()
    assert (ghost.menu, ghost.text("Once upon t", "")) == (False, "wo")
    assert ghost.text("Once upon o", "") == ""


def test_a_menu_without_anything_below_leaves_nothing() -> None:
    ghost = Ghost()
    ghost.show("a", "", [Found(" b", 0.5)], menu=True)
    ghost.close()
    assert ghost.text("a", "") == ""


def test_dropped_is_gone(ghost: Ghost) -> None:
    ghost.drop()
    assert ghost.text("Once upon", "") == ""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" fine, 東京 👋🏽 é\n\tnext", " fine, 東京 👋🏽 é\n\tnext"),
        (" red \x1b[31m", " red "),
        ("\x1b]0;title\x07", ""),
        (" a\rb", " a"),
        (" a\x9b31m", " a"),
        (" a\u202ereversed", " a"),
        (" zero\u200bwidth", " zero"),
        ("می\u200cشود", "می\u200cشود"),
        (" nul\x00", " nul"),
        (" line\u2028end", " line"),
    ],
)
def test_no_character_that_a_terminal_obeys_is_suggested(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" a time", " a"),
        ("me, there", "me"),
        (", there", ","),
        (" end", " end"),
        ("\n\nnext", "\n"),
        (" don't go", " don't"),
        ("東京へ", "東"),
        ("", ""),
    ],
)
def test_a_word_is_taken_with_the_space_before_it(text: str, word: str) -> None:
    assert first_word(text) == word


def test_a_line_end_is_shown_where_there_is_one_line() -> None:
    assert on_one_line(" a\n\tb") == " a↵ b"
