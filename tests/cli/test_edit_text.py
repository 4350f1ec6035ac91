"""Keys in a text: saving, leaving, undoing, searching, and ghost text between its lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")

from gptcli.cli.edit_file import TextFile
from gptcli.cli.edit_text import TextScreen
from tests.cli.editing import ENTER, ESCAPE, RIGHT, TAB, Clock, Hand, play


@pytest.fixture
def in_text(tmp_path: Path) -> Callable[..., Any]:
    """Play a scenario at a file that holds a text."""

    def run(scenario: Callable[[Hand], Any], text: str = "", clock: Clock | None = None) -> Any:
        (tmp_path / "story.txt").write_text(text)
        file = TextFile(tmp_path / "story.txt")
        return play(lambda *args, **given: TextScreen(file, *args, **given), scenario, clock)

    return run


def test_saving_and_leaving(in_text: Callable[..., Any], tmp_path: Path) -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("Once ")
        await hand.until(lambda: any("story.txt* 1:6 │ tiny (warm)" in line for line in hand.picture))
        hand.press("\x13")
        await hand.until(lambda: any("10 bytes are saved" in line for line in hand.picture))
        assert (tmp_path / "story.txt").read_text() == "Once upon\n"
        assert any("story.txt  1:6" in line for line in hand.picture)
        hand.press("\x18")

    assert in_text(scenario, "upon\n") == 0


@pytest.mark.parametrize(("key", "left", "written"), [("y", True, "xa\n"), ("n", True, "a\n"), (ESCAPE, False, "a\n")])
def test_leaving_with_changes_asks(
    in_text: Callable[..., Any], tmp_path: Path, key: str, left: bool, written: str
) -> None:
    async def scenario(hand: Hand) -> None:
        await hand.type("x")
        hand.press("\x11")
        await hand.until(lambda: any("Save the changes" in line for line in hand.picture))
        hand.press("qz" + ENTER)  # no answers
        hand.press(key)
        if not left:
            await hand.until(lambda: not any("Save the changes" in line for line in hand.picture))
            assert hand.buffer.text == "xa"
            hand.press("\x11")
            await hand.until(lambda: any("Save the changes" in line for line in hand.picture))
            hand.press("n")

    assert in_text(scenario, "a\n") == 0
    assert (tmp_path / "story.txt").read_text() == written


def test_a_file_that_somebody_else_changed_is_not_written_over_unasked(
    in_text: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "story.txt"

    async def scenario(hand: Hand) -> None:
        await hand.type("x")
        file.write_text("theirs\n")
        hand.press("\x13")
        await hand.until(lambda: any("has changed on the disk meanwhile" in line for line in hand.picture))
        hand.press("n")
        await hand.until(lambda: not any("has changed on the disk meanwhile" in line for line in hand.picture))
        assert file.read_text() == "theirs\n"
        hand.press("\x13")
        await hand.until(lambda: any("has changed on the disk meanwhile" in line for line in hand.picture))
        hand.press("y")
        await hand.until(lambda: any("are saved" in line for line in hand.picture))
        assert file.read_text() == "xa\n"
        hand.press("\x18")

    assert in_text(scenario, "a\n") == 0


def test_what_can_not_be_saved_is_told_and_the_text_stays(
    in_text: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptcli.core import files
    from gptcli.errors import OutputError

    def full(*args: object, **more: object) -> None:
        raise OutputError("story.txt could not be written: no space", "make room")

    async def scenario(hand: Hand) -> None:
        await hand.type("x")
        monkeypatch.setattr(files, "write_whole", full)
        hand.press("\x13")
        await hand.until(lambda: any("could not be written: no space: make room" in line for line in hand.picture))
        assert hand.buffer.text == "xa"
        monkeypatch.undo()
        hand.press("\x18")
        await hand.until(lambda: any("Save the changes" in line for line in hand.picture))
        hand.press("y")

    assert in_text(scenario, "a\n") == 0
    assert (tmp_path / "story.txt").read_text() == "xa\n"


def test_undo_and_redo(in_text: Callable[..., Any]) -> None:
    async def scenario(hand: Hand) -> None:
        async def back(key: str, end: str) -> list[str]:
            """The texts on the way to one, by a key pressed again and again."""
            seen: list[str] = []
            while (text := hand.buffer.text) != end:
                seen.append(text)
                hand.press(key)
                await hand.until(lambda: hand.buffer.text not in seen)
            return seen

        await hand.type("One day")
        await hand.question(1)
        await hand.ghost(" a king came")
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "One day a king came")
        undone = await back("\x1a", "")
        assert {"One day a king came", "One day", "One"} <= set(undone)
        assert [*reversed(await back("\x1bz", "One day a king came"))][:2] == undone[1:3]
        hand.press("\x18")
        await hand.until(lambda: any("Save the changes" in line for line in hand.picture))
        hand.press("n")

    assert in_text(scenario) == 0


def test_a_text_is_searched(in_text: Callable[..., Any]) -> None:
    async def scenario(hand: Hand) -> None:
        hand.press("\x05")
        await hand.question(1)
        await hand.ghost(" here")
        await hand.until(lambda: hand.picture[0] == "a cat here")
        hand.press("\x06")
        await hand.until(lambda: hand.screen.app.layout.is_searching)
        hand.press("DOG")
        await hand.until(lambda: any("DOG" in line for line in hand.picture))
        assert hand.picture[:2] == ["a cat", "a dog"]  # no ghost where the cursor may go
        hand.press(ENTER)
        await hand.until(lambda: not hand.screen.app.layout.is_searching)
        assert hand.buffer.document.cursor_position_row == 1
        hand.press("\x06\x06" + ENTER)  # the next one
        await hand.until(lambda: hand.buffer.document.cursor_position_row == 2)
        hand.press("\x18")

    assert in_text(scenario, "a cat\na dog\na dog\n") == 0


def test_tab_before_a_line_is_a_tab_and_within_it_asks(in_text: Callable[..., Any]) -> None:
    clock = Clock()

    async def scenario(hand: Hand) -> None:
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "\t")
        await hand.type("x")
        hand.press(TAB)
        assert (await hand.question(1)).before == "\tx"
        assert hand.buffer.text == "\tx"
        await hand.ghost("yz")
        hand.press(TAB)
        await hand.until(lambda: hand.buffer.text == "\txyz")
        await hand.until(lambda: hand.picture[0] == "    xyz")
        hand.press("\x18")
        await hand.until(lambda: any("Save the changes" in line for line in hand.picture))
        hand.press("n")

    assert in_text(scenario, "", clock) == 0


def test_walking_through_a_text_asks_only_where_a_line_may_go_on(in_text: Callable[..., Any]) -> None:
    clock = Clock()

    async def scenario(hand: Hand) -> None:
        await hand.settled()
        hand.press(RIGHT)
        await hand.until(lambda: hand.buffer.cursor_position == 1)
        await hand.settled()
        assert clock.pending == []
        hand.press("\x05")  # to the end of the line
        await hand.until(lambda: hand.buffer.cursor_position == 7)
        await hand.settled()
        clock.strike()
        (question,) = hand.model.asked
        assert (question.before, question.after) == ("The dog", "\nThe cat")
        hand.press("\x18")

    assert in_text(scenario, "The dog\nThe cat\n", clock) == 0


def test_undo_keeps_no_more_than_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli.cli import edit_typing

    monkeypatch.setattr(edit_typing, "_UNDO_BYTES", 100)
    buffer = edit_typing.TypedBuffer()
    for number in range(50):
        buffer.save_to_undo_stack()
        buffer.insert_text(str(number))
    assert len(buffer._undo_stack) == 16
