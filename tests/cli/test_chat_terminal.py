"""gptcli chat as a person has it: keys into a real terminal, and what that shows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptcli.cli.state import state_folder
from tests.cli.chatting import always, save_talker
from tests.cli.tmux import Tmux, gptcli_in_tmux, needs_tmux
from tests.conftest import ROOT

pytest.importorskip("prompt_toolkit", reason="a line to type at needs the extra 'edit'")
pytestmark = needs_tmux


@pytest.fixture(scope="session")
def endless_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers do not end by themselves for a minute and more."""
    return save_talker(tmp_path_factory.mktemp("models") / "endless", 1 << 17)


@pytest.fixture
def letter(endless_folder: Path) -> tuple[str, ...]:
    """Options that have every token be an m."""
    return always(endless_folder)


@pytest.fixture
def talk(endless_folder: Path, letter: tuple[str, ...]) -> Iterator[Tmux]:
    """A conversation, with the cursor at its first line; each answer is one m a token, 12 of them."""
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "12") as tmux:
        tmux.wait("\n>")
        yield tmux


def kept() -> list[dict[str, str]]:
    """The messages that the state folder holds."""
    return json.loads((state_folder() / "chat.jsonl").read_text(encoding="utf-8"))["messages"]


def prompts(screen: str) -> int:
    """How many input lines there were."""
    return len(re.findall(r"^>", screen, flags=re.MULTILINE))


def ready(count: int) -> Callable[[str], bool]:
    """Whether the ``count``-th input line waits for keys."""
    return lambda screen: prompts(screen) == count and screen.rstrip().endswith(">")


def test_a_message_is_answered_and_quit_leaves(talk: Tmux) -> None:
    talk.type("Hello, 東京 👋")
    talk.wait("> Hello, 東京 👋")
    talk.press("Enter")
    screen = talk.wait(ready(2))
    assert "\n" + "m" * 12 + "\n>" in screen
    assert kept() == [
        {"role": "user", "content": "Hello, 東京 👋"},
        {"role": "assistant", "content": "m" * 12},
    ]
    talk.type("/quit")
    talk.press("Enter")
    talk.wait("[ended with 0]")


def test_ctrl_c_ends_the_answer_and_keeps_it(endless_folder: Path, letter: tuple[str, ...]) -> None:
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "-1", "Go") as talk:
        talk.wait("mmmmmmmmmm")
        talk.type("typed too early")  # does not show in the answer
        talk.press("C-c")
        screen = talk.wait(ready(1))
        answer = screen.split("leaves\n", 1)[1].split("\nnote: ended by Ctrl-C")[0].replace("\n", "")
        assert set(answer) == {"m"}
        assert kept() == [{"role": "user", "content": "Go"}, {"role": "assistant", "content": answer}]
        talk.type("no")
        talk.wait("\n> no")
        talk.press("C-c")  # clears the line
        talk.wait(ready(1))
        talk.press("C-c")  # leaves
        talk.wait("[ended with 0]")


def test_a_text_alone_is_answered_and_that_is_all(endless_folder: Path, letter: tuple[str, ...]) -> None:
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "4", "--no-stdin", "Go") as talk:
        assert talk.wait("[ended with 0]").startswith("mmmm\n[ended")


def test_ctrl_d_leaves(talk: Tmux) -> None:
    talk.press("C-d")
    talk.wait("[ended with 0]")


def test_a_paste_of_several_lines_is_one_message(talk: Tmux) -> None:
    talk.paste("one\n  /two\n三\n")
    talk.wait("> one\n…   /two\n… 三")
    talk.press("Enter")
    talk.wait(ready(2))
    assert kept()[0]["content"] == "one\n  /two\n三\n"


def test_lines_are_added_by_hand(talk: Tmux) -> None:
    talk.type("one\\")
    talk.press("Enter")
    talk.wait("> one\n…")
    talk.type("two")
    talk.press("M-Enter")
    talk.type("three")
    talk.wait("> one\n… two\n… three")
    talk.press("Enter")
    talk.wait(ready(2))
    assert kept()[0]["content"] == "one\ntwo\nthree"


def test_the_window_may_change_its_size_while_one_types(talk: Tmux) -> None:
    text = "a long line of many words, 東京 among them, that does not fit"
    talk.type(text)
    talk.wait(text)
    talk.resize(40, 12)
    talk.wait(lambda screen: "a long line of many words" in screen and text not in screen)
    talk.type(", and more")
    talk.wait("and more")
    talk.resize(100, 30)
    talk.wait(f"> {text}, and more")
    talk.press("Enter")
    talk.wait("mmmmmmmmmmmm")
    talk.wait(lambda screen: screen.rstrip().endswith("\n>"))
    assert kept()[0]["content"] == text + ", and more"


def test_commands_are_completed_and_history_is_kept(endless_folder: Path, letter: tuple[str, ...]) -> None:
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "3") as talk:
        talk.wait("\n>")
        talk.type("/sy")
        talk.press("Tab")
        talk.wait("> /system")
        talk.type(" Be brief.")
        talk.press("Enter")
        talk.wait("the system message is set")
        talk.type("first")
        talk.press("Enter")
        talk.wait(ready(3))
        talk.press("C-d")
        talk.wait("[ended with 0]")
    history = state_folder() / "chat_history"
    assert (history.stat().st_mode & 0o777, state_folder().stat().st_mode & 0o777) == (0o600, 0o700)
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-c") as talk:
        talk.wait("2 messages were said before")
        talk.wait(ready(2))
        assert "before\n> first\nmmm\n\x1b[0m" in talk.call("capture-pane", "-p", "-e")  # the last exchange, dimmed
        talk.press("Up")
        talk.wait(lambda screen: screen.count("> first") == 2)


@pytest.mark.parametrize("vi", [False, True])
def test_the_line_is_opened_in_an_editor(
    endless_folder: Path, letter: tuple[str, ...], tmp_path: Path, vi: bool
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nprintf "%s and more\\nlines\\n" "$(cat "$1")" > "$1.new"; mv "$1.new" "$1"\n')
    editor.chmod(0o700)
    around = {"VISUAL": str(editor), "GPTCLI_VI": str(int(vi))}
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "3", environment=around) as talk:
        talk.wait("\n>")
        talk.type("a text")
        talk.wait("> a text")
        talk.press(*(("Escape", "v") if vi else ("C-x", "C-e")))
        talk.wait(ready(2))
        assert kept()[0]["content"] == "a text and more\nlines"


def test_with_vis_keys(endless_folder: Path, letter: tuple[str, ...]) -> None:
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "3", "--vi") as talk:
        talk.wait("\n>")

        def cursor(column: str) -> None:
            talk.wait(lambda _: talk.call("display-message", "-p", "#{cursor_x}").strip() == column)

        talk.type("tell me")
        cursor("9")
        talk.press("Escape")
        cursor("8")
        talk.type("0cetold")
        talk.wait("> told me")
        cursor("6")
        talk.press("Escape")
        cursor("5")
        talk.press("Tab")  # there is nothing to complete
        talk.press("Enter")
        talk.wait(ready(2))
        assert kept()[0]["content"] == "told me"


def test_what_is_typed_can_not_reach_the_terminal_as_commands(talk: Tmux, endless_folder: Path) -> None:
    talk.paste("\x1b]0;title\x07x\x1b[2Jy")
    talk.press("Enter")
    talk.wait(ready(2))
    talk.type("/prompt")
    talk.press("Enter")
    talk.wait("\\x1b]0;title\\x07x\\x1b[2Jy")


def test_without_prompt_toolkit_a_plain_line_does(
    endless_folder: Path, letter: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with gptcli_in_tmux("chat", "-m", endless_folder, *letter, "-n", "4", "--vi", environment=path) as talk:
        talk.wait("pip install 'gptcli[edit]'")
        talk.wait(ready(1))
        talk.type("one \\")
        talk.press("Enter")
        talk.wait("> one \\\n…")
        talk.type("two")
        talk.press("Enter")
        talk.wait("\nmmmm\n>")
        assert kept()[0]["content"] == "one \ntwo"
        talk.type("no")
        talk.wait("\n> no")
        talk.press("C-c")
        talk.wait(ready(3))
        talk.press("C-c")
        talk.wait("[ended with 0]")
