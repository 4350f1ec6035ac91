"""Arithmetic on words: ``'" king" - " man" + 0.5 * (" woman" + " girl")'`` as a weighted sum of words.

Words stand in quotes, single or double, since the space before one matters; ``#123`` is the token with that id. Between
them ``+``, ``-``, a number with ``*``, ``/`` by a number, and parentheses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.errors import UsageError

_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_ID = re.compile(r"#\d{1,18}", re.ASCII)
_SPACE = re.compile(r"\s*")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
_QUOTES = "\"'"
_DEEPEST = 50  # parentheses within parentheses
_AROUND = 24  # characters shown on either side of a mistake


@dataclass(frozen=True)
class Term:
    """A word and how much of it: ``text``, or ``id`` where the token is named by number; ``place`` is its first
    character in the expression, from 0.
    """

    weight: float
    text: str
    id: int | None
    place: int


def parse(expression: str) -> tuple[Term, ...]:
    """The words of an expression in their order, each with its weight.

    Raises UsageError that names the character where it goes wrong.
    """
    return _Parser(expression).parse()


def mistake(expression: str, place: int, what: str) -> UsageError:
    """The error for a mistake at character ``place`` (from 0): its hint repeats that part with an arrow before it."""
    start, end = max(0, place - _AROUND), place + _AROUND
    shown = ("..." if start else "") + expression[start:place] + " >>> " + expression[place:end]
    shown += "..." if end < len(expression) else ""
    return UsageError(f"the expression goes wrong at character {place + 1}: {what}", f"here: {shown}")


def quote(text: str) -> str:
    """A word as an expression has it: between double quotes, backslashes before what needs one."""
    named = {value: "\\" + name for name, value in _ESCAPES.items() if value != "'"}
    return '"' + "".join(named.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


class _Parser:
    """Recursive descent; a value is a number, or terms."""

    def __init__(self, expression: str) -> None:
        self.source = expression
        self.place = 0
        self.depth = 0

    def parse(self) -> tuple[Term, ...]:
        value = self._sum()
        if self._peek():
            raise self._wrong(f"expected +, - or the end, not {self._seen()}")
        if isinstance(value, float):
            raise mistake(self.source, 0, "it is a number, without any word")
        return tuple(value)

    def _sum(self) -> float | list[Term]:
        """``product``, then any number of ``+ product`` and ``- product``."""
        total = self._product()
        while (sign := self._peek()) in ("+", "-"):
            place = self._step()
            more = self._product()
            more = more if sign == "+" else self._scaled(more, -1.0, place)
            if isinstance(total, float) and isinstance(more, float):
                total += more
            elif isinstance(total, list) and isinstance(more, list):
                total = total + more
            else:
                name = "sum" if sign == "+" else "difference"
                raise mistake(self.source, place, f"a number and a word have no {name}")
        return total

    def _product(self) -> float | list[Term]:
        """``factor``, then any number of ``* factor`` and ``/ factor``."""
        value = self._factor()
        while (sign := self._peek()) in ("*", "/"):
            place = self._step()
            other = self._factor()
            if sign == "/":
                if isinstance(other, list):
                    raise mistake(self.source, place, "one can divide by a number only")
                if other == 0:
                    raise mistake(self.source, place, "a division by zero")
                other, sign = 1 / other, "*"
            if isinstance(value, float):
                value = self._scaled(other, value, place)
            elif isinstance(other, float):
                value = self._scaled(value, other, place)
            else:
                raise mistake(self.source, place, "two words have no product")
        return value

    def _factor(self) -> float | list[Term]:
        """Minus signs, then a number, a word, a token id, or a sum in parentheses."""
        sign = 1.0
        while (char := self._peek()) == "-":
            sign = -sign
            self._step()
        value: float | list[Term]
        place = self.place
        if char == "(":
            value = self._group()
        elif char and char in _QUOTES:
            value = [Term(1.0, self._word(), None, place)]
        elif found := _ID.match(self.source, place):
            self.place = found.end()
            value = [Term(1.0, found[0], int(found[0][1:]), place)]
        elif found := _NUMBER.match(self.source, place):
            self.place = found.end()
            value = float(found[0])
        else:
            raise self._wrong(self._expected(char))
        return self._scaled(value, sign, place)

    def _group(self) -> float | list[Term]:
        opened = self._step()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise mistake(self.source, opened, f"parentheses are nested more than {_DEEPEST} deep")
        value = self._sum()
        if self._peek() != ")":
            if not self._peek():
                raise mistake(self.source, opened, "this parenthesis is not closed")
            raise self._wrong(f"expected +, - or ), not {self._seen()}")
        self._step()
        self.depth -= 1
        return value

    def _word(self) -> str:
        """The text between two quotes of a kind, with backslash escapes."""
        opened = self._step()
        text: list[str] = []
        while (char := self.source[self.place : self.place + 1]) != self.source[opened]:
            if not char:
                raise mistake(self.source, opened, "this quote is not closed")
            text.append(self._escaped() if char == "\\" else char)
            self.place += char != "\\"
        self.place += 1
        if not text:
            raise mistake(self.source, opened, "the word is empty")
        return "".join(text)

    def _escaped(self) -> str:
        place = self._step()
        name = self.source[self.place : self.place + 1]
        digits = self.source[self.place + 1 : self.place + 1 + _HEX.get(name, 0)]
        self.place += 1 + len(digits)
        if name in _HEX and len(digits) == _HEX[name] and re.fullmatch("[0-9a-fA-F]+", digits):
            code = int(digits, 16)
            if code < 0x110000:
                return chr(code)
        elif name in _ESCAPES:
            return _ESCAPES[name]
        raise mistake(self.source, place, "an unknown escape; a backslash itself is written twice")

    def _scaled(self, value: float | list[Term], by: float, place: int) -> float | list[Term]:
        scaled = value * by if isinstance(value, float) else [Term(t.weight * by, t.text, t.id, t.place) for t in value]
        if not all(map(math.isfinite, [scaled] if isinstance(scaled, float) else [term.weight for term in scaled])):
            raise mistake(self.source, place, "the number is too large")
        return scaled

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        found = _SPACE.match(self.source, self.place)
        self.place = found.end() if found else self.place
        return self.source[self.place : self.place + 1]

    def _step(self) -> int:
        """Go past one character; the place where it stood."""
        self.place += 1
        return self.place - 1

    def _seen(self) -> str:
        char = self.source[self.place : self.place + 1]
        return "another word" if char and char in _QUOTES else repr(char)

    def _expected(self, char: str) -> str:
        if not char:
            return "a word is missing at the end"
        if char.isalpha():
            return 'words stand in quotes, with the space before them: " king"'
        return f"expected a word in quotes, not {char!r}"

    def _wrong(self, what: str) -> UsageError:
        return mistake(self.source, self.place, what)


def combined(terms: Sequence[Term], ids: Sequence[int]) -> dict[int, float]:
    """The weight of each token: those of a token that stands several times are added. ``ids`` has one for each term."""
    weights: dict[int, float] = {}
    for term, id_ in zip(terms, ids, strict=True):
        weights[id_] = weights.get(id_, 0.0) + term.weight
    return weights
