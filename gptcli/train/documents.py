"""Files to documents: plain text, JSON lines, folders of them, packed or not, or standard input."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptcli.errors import CorruptError, NotFoundError, UsageError

SEPARATOR = "<|endoftext|>"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl")
PACKED_SUFFIXES = (".xz", ".gz", ".zst")

_READ = 1 << 20


def documents_of(
    paths: Sequence[str], held_out: float = 0.0, part: str = "train", *, field: str = "text"
) -> Iterator[str]:
    """The documents of several files or folders in turn: those outside the held-out fraction, or those in it."""
    files = itertools.chain.from_iterable(map(files_of, paths))
    every = itertools.chain.from_iterable(read_documents(file, field=field) for file in files)
    return (document for document in every if is_held_out(document, held_out) == (part == "valid"))


def files_of(path: str) -> list[str]:
    """The files that a name stands for: itself, or a folder's text files, sorted, those in its subfolders too.

    Hidden files and files of other kinds are passed over. Raises UsageError for a folder without any.
    """
    if path == "-" or not Path(path).is_dir():
        return [path]
    found = [str(file) for file in sorted(Path(path).rglob("*")) if _is_text(file.relative_to(path)) and file.is_file()]
    if not found:
        kinds = ", ".join(TEXT_SUFFIXES)
        raise UsageError(f"the folder {path} holds no text files", f"gptcli reads {kinds}, packed as .xz, .gz or .zst")
    return found


def _is_text(file: Path) -> bool:
    return _unpacked_suffix(file) in TEXT_SUFFIXES and not any(part.startswith(".") for part in file.parts)


def is_json_lines(path: str) -> bool:
    """Whether a file is JSON lines, packed or not, by its name."""
    return path != "-" and _unpacked_suffix(Path(path)) == ".jsonl"


def _unpacked_suffix(file: Path) -> str:
    """``.jsonl`` of ``a.jsonl.xz``."""
    return file.with_suffix("").suffix if file.suffix in PACKED_SUFFIXES else file.suffix


def read_documents(path: str, *, field: str = "text") -> Iterator[str]:
    """The documents of a file, or of standard input (``-``), one at a time.

    In ``.jsonl`` each line is an object whose ``field`` is one document; elsewhere ``<|endoftext|>`` parts documents,
    and the line break on either side belongs to it. Documents of white space alone are passed over. ``.xz``, ``.gz``
    and ``.zst`` are unpacked. Raises NotFoundError without the file, CorruptError for bytes that are not UTF-8 (with
    their offset), a line that is no such object (with its number) or a broken archive.
    """
    if is_json_lines(path):
        yield from _json_lines(path, field)
        return
    parts: list[str] = []  # of the document that is being read
    for text in _read_text(path):
        # A separator may stand across two pieces, so the end of the last one is looked at again.
        seam = parts.pop() if parts else ""
        first, *others = (seam + text).split(SEPARATOR)
        parts += _with_seam(first) if not others else [first]
        for following in others:
            yield from _document("".join(parts))
            parts = [following]
    yield from _document("".join(parts))


def _with_seam(text: str) -> list[str]:
    """A text in two: what can hold no part of a separator that goes on, and the few characters that can."""
    place = max(0, len(text) - len(SEPARATOR) + 1)
    return [text[:place], text[place:]]


def _document(text: str) -> Iterator[str]:
    if text.strip():
        yield text.removeprefix("\n").removesuffix("\n")


def _json_lines(path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
        except (ValueError, LookupError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            message = f"{path} line {number} is not an object with a text under {field!r}"
            raise CorruptError(message, "correct the line, or name its field with --field")
        if text.strip():
            yield text


def lines_of(path: str) -> Iterator[str]:
    """The lines of a file, packed or not, or of standard input, without their line breaks; errors as read_documents."""
    parts: list[str] = []
    for text in _read_text(path):
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join([*parts, line])
            parts = []
        parts.append(rest)
    yield "".join(parts)


def _read_text(path: str) -> Iterator[str]:
    """A file's text in pieces."""
    if path == "-":
        yield from _decode(sys.stdin.buffer, "stdin")
        return
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _Zstandard}
    try:
        with openers.get(Path(path).suffix, open)(path, "rb") as stream:
            yield from _decode(stream, path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", "check the path") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptError(f"{path} can't be unpacked: {error}", "download the file again") from None
    except OSError as error:
        raise CorruptError(f"{path} can't be read: {error.strerror}", "check the path and its permissions") from None


class _Zstandard:
    """Unpacks a ``.zst`` file of one frame or several; a frame cut short or damaged is an EOFError, as in ``.xz``."""

    def __init__(self, path: str, mode: str) -> None:
        try:
            import zstandard
        except ImportError:
            hint = "pip install zstandard, or unpack the file"
            raise UsageError(f"reading {path} needs the zstandard library", hint) from None
        self._file = open(path, mode)  # noqa: SIM115
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._left = b""

    def __enter__(self) -> _Zstandard:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        data = b""
        while not data:
            packed = self._left or self._file.read(size)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends within a frame")
                break
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                data = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._left = self._frame.unused_data
        return data


def _decode(stream: BinaryIO | io.BufferedIOBase, name: str) -> Iterator[str]:
    offset, rest = 0, b""
    while block := stream.read(_READ):
        data = rest + block
        try:
            text, rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise CorruptError(f"{name} is not UTF-8 at byte {offset + error.start}", "convert it first") from None
            text, rest = data[: error.start].decode("utf-8"), data[error.start :]
        offset += len(data) - len(rest)
        yield text
    if rest:
        raise CorruptError(f"{name} ends within a character, at byte {offset}", "the file may be cut short")


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: by a hash of its text, so the same on every run."""
    return _hash(document) < fraction * 2**64


def held_out_place(document: str) -> float:
    """Where in [0, 1] the hash puts a document: it is held out by every larger fraction."""
    return _hash(document) / 2**64


def _hash(document: str) -> int:
    digest = hashlib.sha256(document.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big")
