"""What the keyboard does while a command has the terminal, and that it is put back whatever ends the command."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within, keys do not show on the terminal that standard input is: they wait for who reads next."""
    try:
        import termios

        keyboard = sys.stdin.fileno()
        before = termios.tcgetattr(keyboard)
    except (ImportError, AttributeError, OSError, ValueError, termios.error):
        yield
        return
    changed = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    with raised_on_termination():
        try:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, changed)
            yield
        finally:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextlib.contextmanager
def interrupts(handle: Callable[[], None]) -> Iterator[None]:
    """Within, Ctrl-C calls ``handle`` and interrupts nothing."""
    before = signal.signal(signal.SIGINT, lambda number, frame: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def raised_on_termination() -> Iterator[None]:
    """A request to end becomes an exception, so that what has to be put back is put back."""
    from gptcli.core.signals import not_ignored

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    heard = not_ignored(signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
