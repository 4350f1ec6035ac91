"""Added tokens: texts that become tokens of their own before a text is split and merged."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# White space as the tokenizers library has it, which is Unicode's; Python's own counts U+001C to U+001F as well.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


@dataclass(frozen=True)
class Added:
    """An entry of ``added_tokens``.

    Attributes:
        text: what it is written as.
        id: its id.
        special: whether it is matched only where special tokens are.
        lstrip, rstrip: whether it takes along the white space before and behind it.
        single_word: whether it is matched only where no letter or digit stands beside it.
        normalized: whether it is looked for in the normalized text, normalized itself.
    """

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, raw: Any) -> Added:
        """From an entry of tokenizer.json."""
        flags = ("lstrip", "rstrip", "single_word", "normalized")
        return cls(raw["content"], raw["id"], bool(raw.get("special", True)), *(bool(raw.get(flag)) for flag in flags))


class Marks:
    """Finds added tokens in a text, as the tokenizers library does: the leftmost, of those the longest."""

    def __init__(self, wanted: Sequence[Added], others: Iterable[Added] = ()) -> None:
        """Finds ``wanted``; one of ``others`` is passed over, and what overlaps it with it."""
        shadowing = [other for other in others if any(_overlap(other.text, each.text) for each in wanted)]
        self._tokens = {each.text: each for each in wanted}
        self._flagged = any(each.lstrip or each.rstrip or each.single_word for each in wanted) or bool(shadowing)
        self._find = _alternatives([each.text for each in (*wanted, *shadowing)])

    def within(self, text: str) -> bool:
        """Whether there may be any."""
        return self._find.search(text) is not None

    def cut(self, text: str) -> list[str | int]:
        """The texts between them, none of them empty, and their ids."""
        parts: list[str | int] = []
        done = 0
        for mark in self._find.finditer(text):
            start, end = mark.span()
            token = self._tokens.get(mark[0])
            if self._flagged:
                if token is None or (token.single_word and _touches_word(text, start, end)):
                    continue
                while token.lstrip and start > done and text[start - 1] in SPACES:
                    start -= 1
                while token.rstrip and end < len(text) and text[end] in SPACES:
                    end += 1
            assert token is not None
            if done < start:
                parts.append(text[done:start])
            parts.append(token.id)
            done = end
        if done < len(text):
            parts.append(text[done:])
        return parts


class Finder:
    """Both passes over a text: tokens as they are written, then, in what is left and normalized, the others."""

    def __init__(
        self, added: Sequence[Added], normalize: Callable[[str], str] | None, wanted: Callable[[Added], bool]
    ) -> None:
        """``wanted`` says which of the added tokens are to be found."""
        self._normalize = normalize
        self._passes: list[Marks | None] = []
        for normalized in (False, True):
            group = [each for each in added if each.normalized == normalized]
            if normalized and normalize is not None:
                group = [Added(**{**vars(each), "text": normalize(each.text)}) for each in group]
            found = [each for each in group if wanted(each)]
            self._passes.append(Marks(found, [each for each in group if not wanted(each)]) if found else None)
        self.is_idle = normalize is None and self._passes == [None, None]

    def leaves(self, text: str) -> bool:
        """Whether the text is one part as it is: nothing to find and nothing to normalize, for certain."""
        return not any(each is not None and each.within(text) for each in self._passes) and (
            self._normalize is None or self._normalize(text) is text
        )

    def cut(self, text: str) -> list[str | int]:
        """The text in parts: normalized texts, and ids of added tokens."""
        raw, normalized = self._passes
        parts: list[str | int] = [text] if raw is None else raw.cut(text)
        if self._normalize is not None:
            parts = [self._normalize(part) if isinstance(part, str) else part for part in parts]
        if normalized is not None:
            parts = [own for part in parts for own in (normalized.cut(part) if isinstance(part, str) else [part])]
        return parts


def to_nfc(text: str) -> str:
    """The text in Unicode's form C; the very same object where it is already."""
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """What finds any of the texts, the longest where several begin alike."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _overlap(one: str, other: str) -> bool:
    """Whether two texts can overlap in a third."""
    if one in other or other in one:
        return True
    return any(
        one[-size:] == other[:size] or other[-size:] == one[:size] for size in range(1, min(map(len, (one, other))))
    )


def _touches_word(text: str, start: int, end: int) -> bool:
    return (start > 0 and _in_word(text[start - 1])) or (end < len(text) and _in_word(text[end]))


def _in_word(char: str) -> bool:
    """Whether ``\\w`` of the Rust library matches: letters, marks, decimal digits, connectors, joiners."""
    return unicodedata.category(char) in _WORD_CATEGORIES or char in "\u200c\u200d" or "\u24b6" <= char <= "\u24e9"


_WORD_CATEGORIES = frozenset({"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"})
