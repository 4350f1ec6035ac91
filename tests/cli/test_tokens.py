"""Tokens on one line, and values as colours."""

from __future__ import annotations

import re

import pytest

from gptcli.cli.shade import COLD, HEAT, shade
from gptcli.cli.tokens import quoted, visible

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" the", " the"),
        (b"\n\t", "\\n\\t"),
        (b"a\\b", "a\\\\b"),
        (b"\xe2\x82", "\\xe2\\x82"),
        ("é".encode(), "é"),
        (b"\x1b[2J", "\\x1b[2J"),
        (b"", ""),
    ],
)
def test_a_token_is_shown_on_one_line(data: bytes, shown: str) -> None:
    assert visible(data) == shown
    assert quoted(data) == f'"{shown}"'


def test_a_quote_in_quotes_has_a_backslash() -> None:
    assert quoted(b' "') == '" \\""'


@pytest.mark.parametrize("scale", [HEAT, COLD])
def test_a_shade_says_how_strong_and_leaves_the_text(scale: tuple[tuple[int, int], ...]) -> None:
    text = "a b\n\nc\n"
    shown = [shade(text, strength / 10, scale) for strength in range(-1, 12)]
    assert {ESCAPES.sub("", each) for each in shown} == {text}
    assert shown[0] == shown[1] == text
    assert len(set(shown)) == len(scale) + 1
    assert shown[-1] == shown[-2] == shade(text, 1.0, scale)
    assert "\x1b[0m\n\n\x1b" in shown[-1]
    found = [shown.index(each) for each in dict.fromkeys(shown)]
    assert found == sorted(found)
