"""A text to its documents: as ``train`` makes them, wherever the pieces of the text are cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcli.text.documents import SEPARATOR, parted
from gptcli.train.documents import read_documents

LINE = f"{SEPARATOR}\n"


def documents(*chunks: str) -> list[str]:
    found, text = [], ""
    for part in parted(chunks):
        if part.kind == "text":
            text += part.text
        elif part.kind == "end":
            found.append(text)
            text = ""
    assert not text
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        ("a\n", ["a\n"]),
        (" \n", [" \n"]),
        (f"a\n{LINE}b\n", ["a", "b"]),
        (f"a\n{LINE}b\n{LINE}", ["a", "b"]),
        (f"a\n{LINE}{LINE}\n\n{LINE} \n", ["a"]),
        (f"a\n\n{LINE}\nb", ["a\n", "\nb"]),
        (f"{LINE}a\n{SEPARATOR}", ["a"]),
        (LINE, []),
        (f"a {LINE}b", [f"a {LINE}b"]),
        (f"a\n{SEPARATOR} b", [f"a\n{SEPARATOR} b"]),
        (f"a\n {LINE}b", [f"a\n {LINE}b"]),
        (f"{SEPARATOR}{LINE}", [f"{SEPARATOR}{LINE}"]),
    ],
)
def test_a_line_holding_only_the_separator_parts_documents(text: str, expected: list[str]) -> None:
    assert documents(text) == expected
    assert documents(*text) == expected  # a character at a time
    assert "".join(part.text for part in parted([text])) == text


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    pieces=st.lists(st.sampled_from([LINE, f"\n{LINE}", "\n", "a", " ", "<|endo", "text|>", "é\r"]), max_size=10),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_they_are_those_of_train_and_nothing_is_lost(pieces: list[str], cuts: list[int], tmp_path: Path) -> None:
    text = "".join(pieces)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[first:last] for first, last in itertools.pairwise(places)]
    assert documents(*chunks) == documents(text)
    assert "".join(part.text for part in parted(chunks)) == text
    lines = text.split("\n")
    if SEPARATOR not in lines:
        assert documents(text) == [text]
    elif all(line == SEPARATOR or SEPARATOR not in line for line in lines) and not text.startswith("\n"):
        (tmp_path / "text").write_bytes(text.encode())
        assert documents(text) == list(read_documents(str(tmp_path / "text")))
