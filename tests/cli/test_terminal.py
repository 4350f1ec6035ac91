"""A real terminal, and what is different on one: colour, echo, escapes, the last line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gptcli.cli import main
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import PATIENCE

pty = pytest.importorskip("pty")
tty = pytest.importorskip("tty")
ROOT = Path(__file__).parent.parent.parent


class Shown(NamedTuple):
    """How a command ended, and what two terminals showed: one for stdout, one for stderr."""

    code: int
    out: str
    err: str


class Screen:
    """A pseudo-terminal, as raw bytes."""

    def __init__(self) -> None:
        self._primary, self.secondary = pty.openpty()
        tty.setraw(self.secondary)
        self._data = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                block = os.read(self._primary, 1 << 16)
            except OSError:  # Linux: nobody holds the other end
                return
            if not block:
                return
            self._data += block

    def close(self) -> str:
        os.close(self.secondary)
        self._reader.join(PATIENCE)
        os.close(self._primary)
        return self._data.decode("utf-8")


Terminal = Callable[..., Shown]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A command line in this process, with a terminal each for stdout and stderr."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def call(*args: str | Path) -> Shown:
        out, err = Screen(), Screen()
        with (
            os.fdopen(os.dup(out.secondary), "w", encoding="utf-8") as stdout,
            os.fdopen(os.dup(err.secondary), "w", encoding="utf-8") as stderr,
            Path(os.devnull).open() as stdin,
        ):
            for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
                monkeypatch.setattr(sys, name, stream)
            code = main([str(arg) for arg in args])
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        monkeypatch.setattr(sys, "stderr", sys.__stderr__)
        return Shown(code, out.close(), err.close())

    return call


@pytest.fixture
def piped(capfdbinary: pytest.CaptureFixture[bytes]) -> Terminal:
    """The same in a pipe."""

    def call(*args: str | Path) -> Shown:
        code = main([str(arg) for arg in args])
        out, err = capfdbinary.readouterr()
        return Shown(code, out.decode(), err.decode())

    return call


ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    """Text without its colours."""
    return ESCAPE.sub("", text)


@pytest.fixture
def escape_id(tiny_folder: Path) -> int:
    (id_,) = Tokenizer.from_folder(tiny_folder).encode("\x1b")
    return id_


# --- generate


def test_the_prompt_is_echoed_and_the_line_ended_on_a_terminal_alone(
    terminal: Terminal, piped: Terminal, tiny_folder: Path
) -> None:
    command = ("generate", "-m", tiny_folder, "Once upon", "-n", "3", "--seed", "1", "--logit-bias", "77:1000")
    assert piped(*command) == (0, "mmm", "")
    shown = terminal(*command)
    assert (shown.code, plain(shown.out)) == (0, "Once uponmmm\n")
    assert plain(terminal(*command, "--no-echo").out) == "mmm\n"
    assert plain(terminal(*command, "--no-stream").out) == "Once uponmmm\n"


def test_a_line_that_is_ended_is_not_ended_again(terminal: Terminal, tiny_folder: Path) -> None:
    (newline,) = Tokenizer.from_folder(tiny_folder).encode("\n")
    command = ("generate", "-m", tiny_folder, "Once", "-n", "2", "-t", "0", "--logit-bias", f"{newline}:1000")
    assert plain(terminal(*command).out) == "Once\n\n"


def test_control_characters_are_shown_on_a_terminal_and_kept_in_a_pipe(
    terminal: Terminal, piped: Terminal, tiny_folder: Path, escape_id: int
) -> None:
    command = ("generate", "-m", tiny_folder, "a\x07", "-n", "2", "-t", "0", "--logit-bias", f"{escape_id}:1000")
    assert piped(*command, "--echo").out == "a\x07\x1b\x1b"
    shown = terminal(*command, "--color", "never")
    assert shown.out == "a\\x07\\x1b\\x1b\n"
    several = terminal(*command, "--color", "never", "--num-samples", "2", "--seed", "1")
    assert "\x1b" not in several.out
    assert several.out.count("\\x1b\\x1b") == 2


def test_json_can_not_drive_a_terminal(terminal: Terminal, tiny_folder: Path, escape_id: int) -> None:
    shown = terminal("generate", "-m", tiny_folder, "a", "-n", "1", "--logit-bias", f"{escape_id}:1000", "--json")
    assert "\x1b" not in shown.out
    assert json.loads(shown.out)["text"] == "\x1b"


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "[link=http://a]b[/link]", ":smile:", "\\[bold]"])
def test_mark_up_is_text(terminal: Terminal, tiny_folder: Path, text: str) -> None:
    shown = terminal("generate", "-m", tiny_folder, text, "-n", "0", "--seed", "1")
    assert plain(shown.out) == text + "\n"
    failed = terminal("generate", "-m", text, "x")
    assert text in plain(failed.err) or repr(text)[1:-1] in plain(failed.err)
    pieces = plain(terminal("tokenize", "-m", tiny_folder, text).out)
    assert pieces.splitlines()[0] == text


def test_notes_are_on_stderr(terminal: Terminal, tiny_folder: Path) -> None:
    shown = terminal("generate", "-m", tiny_folder, "Once", "-n", "3", "--stats")
    assert "seed" in shown.err
    assert "tokens/s" in shown.err
    assert "note" not in shown.out
    assert "tokens/s" not in shown.out
    quiet = terminal("generate", "-m", tiny_folder, "Once", "-n", "3", "-q")
    assert quiet.err == ""


# --- Colour


def test_colour_is_for_terminals(
    terminal: Terminal, piped: Terminal, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("tokenize", "-m", tiny_folder, "Once upon a time")
    assert ESCAPE.search(terminal(*command).out)
    assert not ESCAPE.search(piped(*command).out)
    assert not ESCAPE.search(terminal(*command, "--color", "never").out)
    assert ESCAPE.search(piped("models", "show", tiny_folder, "--color", "always").out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not ESCAPE.search(terminal(*command).out)
    assert ESCAPE.search(terminal(*command, "--color", "always").out)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in terminal(*command).out


def test_errors_have_colour_on_a_terminal_alone(
    terminal: Terminal, piped: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("count-params", "no-such-model")
    shown = terminal(*command)
    assert shown.code == 3
    assert ESCAPE.search(shown.err)
    assert plain(shown.err) == piped(*command).err
    assert shown.out == ""
    assert "\x1b" not in terminal(*command, "--json").err
    assert "\x1b" not in terminal(*command, "--color", "never").err
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in terminal(*command).err


def test_wrong_use_has_no_colour_if_told_so(terminal: Terminal) -> None:
    assert "\x1b" not in terminal("count-params", "--color", "never", "--bogus").err


def test_json_has_no_colour(terminal: Terminal, tiny_folder: Path) -> None:
    for command in (("tokenize", "-m", tiny_folder, "a", "--json"), ("count-params", "gpt2", "--json")):
        shown = terminal(*command, "--color", "always")
        assert json.loads(shown.out)
        assert "\x1b" not in shown.out


# --- Other commands


def test_tokenize_shows_pieces_ids_and_a_count(terminal: Terminal, piped: Terminal, tiny_folder: Path) -> None:
    command = ("tokenize", "-m", tiny_folder, "Once upon a 東\x1b[2J")
    ids = piped(*command).out.strip()
    pieces, shown_ids, count = plain(terminal(*command).out).splitlines()
    # A character of three tokens: its first bytes are dots, and it shows with its last.
    assert pieces.replace("·", "") == "Once upon a 東\\x1b[2J"
    assert shown_ids == ids
    assert count.startswith(f"{len(ids.split())} tokens")
    assert terminal(*command, "--ids").out == ids + "\n"
    assert terminal(*command, "--count").out == f"{len(ids.split())}\n"


def test_tokenize_without_colour_parts_the_pieces(terminal: Terminal, tiny_folder: Path) -> None:
    shown = terminal("tokenize", "-m", tiny_folder, "abc", "--color", "never")
    assert shown.out.splitlines()[0] == "a|b|c"


def test_decode_is_harmless_on_a_terminal(terminal: Terminal, tiny_folder: Path, escape_id: int) -> None:
    shown = terminal("tokenize", "-m", tiny_folder, "--decode", str(escape_id), "--color", "never")
    assert shown.out == "\\x1b\n"


def test_count_params_draws_bars_on_a_terminal_alone(terminal: Terminal, piped: Terminal) -> None:
    assert "█" in terminal("count-params", "gpt3").out
    assert "█" not in piped("count-params", "gpt3").out


# --- The process border


@pytest.mark.parametrize("environment", [{"TERM": "xterm"}, {"TERM": "xterm", "LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_process_on_a_terminal(tiny_folder: Path, environment: dict[str, str]) -> None:
    screen = Screen()
    done = subprocess.run(
        [sys.executable, "-m", "gptcli", "tokenize", "-m", str(tiny_folder), "東 abc"],
        stdin=screen.secondary,
        stdout=screen.secondary,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=PATIENCE,
    )
    shown = screen.close()
    assert (done.returncode, done.stderr) == (0, b"")
    assert ESCAPE.search(shown)
    assert plain(shown).splitlines()[0].replace("·", "") == "東 abc"


def test_a_terminal_is_never_read_unless_told(tiny_folder: Path) -> None:
    screen = Screen()
    done = subprocess.run(
        [sys.executable, "-m", "gptcli", "tokenize", "-m", str(tiny_folder)],
        stdin=screen.secondary,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=PATIENCE,
    )
    screen.close()
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"nothing to work on" in done.stderr
