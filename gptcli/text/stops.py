"""Stop strings, matched on text: what could still become a stop is held back, and a stop never shows."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Watches streamed text for any of some strings.

    The text let through, in all, is everything before the stop that is first complete (of several, the one that begins
    earliest), however the text comes in pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """``(text that may be shown now, whether a stop was found)``; after a stop nothing more should be pushed."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back and has become no stop."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
