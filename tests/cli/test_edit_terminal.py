"""gptcli edit as a person has it: keys into a real terminal, and what that shows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gptcli.cli.state import state_folder
from gptcli.serve.place import Place, runtime_folder
from tests.cli.shells import Answer, StandIn
from tests.cli.tmux import Tmux, gptcli_in_tmux, needs_tmux
from tests.conftest import ROOT
from tests.test_docs import documented

pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")
pytestmark = needs_tmux

_GHOST = "\x1b[90m"  # what begins text in the ghost's colour

Serve = Callable[[Answer], StandIn]


@pytest.fixture
def serve(tiny_folder: Path) -> Iterator[Serve]:
    """A stand-in for the warm process of the tiny model, which answers what the test says."""
    with ExitStack() as stack:

        def start(answer: Answer) -> StandIn:
            server = StandIn(Place.of(runtime_folder(), tiny_folder).socket, answer)
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture
def edit(tiny_folder: Path) -> Iterator[Callable[..., Tmux]]:
    """``gptcli edit`` of the tiny model, when it has its model (or has not, with ``ready=""``)."""
    with ExitStack() as stack:

        def start(*args: str | Path, ready: str = "tiny (warm)", width: int = 90, height: int = 16) -> Tmux:
            command = ("edit", "-m", tiny_folder, "--deadline", "60s", *args)
            tmux = stack.enter_context(gptcli_in_tmux(*command, width=width, height=height))
            tmux.wait(ready or ">")
            return tmux

        yield start


def after(tails: dict[str, str]) -> Answer:
    """Answers that go on with what the prefix ends with; nothing where it ends otherwise."""
    return lambda asked: [tail for end, tail in tails.items() if asked["prefix"].endswith(end)][:1]


def suggested(folder: Path, prefix: str) -> str:
    """What the model itself says."""
    from gptcli.core.build import open_model
    from gptcli.core.complete import complete
    from gptcli.text.tokenizer import Tokenizer

    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    text = complete(model, prefix, num=1, max_tokens=8).completions[0].text
    assert text.isprintable()
    return text


def ended(tmux: Tmux, code: int = 0) -> str:
    """What is still on the screen when it has ended so; not what was taken off it, which tmux remembers."""
    tmux.wait(f"[ended with {code}]")
    return tmux.call("capture-pane", "-p")


def colored(tmux: Tmux) -> str:
    """What stands on the screen, with its colours."""
    return tmux.call("capture-pane", "-p", "-e")


def test_a_line_with_ghost_text_goes_to_stdout(serve: Serve, edit: Callable[..., Tmux], tmp_path: Path) -> None:
    serve(after({"Once": " upon a time, there was", "there": " lived a cat.", "was": " a king."}))
    tmux = edit()
    tmux.type("Once")
    tmux.wait("> Once upon a time, there was")
    assert f"Once{_GHOST} upon a time, there was" in colored(tmux)
    tmux.press("Right")
    tmux.wait(lambda _: f"Once upon{_GHOST} a time, there was" in colored(tmux))
    tmux.type(" a t")  # as it says
    tmux.wait(lambda _: f"Once upon a t{_GHOST}ime, there was" in colored(tmux))
    tmux.press("Tab")
    tmux.wait(lambda _: f"Once upon a time, there was{_GHOST} a king." in colored(tmux))
    tmux.press("Escape")
    tmux.wait(lambda screen: "a king." not in screen)
    tmux.press("Enter")
    # The line that was drawn is gone, and stands there as the answer.
    assert ended(tmux).split("\n")[:2] == ["Once upon a time, there was", "[ended with 0]"]


def test_alternatives_with_their_probabilities(serve: Serve, edit: Callable[..., Tmux]) -> None:
    server = serve(lambda asked: [" dog", " 猫 だ", " bird"] if asked["num"] > 1 else [])  # type: ignore[operator]
    tmux = edit()
    tmux.type("The")
    tmux.press("C-Space")
    screen = tmux.wait("▸  50.0%   dog")
    assert "   25.0%   猫 だ" in screen
    assert "   16.7%   bird" in screen
    tmux.press("Down")
    tmux.wait("▸  25.0%")
    tmux.wait("> The 猫 だ")
    tmux.press("Escape")
    tmux.wait(lambda screen: "%" not in screen and "猫" not in screen)
    tmux.press("C-Space")
    tmux.wait("▸  50.0%   dog")
    tmux.press("Up", "Enter")
    tmux.wait(lambda screen: "> The bird" in screen and "%" not in screen)
    tmux.press("Enter")
    assert ended(tmux).startswith("The bird\n")
    assert all(float(asked["min_prob"]) <= 0.05 for asked in server.asked)


def test_the_next_key_drops_a_question(serve: Serve, edit: Callable[..., Tmux]) -> None:
    server = serve(lambda asked: [" upon"] if asked["prefix"].endswith("!") else None)
    tmux = edit()
    tmux.type("Once")
    tmux.wait(lambda _: bool(server.asked))  # it is being answered, for ever
    tmux.type("!")
    tmux.wait("> Once! upon")
    assert "!" not in server.dropped.get(timeout=180)["prefix"]
    tmux.press("Enter")
    tmux.wait("[ended with 0]")


def test_ctrl_c_leaves_nothing_on_stdout_and_ctrl_d_neither(
    serve: Serve, edit: Callable[..., Tmux], tmp_path: Path
) -> None:
    serve(lambda asked: [])
    tmux = edit()
    tmux.type("no")
    tmux.wait("> no")
    tmux.press("C-c")
    assert "no" not in ended(tmux, 130)
    tmux = edit()
    tmux.press("C-d")
    assert ended(tmux).strip() == "[ended with 0]"


def test_in_a_shells_substitution_the_screen_is_still_there(serve: Serve, tiny_folder: Path, tmp_path: Path) -> None:
    """stdout and stdin are elsewhere: keys come from the terminal, and it is drawn on it."""
    serve(after({"Dear": " Lily,"}))
    command = (
        f"printf 'Dear' | {sys.executable} -m gptcli edit --deadline 60s -m {tiny_folder} | od -c > {tmp_path}/out"
    )
    script = tmp_path / "script.sh"
    script.write_text(command)
    with gptcli_in_tmux("--version") as tmux:
        tmux.wait("[ended with 0]")
        tmux.call("respawn-pane", "-k", "-e", f"PYTHONPATH={ROOT}", f'sh {script}; echo "[ended with $?]"; exec cat')
        tmux.wait(lambda _: f"Dear{_GHOST} Lily," in colored(tmux))
        tmux.press("Tab")
        tmux.wait(lambda screen: "> Dear Lily," in screen and _GHOST + " Lily," not in colored(tmux))
        tmux.press("Enter")
        assert ended(tmux).startswith("> Dear Lily,\n[ended")  # it stays, since the answer went elsewhere
    assert re.sub(r"^\d+|\s", "", (tmp_path / "out").read_text().split("\n")[0]) == r"DearLily,\n"


def test_lines_are_kept_for_their_user_alone(serve: Serve, edit: Callable[..., Tmux]) -> None:
    serve(lambda asked: [])
    tmux = edit()
    tmux.paste("one\n二")
    tmux.wait("> one\n… 二")
    tmux.press("Enter")
    tmux.wait("[ended with 0]")
    history = state_folder() / "edit_history"
    assert (history.stat().st_mode & 0o777, state_folder().stat().st_mode & 0o777) == (0o600, 0o700)
    kept = history.read_bytes()
    tmux = edit("--no-history")
    tmux.type("another")
    tmux.wait("> another")
    tmux.press("Up")
    tmux.press("Enter")
    assert ended(tmux).startswith("another\n")
    assert history.read_bytes() == kept
    tmux = edit()
    tmux.press("Up")
    tmux.wait("> one\n… 二")
    tmux.press("Enter")
    tmux.wait("[ended with 0]")


def test_a_file_is_edited_saved_and_left(serve: Serve, edit: Callable[..., Tmux], tmp_path: Path) -> None:
    server = serve(after({"dog": " was happy", "犬": "は嬉しい"}))
    file = tmp_path / "story.txt"
    file.write_bytes(b"A king.\r\nThe barked.\r\n")
    tmux = edit(file)
    assert tmux.wait("story.txt  1:1 ").startswith("A king.\nThe barked.\n")
    tmux.press("Down", "Right", "Right", "Right")
    tmux.wait("story.txt  2:4 ")
    tmux.type(" dog")
    tmux.wait("\nThe dog was happy barked.\n")  # the ghost pushes aside what is behind it
    assert "story.txt* 2:8 " in tmux.text()
    assert (server.asked[-1]["prefix"], server.asked[-1]["suffix"]) == ("A king.\nThe dog", " barked.")
    tmux.press("Tab")
    tmux.wait("story.txt* 2:18 ")
    tmux.press("C-s")
    tmux.wait("bytes are saved")
    assert file.read_bytes() == b"A king.\r\nThe dog was happy barked.\r\n"
    tmux.press("C-End")
    tmux.press("Enter")
    tmux.type("犬")
    tmux.wait("\n犬は嬉しい\n")
    tmux.press("Tab")
    tmux.wait("story.txt* 3:6 ")
    tmux.press("C-x")
    tmux.wait("Save the changes?")
    tmux.press("y")
    tmux.wait("[ended with 0]")
    assert file.read_bytes().decode() == "A king.\r\nThe dog was happy barked.\r\n犬は嬉しい\r\n"


def test_with_vis_keys(serve: Serve, edit: Callable[..., Tmux], tmp_path: Path) -> None:
    serve(after({"Once": " upon a time"}))
    file = tmp_path / "story.txt"
    tmux = edit("--vi", file)
    tmux.type("Once")
    tmux.wait("Once upon a time\n")
    tmux.press("Escape")
    tmux.wait(lambda screen: "1:4 " in screen and "upon" not in screen)
    tmux.type("0iAt ")
    tmux.wait("At Once")
    tmux.press("Escape")
    tmux.wait("1:3 ")
    tmux.type("$a")
    tmux.wait("1:8 ")
    tmux.press("C-s")
    tmux.wait("bytes are saved")
    assert file.read_text() == "At Once\n"
    tmux.press("C-x")
    tmux.wait("[ended with 0]")


def test_the_window_may_change_its_size(serve: Serve, edit: Callable[..., Tmux], tmp_path: Path) -> None:
    serve(after({"fit": ", 東京 neither"}))
    file = tmp_path / "new.txt"
    tmux = edit(file, width=80, height=12)
    tmux.wait("a new file")
    text = "a long line of many words, 東京 among them, that does not fit"
    tmux.type(text)
    tmux.wait(f"{text}, 東京 neither")
    tmux.resize(30, 9)
    tmux.wait(lambda screen: "a long line of many words," in screen and text not in screen and "tiny (warm)" in screen)
    tmux.resize(20, 3)  # hardly a screen
    tmux.wait(lambda screen: screen.count("\n") <= 3 and "new.txt* 1:60 │ ti" in screen)
    tmux.resize(100, 14)
    tmux.wait(f"{text}, 東京 neither\n")
    tmux.press("Tab")
    tmux.wait(lambda _: f"{text}, 東京 neither" in colored(tmux) and _GHOST + ", 東京" not in colored(tmux))
    tmux.press("C-s")
    tmux.wait("bytes are saved")
    assert file.read_text() == f"{text}, 東京 neither\n"
    tmux.press("C-q")
    tmux.wait("[ended with 0]")


def test_a_line_may_change_its_size(serve: Serve, edit: Callable[..., Tmux]) -> None:
    serve(after({"fit": ", 東京 neither"}))
    text = "a long line of many words, 東京 among them, that does not fit"
    tmux = edit()
    tmux.type(text)
    tmux.wait(f"> {text}, 東京 neither")
    tmux.resize(40, 12)
    tmux.wait(lambda screen: "> a long line of many words" in screen and text not in screen)
    tmux.resize(110, 20)
    tmux.wait(f"> {text}, 東京 neither")
    tmux.press("Tab", "Enter")
    assert f"{text}, 東京 neither\n[ended with 0]" in ended(tmux)


def test_what_a_model_says_can_not_reach_the_terminal_as_commands(serve: Serve, edit: Callable[..., Tmux]) -> None:
    serve(after({"a": " good\x1b[2J\x1b]0;title\x07"}))
    tmux = edit()
    tmux.type("a")
    tmux.wait("> a good\n")
    tmux.press("Tab", "Enter")
    assert ended(tmux).startswith("a good\n")


def test_a_dead_server_and_no_server_load_the_model_here(
    serve: Serve, edit: Callable[..., Tmux], tiny_folder: Path
) -> None:
    """While it loads one types; then there is the ghost that ``complete`` would suggest."""
    serve(lambda asked: []).close()  # its socket is still there
    ghost = suggested(tiny_folder, "Once upon a")
    tmux = edit("--min-prob", "0", "--max-tokens", "8", ready="tiny is loading…")
    tmux.type("Once upon a")
    tmux.wait("> Once upon a")
    tmux.wait("tiny (cold)")
    tmux.wait(f"> Once upon a{ghost}")
    tmux.press("Tab")
    tmux.wait(lambda _: f"Once upon a{ghost}" in colored(tmux))
    tmux.press("Enter")
    assert ended(tmux).startswith(f"Once upon a{ghost}\n")


def test_a_real_warm_process_and_its_end(edit: Callable[..., Tmux], tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptcli", "serve", "-m", str(tiny_folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    try:
        assert server.stderr is not None
        assert any(b"is warm at" in line for line in server.stderr)
        ghost = suggested(tiny_folder, "The king")
        file = tmp_path / "story.txt"
        tmux = edit(file, "--json", "--min-prob", "0", "--max-tokens", "8")
        tmux.type("The king")
        tmux.wait(f"The king{ghost}")
        tmux.press("Tab")
        tmux.wait(f"1:{len('The king' + ghost) + 1} ")
        server.kill()
        server.wait()
        tmux.type(" The king")  # the model is then loaded here
        tmux.wait("tiny (cold)")
        tmux.press("C-s")
        tmux.wait("bytes are saved")
        tmux.press("C-c")
        screen = ended(tmux, 130)
        text = f"The king{ghost} The king"
        shown = json.loads(screen.split("[ended")[0].replace("\n", ""))
        assert shown == {
            "text": text,
            "file": str(file),
            "saved": True,
            "model": tiny_folder.name,
            "device": "cpu",
            "dtype": "float32",
            "quantize": "none",
        }
        assert set(shown) == documented("edit")
        assert file.read_text() == text + "\n"
    finally:
        server.kill()
        server.wait()
        assert server.stderr is not None
        server.stderr.close()


def test_a_terminal_that_goes_leaves_the_text_beside(serve: Serve, edit: Callable[..., Tmux], tmp_path: Path) -> None:
    serve(lambda asked: [])
    file, beside = tmp_path / "story.txt", tmp_path / "story.txt.unsaved"
    tmux = edit(file)
    tmux.type("not saved")
    tmux.wait("not saved")
    tmux.call("kill-server")
    end = time.monotonic() + 180
    while not (beside.exists() and beside.read_text() == "not saved\n"):
        assert time.monotonic() < end, "it was not kept"
        time.sleep(0.02)
    assert not file.exists()
