"""A real terminal to type at: gptcli in tmux, its screen read back as text."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux to type at")

PATIENCE = float(os.environ.get("TMUX_PATIENCE", 180))  # seconds, far beyond what anything here takes
_PAUSE = 0.02


class Tmux:
    """One window of a tmux of its own."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def call(self, *args: str, stdin: str | None = None) -> str:
        command = ["tmux", "-u", "-f", os.devnull, "-S", str(self._socket), *args]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout

    def type(self, text: str) -> None:
        """Text as it stands, key by key."""
        self.call("send-keys", "-l", "--", text)

    def press(self, *keys: str) -> None:
        """Keys by tmux's names: Enter, C-c, M-Enter."""
        self.call("send-keys", *keys)

    def paste(self, text: str) -> None:
        """Text as a terminal pastes it: between brackets, if the program asked for them."""
        self.call("load-buffer", "-", stdin=text)
        self.call("paste-buffer", "-p", "-r")

    def resize(self, width: int, height: int) -> None:
        self.call("resize-window", "-x", str(width), "-y", str(height))

    def text(self) -> str:
        """What was shown, from the beginning; what was too wide for its line stands as it wrapped."""
        return self.call("capture-pane", "-p", "-S", "-")

    def wait(self, shown: str | Callable[[str], bool]) -> str:
        """Wait until a text is on the screen, or something holds of all that is; returns the screen."""
        holds = shown if callable(shown) else lambda screen: shown in screen
        end = time.monotonic() + PATIENCE
        while not holds(screen := self.text()):
            assert time.monotonic() < end, f"{shown!r} never came:\n{screen}"
            time.sleep(_PAUSE)
        return screen


@contextmanager
def gptcli_in_tmux(
    *args: str | Path, width: int = 90, height: int = 24, environment: Mapping[str, str] | None = None
) -> Iterator[Tmux]:
    """A command line of gptcli; behind its end ``[ended with CODE]`` is on the screen."""
    folder = Path(tempfile.mkdtemp(prefix="tmux-"))  # a socket's path has to be short
    tmux = Tmux(folder / "s")
    command = shlex.join([sys.executable, "-m", "gptcli", *map(str, args)])
    around = {
        **{name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR")},
        "PYTHONPATH": str(ROOT),
        "LC_ALL": "C.UTF-8",
        **(environment or {}),
    }
    # What the keyboard interrupts is gptcli, not the shell that tells how it ended.
    script = f'trap : INT; {command}; echo "[ended with $?]"; exec cat'
    size = ["-x", str(width), "-y", str(height)]
    try:
        subprocess.run(
            ["tmux", "-u", "-f", os.devnull, "-S", str(folder / "s"), "new-session", "-d", *size, "sh", "-c", script],
            env=around,
            check=True,
            timeout=PATIENCE,
        )
        yield tmux
    finally:
        subprocess.run(["tmux", "-S", str(folder / "s"), "kill-server"], capture_output=True, timeout=PATIENCE)
        shutil.rmtree(folder, ignore_errors=True)
