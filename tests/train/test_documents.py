"""Files to documents: separators, JSON lines, folders, packed files, bad bytes, and the held-out part."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
import zstandard

from gptcli.errors import CorruptError, NotFoundError, UsageError
from gptcli.train import documents as module
from gptcli.train.documents import SEPARATOR, documents_of, is_held_out, read_documents

TEXT = "aé東🙂"


def write(folder: Path, content: str | bytes, name: str = "text.txt") -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


@pytest.fixture(params=[1, 2, 3, 5, 7, 64, 1 << 20])
def read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Files are read in pieces of this size."""
    size: int = request.param
    monkeypatch.setattr(module, "_READ", size)
    return size


# --- Documents


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one", ["one"]),
        (f"one{SEPARATOR}two", ["one", "two"]),
        (f"one\n{SEPARATOR}\ntwo\n", ["one", "two"]),
        (f"{SEPARATOR}\none\n{SEPARATOR}\n", ["one"]),
        (f"one\n\n{SEPARATOR}\n\ntwo", ["one\n", "\ntwo"]),
        (f" one {SEPARATOR} two ", [" one ", " two "]),
        (f"one{SEPARATOR}{SEPARATOR}\n \t\n{SEPARATOR}two", ["one", "two"]),
        ("", []),
        (SEPARATOR, []),
        ("<|endoftext", ["<|endoftext"]),
        (f"<|{SEPARATOR}|>", ["<|", "|>"]),
        (f"{TEXT}{SEPARATOR}{TEXT * 3}", [TEXT, TEXT * 3]),
        ("one\r\ntwo", ["one\r\ntwo"]),
    ],
)
def test_documents_are_parted_by_the_separator(tmp_path: Path, read: int, content: str, documents: list[str]) -> None:
    assert list(read_documents(write(tmp_path, content))) == documents


@pytest.mark.parametrize("name", ["text.xz", "text.gz"])
def test_packed_files_are_unpacked(tmp_path: Path, read: int, name: str) -> None:
    pack = lzma.compress if name.endswith("xz") else gzip.compress
    path = write(tmp_path, pack(f"{TEXT}{SEPARATOR}two".encode()), name)
    assert list(read_documents(path)) == [TEXT, "two"]


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    stream = io.TextIOWrapper(io.BytesIO(f"{TEXT}{SEPARATOR}two".encode()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert list(read_documents("-")) == [TEXT, "two"]


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"\xff", 0), (b"abc\xff", 3), (TEXT.encode() + b"\x80", 10), (b"ab\xc3(", 2), (b"a" * 100 + b"\xe6\x9d", 100)],
)
def test_bad_bytes_are_named_by_their_offset(tmp_path: Path, read: int, content: bytes, offset: int) -> None:
    path = write(tmp_path, content)
    with pytest.raises(CorruptError, match=rf"text\.txt .*at byte {offset}$"):
        list(read_documents(path))


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="none"):
        list(read_documents(str(tmp_path / "none")))
    for name, content in (
        ("bad.xz", b"not xz"),
        ("cut.xz", lzma.compress(TEXT.encode())[:-4]),
        ("bad.gz", b"not gz"),
        ("cut.gz", gzip.compress(TEXT.encode())[:-4]),
        ("broken.gz", gzip.compress(TEXT.encode())[:10] + b"\xff" * 30),
    ):
        with pytest.raises(CorruptError, match=name):
            list(read_documents(write(tmp_path, content, name)))


# --- The held-out part


def test_the_held_out_part_is_the_same_on_every_run_and_disjoint(tmp_path: Path) -> None:
    documents = [f"document {i}" for i in range(1000)]
    paths = [
        write(tmp_path, SEPARATOR.join(documents[:500]), "a"),
        write(tmp_path, SEPARATOR.join(documents[500:]), "b"),
    ]
    train, valid = list(documents_of(paths, 0.1)), list(documents_of(paths, 0.1, "valid"))
    assert sorted(train + valid) == sorted(documents)
    assert not set(train) & set(valid)
    assert 60 < len(valid) < 140
    # The order of the files moves nothing from one part to the other, nor does a larger fraction take anything away.
    assert set(documents_of(paths[::-1], 0.1, "valid")) == set(valid)
    assert set(valid) < set(documents_of(paths, 0.2, "valid"))
    assert list(documents_of(paths, 0.0)) == documents
    assert list(documents_of(paths, 0.0, "valid")) == []


def test_the_hash_that_decides_is_frozen() -> None:
    """SHA-256 of the text; a change would mix what was held out into the training of older runs."""
    assert [i for i in range(300) if is_held_out(f"document {i}", 0.01)] == [21, 80, 116]
    assert is_held_out("anything", 1.0)


# --- JSON lines


def test_json_lines_are_a_document_each(tmp_path: Path, read: int) -> None:
    values = [{"text": TEXT}, {"text": f"with {SEPARATOR} in it\n"}, {"text": " "}, {"text": "last", "more": 1}]
    content = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    path = write(tmp_path, lzma.compress(content.encode()), "a.jsonl.xz")
    assert list(read_documents(path)) == [TEXT, f"with {SEPARATOR} in it\n", "last"]


def test_json_lines_keep_their_text_where_they_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, '{"story": "one"}\n{"story": "two"}\n', "a.jsonl")
    assert list(read_documents(path, field="story")) == ["one", "two"]
    with pytest.raises(CorruptError, match=r"line 1 .*'text'") as caught:
        list(read_documents(path))
    assert "--field" in caught.value.hint


@pytest.mark.parametrize("line", ["no json", "[]", '"text"', '{"text": 3}', '{"text": null}', "{", "[" * 100_000])
def test_bad_lines_are_named_by_their_number(tmp_path: Path, line: str) -> None:
    with pytest.raises(CorruptError, match=r"a\.jsonl line 2 "):
        list(read_documents(write(tmp_path, f'{{"text": "good"}}\n{line}\n', "a.jsonl")))


# --- Folders


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.txt.gz", ".hidden.txt", ".git/c.txt", "picture.png", "noname", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert list(documents_of([str(tmp_path)])) == ["a/y.txt.gz", "a/z.md", "b.txt", "d.jsonl"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no text files"):
        list(documents_of([str(tmp_path / "empty")]))


# --- Zstandard


def test_zstandard_frames_are_unpacked(tmp_path: Path, read: int) -> None:
    packed = zstandard.compress(f"{TEXT}{SEPARATOR}".encode()) + zstandard.compress(b"two")
    assert list(read_documents(write(tmp_path, packed, "a.txt.zst"))) == [TEXT, "two"]


@pytest.mark.parametrize("content", [b"not zst", zstandard.compress(TEXT.encode() * 99)[:-4]])
def test_a_broken_zstandard_file_is_no_end_of_text(tmp_path: Path, read: int, content: bytes) -> None:
    with pytest.raises(CorruptError, match=r"a\.zst can't be unpacked"):
        list(read_documents(write(tmp_path, content, "a.zst")))


def test_without_the_library_it_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match="zstandard library"):
        list(read_documents(write(tmp_path, b"", "a.zst")))
