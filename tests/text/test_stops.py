"""Stops: against a brute-force twin, whatever the pieces in which the text comes."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptcli.text.stops import Stops

few = st.text(alphabet="abc", max_size=14)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)
chunk_sizes = st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(any)


def _cut(text: str, sizes: list[int]) -> list[str]:
    pieces, position, turn = [], 0, 0
    while position < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[position : position + size])
        position, turn = position + size, turn + 1
    return pieces


def _run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """The text let through in all, and whether a stop was found."""
    watch, shown = Stops(stops), ""
    for piece in pieces:
        text, found = watch.push(piece)
        shown += text
        if found:
            return shown, True
    return shown + watch.flush(), False


def _brute(stops: list[str], text: str) -> tuple[str, bool]:
    """The text before the first place where any stop occurs."""
    for place in range(len(text)):
        if any(text.startswith(stop, place) for stop in stops):
            return text[:place], True
    return text, False


def _one_within_another(stops: list[str]) -> bool:
    return any(one != other and one in other for one in stops for other in stops)


@settings(max_examples=300, deadline=None)
@given(text=few, stops=stop_lists, sizes=chunk_sizes)
def test_equals_the_brute_force_twin(text: str, stops: list[str], sizes: list[int]) -> None:
    """Of stops where none lies within another: there the first to begin is the first to end."""
    assume(not _one_within_another(stops))
    assert _run(stops, _cut(text, sizes)) == _brute(stops, text)


@settings(max_examples=300, deadline=None)
@given(text=few, stops=stop_lists, sizes=chunk_sizes)
def test_pieces_do_not_matter(text: str, stops: list[str], sizes: list[int]) -> None:
    """Any stops: the same text comes through alone, streamed or in a batch."""
    assert _run(stops, _cut(text, sizes)) == _run(stops, [text])


@settings(max_examples=200, deadline=None)
@given(text=few, stops=stop_lists, sizes=chunk_sizes)
def test_no_stop_is_ever_shown(text: str, stops: list[str], sizes: list[int]) -> None:
    shown, _ = _run(stops, _cut(text, sizes))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)


@settings(max_examples=200, deadline=None)
@given(text=few, stops=stop_lists)
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    assume(not any(stop in text for stop in stops))
    shown, found = Stops(stops).push(text)
    held = text[len(shown) :]
    assert not found
    assert text.startswith(shown)
    assert held == "" or any(stop.startswith(held) for stop in stops)


def test_stop_split_over_pieces() -> None:
    watch = Stops(["\nUser:"])
    pushed = [watch.push(piece) for piece in ("Hello", "\n", "Us", "er", ": hi")]
    assert pushed == [("Hello", False), ("", False), ("", False), ("", False), ("", True)]


def test_what_became_no_stop_is_shown() -> None:
    watch = Stops(["END."])
    assert [watch.push(piece) for piece in ("the EN", "D", " of it")] == [
        ("the ", False),
        ("", False),
        ("END of it", False),
    ]


def test_shorter_start_within_a_failed_one() -> None:
    watch = Stops(["aab"])
    assert [watch.push(piece) for piece in ("aa", "a", "b")] == [("", False), ("a", False), ("", True)]


def test_flush_gives_the_held_text_once() -> None:
    watch = Stops(["stop"])
    assert watch.push("a st") == ("a ", False)
    assert watch.flush() == "st"
    assert watch.flush() == ""


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_several_stops_the_earlier_counts(order: list[str]) -> None:
    assert Stops(order).push("three two one") == ("three ", True)


def test_after_a_stop_nothing_is_left() -> None:
    watch = Stops(["!"])
    assert watch.push("hi! there") == ("hi", True)
    assert watch.flush() == ""


@pytest.mark.parametrize("stops", [[], [""], ["", ""]])
def test_no_stops_and_empty_ones_hold_nothing_back(stops: list[str]) -> None:
    watch = Stops(stops)
    assert watch.push("anything") == ("anything", False)
    assert watch.push("") == ("", False)
    assert watch.flush() == ""


def test_stop_outside_ascii() -> None:
    assert _run(["。👍"], ["好", "。", "👍", "x"]) == ("好", True)
