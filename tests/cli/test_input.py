"""Input: arguments, files and standard input in their order, read as UTF-8 in bounded pieces."""

from __future__ import annotations

import io
import os
import socket
import sys
from pathlib import Path

import pytest

from gptcli.cli.input import Source, note_line_end, one_text, sources, stdin_has_data
from gptcli.cli.out import Output
from gptcli.errors import CorruptError, NotFoundError, UsageError

TEXT = "aé東🙂z\n"


def pipe(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a pipe with ``data`` in standard input's place."""
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))


@pytest.mark.parametrize("size", range(1, 12))
def test_characters_across_the_borders_of_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", size)
    (tmp_path / "file").write_bytes(TEXT.encode())
    source = Source("file", path=tmp_path / "file")
    assert source.text() == TEXT
    assert all("\ufffd" not in chunk for chunk in source.chunks())
    pipe(TEXT.encode(), monkeypatch)
    assert Source("stdin").text() == TEXT


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xff", 0),
        (b"abc\xff", 3),
        ("é東".encode() + b"\x80x", 5),
        (b"ab\xc3", 2),
        (b"ab\xc3(", 2),
        (b"\xe6\x9d", 0),
        (b"a\xf0\x9f\x99", 1),
        (b"a\xed\xa0\x80", 1),
        (b"a\xc0\x80", 1),
        (b"ab\xf8\x88\x80\x80\x80", 2),
    ],
)
def test_a_bad_byte_is_named_by_its_offset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, data: bytes, offset: int
) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", size)
    (tmp_path / "file").write_bytes(data)
    source = Source("file", path=tmp_path / "file")
    with pytest.raises(CorruptError, match=f"file is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}$"):
        source.text()
    assert source.text("replace") == data.decode(errors="replace")
    assert source.text("skip") == data.decode(errors="ignore")


def test_large_offsets_are_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", 7)
    (tmp_path / "file").write_bytes(TEXT.encode() * 1000 + b"\xff")
    with pytest.raises(CorruptError, match=f"offset {len(TEXT.encode()) * 1000:,}"):
        Source("file", path=tmp_path / "file").text()


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(
    ("data", "stripped"), [("a\n", "a"), ("a\n\n", "a\n"), ("\n", ""), ("a", "a"), ("", ""), ("\na\nb\n", "\na\nb")]
)
def test_strip_takes_the_last_newline(monkeypatch: pytest.MonkeyPatch, size: int, data: str, stripped: str) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", size)
    pipe(data.encode(), monkeypatch)
    assert sources([], strip=True)[0].text() == stripped
    pipe(data.encode(), monkeypatch)
    assert sources([])[0].text() == data


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\n\nb\r\n", ["a", "", "b\r"]),
        ("\n", [""]),
        ("é\u2028b\x0c", ["é\u2028b\x0c"]),
    ],
)
def test_lines(monkeypatch: pytest.MonkeyPatch, size: int, data: str, lines: list[str]) -> None:
    monkeypatch.setattr("gptcli.cli.input._READ", size)
    pipe(data.encode(), monkeypatch)
    assert list(Source("stdin").lines()) == lines


def test_the_order_is_stdin_files_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("A")
    (tmp_path / "b").write_text("B")
    pipe(b"piped", monkeypatch)
    found = sources(["x", "-", "y"], [tmp_path / "a", tmp_path / "b"])
    assert [source.text() for source in found] == ["piped", "A", "B", "x", "y"]
    assert [source.name for source in found][:3] == ["stdin", str(tmp_path / "a"), str(tmp_path / "b")]
    pipe(b"1", monkeypatch)
    assert one_text(sources(["3"], [tmp_path / "a"]), "strict") == "1A3"
    pipe(b"1", monkeypatch)
    assert one_text(sources(["3"], no_stdin=True), "strict") == "3"


def test_what_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe(b"", monkeypatch)
    assert stdin_has_data()
    (tmp_path / "file").write_text("x")
    with (tmp_path / "file").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert stdin_has_data()
    one, other = socket.socketpair()
    with one, other, one.makefile("r") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert stdin_has_data()
    with Path(os.devnull).open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert not stdin_has_data()
    monkeypatch.setattr(sys, "stdin", None)
    assert not stdin_has_data()


def test_a_terminal_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pty = pytest.importorskip("pty")
    primary, secondary = pty.openpty()
    with os.fdopen(primary, "wb"), os.fdopen(secondary) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert not stdin_has_data()
        with pytest.raises(UsageError):
            sources([])


def test_who_waits_for_a_pipe_that_nobody_may_have_meant_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.cli.input._PATIENCE", 0.01)
    read, write = os.pipe()
    said: list[str] = []

    def told(message: str) -> None:
        said.append(message)
        os.write(write, b"late ")
        os.close(write)

    monkeypatch.setattr(sys, "stdin", os.fdopen(read))
    assert one_text(sources(["text"], note=told), "strict") == "late text"
    assert said == ["waiting for standard input; --no-stdin does without"]
    for arguments in ([], ["-"]):  # what was asked for is waited for without a word
        assert sources(arguments, note=told)[0].note is None


@pytest.mark.parametrize(
    ("text", "told"), [("Once upon a\n", True), ("Once", False), ("two\nlines\n", False), ("\n", False), ("", False)]
)
def test_a_person_is_told_that_the_end_of_a_line_counts(text: str, told: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stderr, seen in ((Terminal(), told), (io.StringIO(), False)):
        note_line_end(text, Output(io.StringIO(), stderr))
        assert ("--strip" in stderr.getvalue()) == seen


def test_nothing_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UsageError, match="nothing to work on"):
            sources([])
        assert sources([], required=False) == []
        assert [source.text() for source in sources([""])] == [""]
        assert [source.text() for source in sources(["-"])] == [""]
        with pytest.raises(UsageError, match="--no-stdin"):
            sources(["-"], no_stdin=True)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="closed"):
        sources(["-"])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none"):
        Source("none", path=tmp_path / "none").text()
    with pytest.raises(CorruptError, match="directory"):
        Source("folder", path=tmp_path).text()


def test_reading_is_bounded_and_does_not_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(read) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        lines = Source("stdin").lines()
        os.write(write, b"first\nsec")
        assert next(lines) == "first"
        os.write(write, b"ond\n")
        assert next(lines) == "second"
        os.close(write)
        assert list(lines) == []
