"""The file that is edited stays what it was, but for its text."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gptcli.cli.edit_file import TextFile
from gptcli.errors import CorruptError, GptcliError, LimitError, NotFoundError, OutputError, UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "story.txt"


@pytest.mark.parametrize(
    ("data", "text", "written"),
    [
        (b"one\ntwo\n", "one\ntwo", b"one\ntwo!\n"),
        (b"one\ntwo", "one\ntwo", b"one\ntwo!"),
        (b"one\r\ntwo\r\n", "one\ntwo", b"one\r\ntwo!\r\n"),
        (b"one\r\ntwo", "one\ntwo", b"one\r\ntwo!"),
        (b"one\r\ntwo\n", "one\r\ntwo", b"one\r\ntwo!\n"),  # they differ: nothing is made alike
        (b"one\rtwo\n", "one\rtwo", b"one\rtwo!\n"),
        (b"", "", b"!\n"),
        (b"\n", "", b"!\n"),
        (b"one\n\n", "one\n", b"one\n!\n"),
        ("\ufeff東京\n".encode(), "東京", "\ufeff東京!\n".encode()),
        (b"tab\there\n", "tab\there", b"tab\there!\n"),
        (b"nul\x00\n", "nul\x00", b"nul\x00!\n"),
    ],
)
def test_line_ends_and_marks_are_kept(path: Path, data: bytes, text: str, written: bytes) -> None:
    path.write_bytes(data)
    file = TextFile(path)
    assert file.text == text
    file.save(text)
    assert path.read_bytes() == data
    assert file.save(text + "!") == len(written)
    assert path.read_bytes() == written
    assert file.text == text + "!"
    assert not file.changed_on_disk


def test_all_of_a_text_may_be_taken_away(path: Path) -> None:
    path.write_bytes(b"one\n")
    TextFile(path).save("")
    assert path.read_bytes() == b""


def test_a_new_file_is_made_when_it_is_saved_and_ends_with_a_line_end(path: Path) -> None:
    file = TextFile(path)
    assert (file.exists, file.text) == (False, "")
    assert not path.exists()
    file.save("one")
    assert (file.exists, path.read_bytes()) == (True, b"one\n")


def test_an_empty_new_file_may_be_saved(path: Path) -> None:
    TextFile(path).save("")
    assert path.read_bytes() == b""


def test_permissions_are_kept_and_a_link_stays_one(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"one\n")
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    TextFile(link).save("two")
    assert link.is_symlink()
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two\n", 0o640)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "story.txt"]


def test_a_link_to_nothing_makes_what_it_points_to(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    TextFile(link).save("two")
    assert (link.is_symlink(), path.read_bytes()) == (True, b"two\n")


def test_all_names_of_a_file_show_what_is_saved(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"one, and more\n")
    (tmp_path / "other").hardlink_to(path)
    TextFile(path).save("two")
    assert (tmp_path / "other").read_bytes() == b"two\n"
    assert path.stat().st_nlink == 2


def test_somebody_elses_change_is_noticed(path: Path) -> None:
    path.write_bytes(b"one\n")
    file = TextFile(path)
    assert not file.changed_on_disk
    path.write_bytes(b"One\n")
    assert file.changed_on_disk
    path.write_bytes(b"one\n")
    assert not file.changed_on_disk
    path.unlink()
    assert not file.changed_on_disk  # there is nothing to write over
    file.save("two")
    assert path.read_bytes() == b"two\n"


def test_a_new_file_that_somebody_else_makes_is_noticed(path: Path) -> None:
    file = TextFile(path)
    path.write_bytes(b"")
    assert file.changed_on_disk


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda path: path.write_bytes(b"abc\xffdef"), CorruptError, "byte 0xff at offset 3"),
        (lambda path: path.write_bytes("é".encode()[:1]), CorruptError, "byte 0xc3 at offset 0"),
        (lambda path: path.mkdir(), UsageError, "is a folder"),
        (lambda path: os.mkfifo(path), UsageError, "is no ordinary file"),
        (lambda path: path.touch(0o444), OutputError, "may only be read"),
        (lambda path: path.write_bytes(b"x" * ((1 << 20) + 1)), LimitError, "1,048,577 bytes"),
        (lambda path: path.symlink_to(path.parent / "no" / "file"), NotFoundError, "there is no folder"),
    ],
    ids=["bad byte", "half a character", "folder", "pipe", "read-only", "large", "no folder"],
)
def test_what_can_not_be_edited_is_refused_with_a_hint(
    path: Path, make: object, kind: type[GptcliError], said: str
) -> None:
    assert callable(make)
    make(path)
    with pytest.raises(kind, match=said) as raised:
        TextFile(path)
    assert raised.value.hint


def test_a_text_that_can_not_be_saved_is_kept_beside_for_its_user_alone(path: Path) -> None:
    path.write_bytes(b"one\r\n")
    file = TextFile(path)
    first, second = file.rescue("two"), file.rescue("three")
    assert (first.read_bytes(), second.read_bytes()) == (b"two\r\n", b"three\r\n")
    assert [each.name for each in (first, second)] == ["story.txt.unsaved", "story.txt.unsaved-1"]
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert path.read_bytes() == b"one\r\n"


def test_half_a_character_is_not_written(path: Path) -> None:
    TextFile(path).save("a\udcc3b")
    assert path.read_bytes() == b"a?b\n"


def test_what_fails_to_be_written_is_told_and_leaves_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"one\n")
    file = TextFile(path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as raised:
        file.save("two")
    assert "room" in raised.value.hint
    assert (path.read_bytes(), file.text) == (b"one\n", "one")
    assert [each.name for each in path.parent.iterdir()] == ["story.txt"]
