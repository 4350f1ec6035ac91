"""Files to documents: plain text, JSON lines, folders of them, packed or not, or standard input."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptcli.errors import CorruptError, NotFoundError, UsageError
from gptcli.text.documents import SEPARATOR as SEPARATOR

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
    return unpacked_suffix(file) in TEXT_SUFFIXES and not any(part.startswith(".") for part in file.parts)


def is_json_lines(path: str) -> bool:
    """Whether a file is JSON lines, packed or not, by its name."""
    return path != "-" and unpacked_suffix(Path(path)) == ".jsonl"


def unpacked_suffix(file: Path) -> str:
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
            yield from tidy("".join(parts))
            parts = [following]
    yield from tidy("".join(parts))


def _with_seam(text: str) -> list[str]:
    """A text in two: what can hold no part of a separator that goes on, and the few characters that can."""
    place = max(0, len(text) - len(SEPARATOR) + 1)
    return [text[:place], text[place:]]


def tidy(text: str) -> Iterator[str]:
    """What stands between two separators as a document: without the line breaks that are theirs; none if blank."""
    if text and not text.isspace():
        yield text.removeprefix("\n").removesuffix("\n")


def _json_lines(path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), 1):
        yield from json_text(line, field, path, number)


def json_text(line: str, field: str, path: str, number: int) -> Iterator[str]:
    """The document of a line of ``.jsonl``; none if it is blank. Raises CorruptError that names the line."""
    if not line.strip():
        return
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
    return _decode((block for block, _ in read_blocks(path)), "stdin" if path == "-" else path)


def read_blocks(path: str, file: BinaryIO | None = None, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """The unpacked bytes of a file from ``start`` on, in blocks, each with the bytes of the file read by then.

    ``file`` is read where ``path`` only names what it holds; ``-`` is standard input. Raises as ``read_documents``.
    """
    try:
        with contextlib.ExitStack() as stack:
            tells = file is not None or path != "-"  # a pipe doesn't
            if file is None:
                file = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
            unpack = _UNPACK.get(Path(path).suffix)
            if unpack is None and start:
                file.seek(start)
                start = 0
            stream = unpack(file) if unpack else file
            read = 0
            while block := stream.read(_READ):
                # Packed files can't be entered in the middle; unpacking is far faster than what is done with the text.
                skipped, start = block[start:], max(0, start - len(block))
                read = file.tell() if tells else read + len(block)
                if skipped:
                    yield skipped, read
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", "check the path") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptError(f"{path} can't be unpacked: {error}", "download the file again") from None
    except OSError as error:
        raise CorruptError(f"{path} can't be read: {error.strerror}", "check the path and its permissions") from None


class _Zstandard:
    """Unpacks a ``.zst`` file of one frame or several; a frame cut short or damaged is an EOFError, as in ``.xz``."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            hint = "pip install zstandard, or unpack the file"
            raise UsageError("reading .zst files needs the zstandard library", hint) from None
        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._left = b""

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


_UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    ".xz": lzma.LZMAFile,
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".zst": _Zstandard,
}


def _decode(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    offset, rest = 0, b""
    for block in blocks:
        data = rest + block
        try:
            text, rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise not_utf8(name, offset + error.start) from None
            text, rest = data[: error.start].decode("utf-8"), data[error.start :]
        offset += len(data) - len(rest)
        yield text
    if rest:
        raise ends_early(name, offset)


def not_utf8(name: str, offset: int) -> CorruptError:
    """What to raise for a byte that is no UTF-8."""
    return CorruptError(f"{name} is not UTF-8 at byte {offset}", "convert it first")


def ends_early(name: str, offset: int) -> CorruptError:
    """What to raise for a last character that is not all there."""
    return CorruptError(f"{name} ends within a character, at byte {offset}", "the file may be cut short")


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: by a hash of its text, so the same on every run."""
    return _hash(document) < fraction * 2**64


def held_out_place(document: str) -> float:
    """Where in [0, 1] the hash puts a document: it is held out by every larger fraction."""
    return _hash(document) / 2**64


def _hash(document: str) -> int:
    digest = hashlib.sha256(document.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big")
