"""One key at a time: what ``gptcli trace --step`` waits for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from gptcli.cli.keyboard import raised_on_termination
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
    with _keyboard() as keyboard:
        for number, card in enumerate(cards, 1):
            for line in card:
                out.data(line)
            if number < len(cards) and _key(out, keyboard, f"{_ASK} ({number}/{len(cards)})") in _ENDS:
                return


def _key(out: Output, keyboard: int, question: str) -> bytes:
    """Ask for a key and wait for it; the question is taken away again where the terminal can do that."""
    out.stdout.flush()
    with _key_by_key(keyboard):
        try:
            out.data(out.style(question, "dim"), end="")
            out.stdout.flush()
            return os.read(keyboard, 64)  # an arrow key is several bytes
        finally:
            out.data("\n" if os.environ.get("TERM", "dumb") == "dumb" else "\r\x1b[K", end="")
            out.stdout.flush()


@contextlib.contextmanager
def _key_by_key(keyboard: int) -> Iterator[None]:
    """Keys come at once and are not echoed; the terminal is as before whatever ends the block."""
    import termios
    import tty

    before = termios.tcgetattr(keyboard)
    with raised_on_termination():
        try:
            tty.setcbreak(keyboard, termios.TCSADRAIN)  # Ctrl-C and Ctrl-Z keep their meaning
            yield
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
