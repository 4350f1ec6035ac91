"""The log of a run, ``metrics.jsonl``, and the part of a step that nothing may divide."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

from gptcli.core.files import output_errors

Event = dict[str, Any]

METRICS = "metrics.jsonl"


def logged(event: Event, metrics: FileIO) -> Event:
    """Write an event as a line of the log, at once and whole; the event. Raises OutputError when it can't."""
    line = (json.dumps(event) + "\n").encode()
    with output_errors(Path(str(metrics.name))):
        if metrics.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return event


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Within, Ctrl-C waits for the end, so that what is saved then is no half of a step."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *told: came.append(told))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
