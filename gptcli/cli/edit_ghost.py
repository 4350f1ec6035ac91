"""Ghost text: what is suggested at one place of a text, and what is left of it as one types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.text.ends import end_of

_JOINERS = "\u200c\u200d"  # they are not printable, and words of some scripts need them


@dataclass(frozen=True)
class Found:
    """A text that may stand at the cursor, and its probability."""

    text: str
    probability: float


class Ghost:
    """The suggestions for one place; one of them is shown.

    It stays while what is typed agrees with it, and comes back when that is taken back.

    Attributes:
        found: the suggestions, the best first.
        chosen: the number of the one that is shown.
        menu: whether all of them are shown, to be chosen from.
    """

    def __init__(self) -> None:
        self.found: tuple[Found, ...] = ()
        self.chosen = 0
        self.menu = False
        self._before = self._after = ""
        self._covered: Ghost | None = None

    def show(self, before: str, after: str, found: Sequence[Found], *, menu: bool = False) -> None:
        """Suggest texts between what stands before the cursor and behind it.

        A menu covers what was shown until then: ``close`` uncovers it.
        """
        covered = None
        if menu:
            covered = Ghost()
            covered.__dict__.update(self.__dict__, menu=False, _covered=None)
        self.found, self.chosen, self.menu = tuple(found), 0, menu
        self._before, self._after, self._covered = before, after, covered

    def text(self, before: str, after: str) -> str:
        """What of the shown one is still to come at a place; nothing where it does not belong."""
        if not self.found or after != self._after or not before.startswith(self._before):
            return ""
        typed = before[len(self._before) :]
        whole = self.found[self.chosen].text
        return whole[len(typed) :] if whole.startswith(typed) else ""

    def choose(self, step: int) -> None:
        """Show the one so many below, round and round."""
        self.chosen = (self.chosen + step) % len(self.found)

    def close(self) -> None:
        """Close the menu and show what was there before it."""
        if self._covered is not None:
            self.__dict__.update(self._covered.__dict__)
        self.menu = False

    def settle(self) -> None:
        """Close the menu and stay with the one that is shown."""
        self.menu, self._covered = False, None

    def drop(self) -> None:
        """Suggest nothing."""
        self.__init__()  # type: ignore[misc]


def clean(text: str) -> str:
    """A model's text up to the first character that a terminal would obey and not show, or that nobody would see."""
    for place, char in enumerate(text):
        if not char.isprintable() and char not in "\n\t" and char not in _JOINERS:
            return text[:place]
    return text


def first_word(text: str) -> str:
    """The first word, with the space before it; a line end, where that comes first."""
    end = end_of(text, "word")
    return text if end is None else text[: end or 1]


def on_one_line(text: str) -> str:
    """A text as it is shown where there is one line for it."""
    return text.replace("\n", "↵").replace("\t", " ")
