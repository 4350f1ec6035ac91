"""The widgets in real shells: a key, ghosts, what is taken and what is left; nothing goes wrong on the line."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptcli.serve.place import Place, runtime_folder
from tests.cli.shells import Answer, Shell, StandIn, shell_in_tmux
from tests.cli.tmux import needs_tmux
from tests.conftest import PATIENCE, ROOT, Gptcli

pytestmark = [
    needs_tmux,
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which the widgets ask with"),
]
SHELLS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"needs {name} to type at"))
    for name in ("zsh", "bash", "fish")
]
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh to type at")
KEY = "M-\\"

Open = Callable[..., Shell]


@pytest.fixture
def place(tiny_folder: Path) -> Place:
    return Place.of(runtime_folder(), tiny_folder)


@pytest.fixture
def served(place: Place) -> Iterator[Callable[[Answer], StandIn]]:
    """A stand-in for the warm process, which answers what the test says."""
    with ExitStack() as stack:

        def serve(answer: Answer) -> StandIn:
            server = StandIn(place.socket, answer)
            stack.callback(server.close)
            return server

        yield serve


@pytest.fixture
def opened(tiny_folder: Path, tmp_path: Path, gptcli: Gptcli) -> Iterator[Open]:
    """A shell with the widget in it: ``opened("zsh", "--ghost", prompt="> ")``."""
    with ExitStack() as stack:

        def start(name: str, *options: str, **how: Any) -> Shell:
            done = gptcli("shell-init", name, "-m", str(tiny_folder), "--deadline", "100s", *options)
            assert done.returncode == 0, done.stderr
            script = tmp_path / f"widget.{name}"
            script.write_bytes(done.stdout)
            shell = stack.enter_context(shell_in_tmux(name, **how))
            shell.run(f"source {script}")
            return shell

        yield start


def words(*texts: str) -> Answer:
    return lambda asked: list(texts)


@pytest.mark.parametrize("name", SHELLS)
def test_the_script_is_one_that_its_shell_reads(name: str, gptcli: Gptcli, tmp_path: Path) -> None:
    script = tmp_path / "widget"
    script.write_bytes(gptcli("shell-init", name).stdout)
    check = {"zsh": ["zsh", "-n"], "bash": ["bash", "-n"], "fish": ["fish", "--no-execute"]}[name]
    assert subprocess.run([*check, str(script)], capture_output=True, timeout=PATIENCE).stderr == b""
    assert not re.search(rb"@[A-Z_]+@", script.read_bytes())  # all is filled in


@pytest.mark.parametrize("name", SHELLS)
def test_the_key_completes_and_goes_through_the_others(
    name: str, opened: Open, served: Callable[[Answer], StandIn]
) -> None:
    server = served(words(" there", " a time"))
    shell = opened(name)
    shell.type("echo once upon")
    shell.until("echo once upon")
    shell.press(KEY)
    shell.until("echo once upon there")
    shell.press(KEY)
    shell.until("echo once upon a time")
    assert [asked["prefix"] for asked in server.asked] == ["echo once upon"]  # one question, two answers
    shell.press("End")
    shell.type(" x")
    shell.until("echo once upon a time x")
    shell.press("Enter")  # what is on the line is run by nobody but the person
    shell.wait("\nonce upon a time x")


@pytest.mark.parametrize("name", SHELLS)
def test_what_is_behind_the_cursor_goes_along(name: str, opened: Open, served: Callable[[Answer], StandIn]) -> None:
    server = served(words("XY"))
    shell = opened(name)
    shell.type("echo ab")
    shell.until("echo ab")
    shell.press("Left")
    shell.press(KEY)
    shell.until("echo aXYb")
    (asked,) = server.asked
    assert (asked["prefix"], asked["suffix"]) == ("echo a", "b")


@pytest.mark.parametrize("name", SHELLS)
def test_wide_characters_and_a_wide_prompt(name: str, opened: Open, served: Callable[[Answer], StandIn]) -> None:
    server = served(words("世界 é"))
    shell = opened(name, prompt="長い~ ")
    shell.type("echo 你好 ü 'x\"\\")
    shell.until("echo 你好 ü 'x\"\\")
    shell.press(KEY)
    shell.until("echo 你好 ü 'x\"\\世界 é")
    shell.press("End")
    shell.type("'")
    shell.until("echo 你好 ü 'x\"\\世界 é'")
    assert server.asked[0]["prefix"] == "echo 你好 ü 'x\"\\"


@pytest.mark.parametrize("name", SHELLS)
def test_without_a_server_the_key_says_so_and_the_line_stays(
    name: str, opened: Open, place: Place, tiny_folder: Path
) -> None:
    said = "gptcli: the model is not warm; gptcli serve -m"
    shell = opened(name, prompt="two lines\n> " if name == "fish" else "> ", width=140)
    shell.type("echo a")
    shell.until("echo a")
    shell.press(KEY)
    screen = shell.wait(f"\n{said} {tiny_folder} starts it")
    assert (screen.index(said) > screen.index("echo a")) or name == "bash"
    shell.type("b")
    shell.wait("> echo ab")
    dead = socket.socket(socket.AF_UNIX)  # what a killed process leaves
    dead.bind(str(place.socket))
    dead.close()
    shell.press("C-l")
    shell.until("echo ab")
    shell.press(KEY)
    shell.wait(f"\n{said}")
    shell.type("c")
    shell.wait("> echo abc")
    shell.press("Enter")
    shell.wait("\nabc\n")


@pytest.mark.parametrize("name", SHELLS)
def test_a_line_that_wraps_is_drawn_anew_whole(name: str, opened: Open) -> None:
    text = "echo " + "x" * 150
    shell = opened(name, width=60, height=20)
    shell.type(text)
    shell.wait(lambda _: shell.line().replace("\n", "") == text)
    shell.press(KEY)
    shell.wait("gptcli: the model is not warm")
    shell.type("y")
    shell.wait(lambda screen: f"> {text}y" in screen.replace("\n", "") and "gptcli: the model" in screen)
    shell.press("Enter")
    shell.wait(lambda screen: f"\n{'x' * 150}y\n" in screen.replace("x\nx", "xx"))


@needs_zsh
def test_what_was_said_goes_when_a_model_is_warm(opened: Open, served: Callable[[Answer], StandIn]) -> None:
    shell = opened("zsh", "--ghost")
    shell.type("echo a")
    shell.until("echo a")  # nothing is said while one types
    shell.press(KEY)
    shell.wait("gptcli: the model is not warm")
    served(words(" there"))
    shell.press(KEY)
    shell.until("echo a there")
    shell.press("Right")
    shell.press("Enter")
    shell.wait("\na there\n")


@needs_zsh
@pytest.mark.parametrize("key", ["M-f", "C-Right"])
def test_a_word_is_taken_and_the_rest_stays_a_ghost(
    key: str, opened: Open, served: Callable[[Answer], StandIn]
) -> None:
    texts = [" upon a --time, 東京", " under it", " upon all"]
    server = served(lambda asked: texts if asked["prefix"] == "echo once" else [])
    shell = opened("zsh", "--ghost")

    def on_the_line(line: str) -> None:
        """Wait for what stands there without the ghost, and for the ghost again."""
        shell.press("Escape")
        shell.until(line)
        shell.press(KEY)
        shell.until("echo once upon a --time, 東京")

    shell.type("echo once")
    shell.until("echo once upon a --time, 東京")
    shell.press(key)
    shell.press(key)
    on_the_line("echo once upon a")
    shell.press(KEY)
    shell.until("echo once upon all")  # of the others, the one that goes on so
    shell.press(KEY)
    shell.until("echo once upon a --time, 東京")
    shell.press(key)
    on_the_line("echo once upon a --time")
    assert [asked["prefix"] for asked in server.asked if "once" in asked["prefix"]] == ["echo once"]
    shell.press(key)
    shell.press(key)
    shell.type("!")
    shell.until("echo once upon a --time, 東京!")


@needs_zsh
def test_a_word_is_taken_in_vis_keymap_too(opened: Open, served: Callable[[Answer], StandIn]) -> None:
    served(words(" upon a time"))
    shell = opened("zsh")
    shell.run("bindkey -v")
    shell.type("echo once")
    shell.press(KEY)
    shell.until("echo once upon a time")
    shell.press("C-Right")
    shell.type("!")
    shell.until("echo once upon!")


@needs_zsh
def test_without_a_ghost_a_words_keys_do_what_they_did(
    opened: Open, served: Callable[[Answer], StandIn], tmp_path: Path
) -> None:
    served(words(" there"))
    shell = opened("zsh")
    shell.type("echo a b")
    shell.press("C-a")
    shell.press("M-f")
    shell.type("X")
    shell.until("echo Xa b")
    shell.press("C-u")
    # As zsh-autosuggestions has it, a widget in the place of forward-word; and a key of the person's own.
    shell.run("theirs() { zle .forward-word; LBUFFER+=T }; zle -N forward-word theirs")
    shell.run("own() { LBUFFER+=O }; zle -N own; bindkey '^[[1;5C' own; bindkey -M viins '^[[1;5C' own")
    shell.run(f"source {tmp_path}/widget.zsh")
    shell.type("a b")
    shell.press("C-a")
    shell.press("M-f")
    shell.until("a Tb")
    shell.press("C-Right")
    shell.until("a TOb")
    shell.press("C-u")
    shell.press("C-k")
    shell.run("gptcli-unload")
    shell.type("bindkey '^[f'; bindkey '^[[1;5C'; bindkey -M viins '^[[1;5C'")
    shell.press("Enter")
    shell.wait('"^[f" forward-word\n"^[[1;5C" own\n"^[[1;5C" own\n')


@needs_zsh
def test_a_server_that_never_answers_holds_up_no_typing(opened: Open, served: Callable[[Answer], StandIn]) -> None:
    server = served(lambda asked: None)
    shell = opened("zsh", "--ghost")
    shell.type("echo a")
    shell.until("echo a")
    shell.press(KEY)
    server.wait(lambda asked: "echo a" in [each["prefix"] for each in asked])  # the next key hangs up
    shell.type("bc")
    shell.until("echo abc")
    shell.press("Enter")
    shell.wait("\nabc")


@pytest.mark.parametrize("name", SHELLS)
def test_what_a_model_says_is_never_more_than_text(
    name: str, opened: Open, served: Callable[[Answer], StandIn]
) -> None:
    served(words("$(echo run)`echo run`;\x1b[31m \\n"))
    shell = opened(name)
    shell.type("echo '")
    shell.press(KEY)
    shell.until("echo '$(echo run)`echo run`;[31m \\n")
    shell.press("End")
    shell.type("'")
    shell.press("Enter")
    shell.wait(lambda screen: "$(echo run)`echo run`;[31m" in screen.rpartition("31m \\n'")[2])


@pytest.mark.parametrize("name", SHELLS)
def test_what_commands_say_on_stderr_is_seen_after_the_key(
    name: str, opened: Open, served: Callable[[Answer], StandIn]
) -> None:
    """The question has streams of its own; the shell's are left as they are."""
    served(words(" there"))
    shell = opened(name)
    shell.type("echo once")
    shell.until("echo once")
    shell.press(KEY)
    shell.until("echo once there")
    shell.press("C-u")
    shell.until("")
    shell.type("echo st''ill here >&2")
    shell.press("Enter")
    shell.wait("\nstill here")


@pytest.mark.parametrize("name", SHELLS)
def test_unloading_leaves_nothing(name: str, opened: Open, served: Callable[[Answer], StandIn]) -> None:
    server = served(words(" there"))
    shell = opened(name)
    shell.run("gptcli-unload")
    shell.type("echo a")
    shell.until("echo a")
    shell.press(KEY)
    shell.press("End")
    shell.type("b")
    shell.wait(lambda screen: shell.line().startswith("echo a") and shell.line().endswith("b"))
    assert not server.asked
    shell.press("C-u")
    left = {"fish": "functions -a; set -n", "zsh": "typeset -f; typeset", "bash": "declare -f; declare -p"}[name]
    shell.run("clear")
    shell.type(f"{left} | grep -c _gptcli_")
    shell.press("Enter")
    shell.wait("\n0")


@needs_zsh
def test_a_ghost_is_hidden_by_escape_and_by_typing_and_taken_by_right(
    opened: Open, served: Callable[[Answer], StandIn]
) -> None:
    served(words(" there"))
    shell = opened("zsh")
    shell.type("echo once")
    shell.press(KEY)
    shell.until("echo once there")
    shell.press("Escape")
    shell.until("echo once")
    shell.press(KEY)
    shell.until("echo once there")
    shell.type("r")
    shell.until("echo oncer")
    shell.press(KEY)
    shell.until("echo oncer there")
    shell.press("Right")
    shell.type("!")
    shell.until("echo oncer there!")


@needs_zsh
def test_ghosts_come_while_one_types_and_are_not_run(opened: Open, served: Callable[[Answer], StandIn]) -> None:
    server = served(lambda asked: [" there"] if asked["prefix"].endswith("once") else [])
    shell = opened("zsh", "--ghost")
    shell.type("echo once")
    shell.until("echo once there")
    shell.press("Enter")
    shell.wait("\nonce\n")
    assert len(server.asked) < len("echo once")  # not at every key


@contextmanager
def serving(folder: Path) -> Iterator[None]:
    """``gptcli serve`` of a model, ready to answer."""
    command = [sys.executable, "-m", "gptcli", "serve", "-m", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr
        try:
            assert any(b"is warm at" in line for line in process.stderr)
            yield
        finally:
            process.terminate()


@pytest.mark.parametrize("name", SHELLS)
def test_with_a_real_warm_process(name: str, opened: Open, tiny_folder: Path, gptcli: Gptcli) -> None:
    with serving(tiny_folder):
        asked = ("complete", "Once upon", "-m", str(tiny_folder), "--min-prob", "0", "--until", "word")
        wanted = gptcli(*asked).stdout.decode().splitlines()
        shell = opened(name, "--min-prob", "0", "--until", "word")
        shell.type("Once upon")
        shell.until("Once upon")
        shell.press(KEY)
        shell.wait(lambda screen: shell.line().startswith("Once upon") and shell.line() != "Once upon")
        assert shell.line().removeprefix("Once upon").strip() in {text.strip() for text in wanted}
