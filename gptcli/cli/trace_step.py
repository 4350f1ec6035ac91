"""One key at a time: what ``gptcli trace --step`` waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gptcli.cli.out import Output
from gptcli.errors import UsageError

_ASK = "any key goes on, q ends"
_ENDS = (b"", b"q", b"Q", b"\x04")  # nobody there any more, q, Ctrl-D


def check(out: Output) -> None:
    """Raise UsageError where there is no terminal to show steps on, or none to take keys from."""
    if out.json or not out.on_terminal:
        raise UsageError("--step needs a terminal", "leave it out where the output goes to a pipe, a file or JSON")
    with _keyboard():
        pass


def walk(out: Output, cards: Sequence[Sequence[str]]) -> None:
    """Show the cards, waiting for a key between them; Ctrl-C ends the command as ever."""
    erase = os.environ.get("TERM", "") not in ("", "dumb")
    with _keyboard() as keyboard:
        for number, card in enumerate(cards):
            for line in card:
                out.data(line)
            if number + 1 == len(cards):
                return
            asked = out.style(f"{_ASK} ({number + 1}/{len(cards)})", "dim")
            out.data(asked, end="")
            out.stdout.flush()
            try:
                key = read_key(keyboard)
            finally:
                out.data("\r\x1b[K" if erase else "\n", end="")
                out.stdout.flush()
            if key in _ENDS:
                return


def read_key(keyboard: int) -> bytes:
    """Wait for a key without its being echoed or needing Enter; the terminal is as before whatever ends the wait."""
    import termios
    import tty

    before = termios.tcgetattr(keyboard)
    with _raised_on_termination():
        try:
            tty.setcbreak(keyboard, termios.TCSADRAIN)  # Ctrl-C and Ctrl-Z keep their meaning
            return os.read(keyboard, 64)  # an arrow key is several bytes
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _keyboard() -> Iterator[int]:
    """The terminal that keys come from: standard input, or where text is piped in the one that the command runs on."""
    try:
        import termios  # noqa: F401
    except ImportError:
        raise UsageError("--step needs a terminal of the Unix kind", "leave it out") from None
    if sys.stdin is not None and sys.stdin.isatty():
        yield sys.stdin.fileno()
        return
    try:
        opened = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        raise UsageError(
            "--step needs a keyboard, and there is no terminal to read keys from", "leave it out"
        ) from None
    try:
        yield opened
    finally:
        os.close(opened)


@contextlib.contextmanager
def _raised_on_termination() -> Iterator[None]:
    """A request to end becomes an exception, so that what has to be put back is put back."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
