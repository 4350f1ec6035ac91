"""``metrics.jsonl``: the events of a run, read again, without what a resume repeated or a rollback took back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, NotFoundError

Event = dict[str, Any]

FILE_NAME = "metrics.jsonl"
_AT_A_STEP = ("step", "eval", "sample", "save")


def read_events(path: Path) -> list[Event]:
    """The events that count, in order; ``path`` is a run's folder or the file itself.

    A line that was cut off, by a crash or because the run goes on, is left out. Raises NotFoundError if there is no
    file, CorruptError if it holds no event.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        raise NotFoundError(f"{path} has no {FILE_NAME}", "name a folder that gptcli train wrote") from None
    except OSError as error:
        raise NotFoundError(f"{file} can't be read: {error.strerror}", "check its permissions") from None
    events = [event for line in lines if (event := _parsed(line)) is not None]
    if not events and any(line.strip() for line in lines):
        raise CorruptError(f"{file} holds no events of a run", "name a folder that gptcli train wrote")
    return settled(events)


def settled(events: Iterable[Event]) -> list[Event]:
    """Events without those that later ones replaced.

    A run that is resumed, or rolled back, at step N takes back what came after N; of two events of a kind at the same
    step the later one counts.
    """
    kept: list[Event] = []
    reached = 0
    for event in events:
        step, kind = _step(event), event["event"]
        if kind == "rollback":
            step = event.get("to_step") or 0
        if kind in ("start", "rollback"):
            _take_back(kept, step)
            reached = step
        elif kind == "step":
            if step <= reached:
                _take_back(kept, step - 1)
            reached = step
        elif kind in _AT_A_STEP:
            _take_back(kept, step - 1, (kind,))
        kept.append(event)
    return kept


def _take_back(events: list[Event], step: int, kinds: tuple[str, ...] = _AT_A_STEP) -> None:
    """Drop what came after ``step``; steps rise, so all of it stands behind the last event that stays."""
    first = len(events)
    while first and not (events[first - 1]["event"] == "step" and _step(events[first - 1]) <= step):
        first -= 1
    events[first:] = [event for event in events[first:] if event["event"] not in kinds or _step(event) <= step]


def _step(event: Event) -> int:
    return event.get("step") or 0


def _parsed(line: str) -> Event | None:
    """The event of a line, or the one that was written right behind a line that was cut off."""
    start = '{"event"'
    for text in (line, line[line.rfind(start) :] if line.count(start) > 1 else ""):
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    return None
