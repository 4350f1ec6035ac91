"""Keys and ghost text on a line: what is asked and when, what is shown, taken, hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")

from gptcli.cli.edit_ghost import Found
from gptcli.cli.edit_line import LineScreen
from gptcli.errors import LimitError
from tests.cli.editing import (
    ALT_ENTER,
    CTRL_E,
    CTRL_F,
    CTRL_SPACE,
    DOWN,
    END,
    ENTER,
    ESCAPE,
    LEFT,
    RIGHT,
    TAB,
    UP,
    Clock,
    Hand,
    play,
)


def on_a_line(scenario: Callable[[Hand], Any], clock: Clock | None = None, **more: Any) -> Any:
    return play(lambda *args, **given: LineScreen(*args, **given, **more), scenario, clock)


def test_enter_accepts_what_is_typed_and_not_the_ghost() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once upon")
        question = await hand.question(1)
        assert (question.before, question.after, question.num, question.min_prob) == ("Once upon", "", 1, 0.25)
        await hand.ghost(" a time")
        await hand.until(lambda: hand.picture[0] == "> Once upon a time")
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once upon"


def test_tab_takes_all_and_what_comes_next_is_asked_for() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once upon")
        await hand.question(1)
        await hand.ghost(" a time")
        hand.press(TAB)
        assert (await hand.question(2)).before == "Once upon a time"
        assert hand.shown == ""
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once upon a time"


@pytest.mark.parametrize("key", [END, CTRL_E])
def test_end_takes_all_and_without_a_ghost_goes_to_the_end(key: str) -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once on")
        await hand.question(1)
        hand.press("\x01" + key + "e")  # there is no ghost yet
        await hand.until(lambda: hand.buffer.text == "Once one")
        await hand.question(2)
        hand.press(LEFT)
        await hand.until(lambda: hand.buffer.cursor_position == len("Once on"))
        await hand.settled()
        hand.press(TAB)
        await hand.question(3)
        await hand.ghost(" more")  # within the line
        hand.press(key)
        await hand.until(lambda: hand.buffer.cursor_position == len("Once one"))
        await hand.question(4)
        await hand.ghost(" day they")
        hand.press(key)
        await hand.until(lambda: hand.buffer.text == "Once one day they")
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once one day they"


@pytest.mark.parametrize("key", [RIGHT, "\x1b[1;5C", "\x1bf", CTRL_F])
def test_right_takes_a_word_and_the_rest_stays_without_being_asked_for(key: str) -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once")
        await hand.question(1)
        await hand.ghost(" upon a time")
        hand.press(key)
        await hand.until(lambda: hand.buffer.text == "Once upon")
        await hand.settled()
        assert hand.shown == " a time"
        hand.press(key)
        await hand.until(lambda: hand.buffer.text == "Once upon a")
        await hand.settled()
        assert len(hand.model.asked) == 1
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once upon a"


def test_ctrl_f_moves_where_there_is_no_ghost() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("ab")
        hand.press("\x01" + CTRL_F)
        await hand.until(lambda: hand.buffer.cursor_position == 1)
        hand.press(ENTER)

    assert on_a_line(scenario) == "ab"


def test_with_vis_keys_ghost_text_is_for_what_is_typed() -> None:
    clock = Clock()

    async def scenario(hand: Hand) -> None:
        await hand.type("Once")
        clock.strike()
        await hand.ghost(" upon a time")
        hand.press(ESCAPE)  # to the other mode
        await hand.until(lambda: hand.buffer.cursor_position == 3)
        await hand.until(lambda: hand.picture[0] == "> Once")
        hand.press(" x")  # a motion, which fails at the end, and what deletes: no text
        await hand.until(lambda: hand.buffer.text == "Onc")
        await hand.settled()
        assert (clock.pending, hand.shown) == ([], "")
        hand.press("ae")
        await hand.until(lambda: hand.shown == " upon a time")
        hand.press(RIGHT)
        await hand.until(lambda: hand.buffer.text == "Once upon")
        hand.press(ESCAPE)
        await hand.until(lambda: not hand.shown)
        hand.press("0ceTw" + ESCAPE)
        await hand.until(lambda: hand.buffer.text == "Tw upon")
        hand.press("A")
        await hand.until(lambda: hand.buffer.cursor_position == len("Tw upon"))
        await hand.settled()
        clock.strike()
        assert hand.model.asked[-1].before == "Tw upon"
        hand.press(CTRL_SPACE)
        await hand.until(lambda: hand.model.asked[-1].menu)
        await hand.ghost(" a", " the")
        hand.press(ESCAPE)  # closes the alternatives, and one still types
        await hand.until(lambda: not hand.screen.typing.ghost.menu)
        await hand.type("!")
        hand.press(ENTER)

    assert on_a_line(scenario, clock, vi=True) == "Tw upon!"


def test_typing_what_it_says_shortens_it_and_something_else_asks_anew() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once")
        await hand.question(1)
        await hand.ghost(" upon a time")
        await hand.type(" up")
        assert (hand.shown, len(hand.model.asked)) == ("on a time", 1)
        hand.press("\x7f")
        await hand.until(lambda: hand.shown == "pon a time")
        assert len(hand.model.asked) == 1
        await hand.type("X")
        assert hand.shown == ""
        assert (await hand.question(2)).before == "Once uX"
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once uX"


def test_escape_hides_it_and_it_is_not_asked_for_again_until_something_is_typed() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once")
        await hand.question(1)
        await hand.ghost(" upon")
        hand.press(ESCAPE)
        await hand.until(lambda: not hand.shown)
        await hand.settled()
        assert len(hand.model.asked) == 1
        await hand.type(",")
        await hand.question(2)
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once,"


def test_escape_drops_a_question_that_is_waited_for() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once")
        first = await hand.question(1)
        hand.press(ESCAPE)
        await hand.until(lambda: hand.model.waiting is None)
        hand.model.answer([Found(" upon", 0.5)], first)  # it was too late to be stopped
        await hand.settled()
        assert hand.shown == ""
        hand.press(ENTER)

    assert on_a_line(scenario) == "Once"


def test_the_model_is_asked_when_the_keys_have_paused_and_a_key_cancels() -> None:
    clock = Clock()

    async def scenario(hand: Hand) -> None:
        await hand.type("On")
        await hand.type("ce")
        assert [seconds for seconds, _ in clock.pending] == [0.001]
        assert hand.model.asked == []
        clock.strike()
        (first,) = hand.model.asked
        assert (first.before, hand.model.waiting) == ("Once", first)
        await hand.type(" u")
        assert hand.model.waiting is None  # the key has dropped it
        hand.model.answer([Found(" upon", 0.5)], first)
        await hand.settled()
        assert hand.shown == ""
        clock.strike()
        assert [each.before for each in hand.model.asked] == ["Once", "Once u"]
        hand.press(ENTER)

    assert on_a_line(scenario, clock) == "Once u"


def test_alternatives_are_chosen_from_with_the_arrows() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("The")
        await hand.question(1)
        await hand.ghost(" king")
        hand.press(CTRL_SPACE)
        question = await hand.question(2)
        assert (question.menu, question.num > 3, question.min_prob < 0.25) == (True, True, True)
        await hand.ghost(" dog", " cat", " old\nfox")
        await hand.until(lambda: "▸  50.0%   dog" in hand.picture)
        assert "   25.0%   cat" in hand.picture
        assert "   16.7%   old↵fox" in hand.picture
        hand.press(DOWN)
        await hand.until(lambda: hand.shown == " cat")
        await hand.until(lambda: "▸  25.0%   cat" in hand.picture)
        assert hand.picture[0] == "> The cat"
        hand.press(UP + UP)
        await hand.until(lambda: hand.shown == " old\nfox")
        hand.press(CTRL_SPACE)
        await hand.until(lambda: hand.shown == " dog")
        hand.press(DOWN + ENTER)  # takes it, and does not accept the line
        await hand.until(lambda: hand.buffer.text == "The cat")
        await hand.until(lambda: not any("%" in line for line in hand.picture))
        await hand.question(3)
        hand.press(ENTER)

    assert on_a_line(scenario) == "The cat"


def test_escape_closes_the_alternatives_and_what_was_there_is_back() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("The")
        await hand.question(1)
        await hand.ghost(" king")
        hand.press(CTRL_SPACE)
        await hand.question(2)
        await hand.ghost(" dog", " cat")
        hand.press(ESCAPE)
        await hand.until(lambda: hand.shown == " king")
        await hand.until(lambda: not any("%" in line for line in hand.picture))
        hand.press(ENTER)

    assert on_a_line(scenario) == "The"


def test_typing_on_closes_the_alternatives_and_keeps_the_one_that_it_agrees_with() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("The")
        hand.press(CTRL_SPACE)
        await hand.until(lambda: hand.model.asked and hand.model.asked[-1].menu)
        await hand.ghost(" dog", " cat")
        asked = len(hand.model.asked)
        hand.press(DOWN)
        await hand.until(lambda: hand.shown == " cat")
        await hand.type(" c")
        assert (hand.shown, len(hand.model.asked)) == ("at", asked)
        await hand.until(lambda: not any("%" in line for line in hand.picture))
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "The cat")
        hand.press(ENTER)

    assert on_a_line(scenario) == "The cat"


def test_where_nothing_is_likely_alternatives_are_asked_for_once_more() -> None:
    async def scenario(hand: Hand) -> None:
        hand.press(CTRL_SPACE)
        first = await hand.question(1)
        assert (first.before, first.min_prob > 0) == ("", True)
        hand.model.answer([])
        second = await hand.question(2)
        assert (second.menu, second.min_prob) == (True, 0)
        hand.model.answer([])
        await hand.until(lambda: "nothing comes to its mind here" in hand.picture)
        hand.press("x" + ENTER)

    assert on_a_line(scenario) == "x"


def test_nothing_is_asked_for_an_empty_line_but_for_one_that_begins_with_something() -> None:
    clock = Clock()

    async def empty(hand: Hand) -> None:
        await hand.type("  ")
        await hand.settled()
        assert clock.pending == []
        hand.press(ENTER)

    async def begun(hand: Hand) -> None:
        assert (await hand.question(1)).before == "Once upon"
        await hand.ghost(" a time")
        hand.press(TAB + ENTER)

    assert on_a_line(empty, clock) == "  "
    assert on_a_line(begun, initial="Once upon") == "Once upon a time"


def test_text_behind_the_cursor_is_asked_with_and_pushed_aside() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("The barked")
        await hand.question(1)
        hand.press(LEFT * 7)
        await hand.until(lambda: hand.buffer.cursor_position == 3)
        await hand.settled()
        asked = len(hand.model.asked)  # walking through a text asks for nothing
        await hand.type(" old")
        question = await hand.question(asked + 1)
        assert (question.before, question.after) == ("The old", " barked")
        await hand.ghost(" dog")
        await hand.until(lambda: hand.picture[0] == "> The old dog barked")
        cursor = hand.screen.app.renderer.last_rendered_screen.get_cursor_position(
            hand.screen.app.layout.current_window
        )
        assert (cursor.y, cursor.x) == (0, len("> The old"))
        hand.press(RIGHT)  # moves: there is text to move over
        await hand.until(lambda: hand.buffer.cursor_position == len("The old "))
        hand.press(LEFT)
        await hand.until(lambda: hand.shown == " dog")
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "The old dog barked")
        hand.press(ENTER)

    assert on_a_line(scenario) == "The old dog barked"


def test_wide_characters_stand_where_they_should() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("東京は")
        await hand.question(1)
        await hand.ghost("日本の首都")
        await hand.until(lambda: hand.picture[0].replace(" ", "") == ">東京は日本の首都")
        screen = hand.screen.app.renderer.last_rendered_screen
        cursor = screen.get_cursor_position(hand.screen.app.layout.current_window)
        assert cursor.x == 2 + 3 * 2
        hand.press(RIGHT)
        await hand.until(lambda: hand.buffer.text == "東京は日")
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "東京は日本の首都")
        hand.press(ENTER)

    assert on_a_line(scenario) == "東京は日本の首都"


def test_several_lines_by_hand_and_by_paste() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("one")
        await hand.question(1)
        await hand.ghost(" more")
        hand.press(ALT_ENTER)  # with a ghost to be hidden by Esc, too
        await hand.until(lambda: hand.buffer.text == "one\n")
        hand.press("\x1b[200~two\r\nthree\tfour\x1b[201~")
        await hand.until(lambda: hand.buffer.text == "one\ntwo\nthree\tfour")
        await hand.until(lambda: hand.picture[:2] == ["> one", "… two"])
        hand.press(ENTER)

    assert on_a_line(scenario) == "one\ntwo\nthree\tfour"


def test_tab_without_a_ghost_asks_at_once() -> None:
    clock = Clock()

    async def scenario(hand: Hand) -> None:
        await hand.type("The")
        assert hand.model.asked == []
        hand.press(TAB)
        assert (await hand.question(1)).before == "The"
        assert (hand.buffer.text, clock.pending) == ("The", [])
        hand.press(ENTER)

    assert on_a_line(scenario, clock) == "The"


def test_how_the_model_is_and_what_went_wrong_is_told_below() -> None:
    async def scenario(hand: Hand) -> None:
        hand.model.state = "loading"
        hand.model.changed()
        await hand.until(lambda: any("tiny is loading…" in line for line in hand.picture))
        hand.model.state = "cold"
        hand.model.changed()
        await hand.until(lambda: any("tiny (cold)" in line for line in hand.picture))
        hand.model.state, hand.model.why = "failed", "its file is damaged"
        hand.model.changed()
        await hand.until(lambda: any("no model: its file is damaged" in line for line in hand.picture))
        await hand.type("x")
        await hand.question(1)
        hand.model.answer(LimitError("the context is too short", "do something"))
        await hand.until(lambda: any("the context is too short" in line for line in hand.picture))
        await hand.type("y")
        await hand.until(lambda: not any("too short" in line for line in hand.picture))
        hand.press(ENTER)

    assert on_a_line(scenario) == "xy"


def test_a_fault_of_ours_is_told_and_the_text_stays() -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("x")
        await hand.question(1)
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await hand.until(lambda: any("a fault of gptcli: ZeroDivisionError" in line for line in hand.picture))
        hand.press(ENTER)

    assert on_a_line(scenario) == "x"


def test_ctrl_d_leaves_an_empty_line_and_deletes_in_another() -> None:
    async def leave(hand: Hand) -> None:
        await hand.settled()
        hand.press("\x04")

    async def delete(hand: Hand) -> None:
        await hand.type("ab")
        hand.press("\x01\x04")
        await hand.until(lambda: hand.buffer.text == "b")
        hand.press(ENTER)

    assert on_a_line(leave) is None
    assert on_a_line(delete) == "b"


def test_history_is_walked_through_and_searched(tmp_path: Path) -> None:
    kept = tmp_path / "history"

    async def write(hand: Hand) -> None:
        await hand.type("the first")
        hand.press(ENTER)

    async def several(hand: Hand) -> None:
        await hand.type("one")
        hand.press(ALT_ENTER)
        await hand.until(lambda: hand.buffer.text == "one\n")
        await hand.type("two")
        hand.press(ENTER)

    async def walk(hand: Hand) -> None:
        await hand.until(lambda: len(hand.buffer._working_lines) == 3)
        hand.press(UP)
        await hand.until(lambda: hand.buffer.text == "one\ntwo")
        hand.press(UP)  # to its first line
        hand.press(UP)
        await hand.until(lambda: hand.buffer.text == "the first")
        hand.press(ENTER)

    async def search(hand: Hand) -> None:
        await hand.until(lambda: len(hand.buffer._working_lines) >= 3)
        hand.press("\x12")
        await hand.until(lambda: hand.screen.app.layout.is_searching)
        hand.press("wo")
        await hand.until(lambda: any("two" in line for line in hand.picture))
        hand.press(ENTER)
        await hand.until(lambda: not hand.screen.app.layout.is_searching)
        assert hand.buffer.text == "one\ntwo"
        hand.press(ENTER)

    for scenario, accepted in ((write, "the first"), (several, "one\ntwo"), (walk, "the first"), (search, "one\ntwo")):
        assert on_a_line(scenario, history=kept) == accepted
