"""What is read: a file, known by its content, or a stream spooled to one that is gone with the process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptcli.errors import CorruptError, NotFoundError, UsageError
from gptcli.train.documents import PACKED_SUFFIXES, is_json_lines, read_blocks

_READ = 1 << 20


@dataclass(frozen=True)
class Input:
    """A file of ``size`` bytes as it was when it was hashed; ``spool`` holds what came from a stream."""

    path: str
    size: int
    digest: str
    stamp: tuple[int, ...]
    spool: BinaryIO | None = None

    @property
    def is_json(self) -> bool:
        """Whether its lines are objects."""
        return is_json_lines(self.path)

    @property
    def packing(self) -> str:
        """``.xz`` and the like; empty where it is not packed."""
        suffix = Path(self.path).suffix
        return suffix if suffix in PACKED_SUFFIXES else ""

    def blocks(self, start: int) -> Iterator[tuple[bytes, int]]:
        """See ``read_blocks``."""
        if self.spool is not None:
            self.spool.seek(0)
        return read_blocks(self.path, self.spool, start)

    def check(self) -> None:
        """Raise CorruptError if it is not the file any more that was hashed."""
        if self.spool is None:
            with contextlib.suppress(OSError):
                if _stamp(os.stat(self.path)) == self.stamp:
                    return
            raise CorruptError(f"{self.path} changed while it was read", "run it again when nothing writes to it")


def open_input(path: str, spools: Path, progress: Callable[[int], None]) -> Input:
    """A file, or ``-`` for standard input, with the hash of its bytes.

    What can be read only once is copied into a nameless file on the disk of ``spools`` (``progress`` hears how many
    bytes there are). Raises NotFoundError or CorruptError when it can't be read.
    """
    if path == "-" and sys.stdin is None:
        raise UsageError("standard input is closed", "name a file")
    with _open(path) as stream:
        found = os.fstat(stream.fileno()) if path != "-" else None
        if found is not None and stat.S_ISREG(found.st_mode):
            # Hashed each time it is used: a time of change can lie, and encoding takes a hundred times as long.
            size, digest = _copy(stream, path)
            return Input(path, size, digest, _stamp(found))
        spool: BinaryIO = tempfile.TemporaryFile(dir=spools)  # noqa: SIM115
        size, digest = _copy(stream, path, spool, progress)
        return Input(path, size, digest, (), spool)


def _open(path: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", "check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _copy(
    stream: BinaryIO, path: str, to: BinaryIO | None = None, progress: Callable[[int], None] | None = None
) -> tuple[int, str]:
    """Hash a stream, and write it to a file; returns its size and hash."""
    size, digest = 0, hashlib.sha256()
    while True:
        try:
            block = stream.read(_READ)
        except OSError as error:
            raise _unreadable(path, error) from None
        if not block:
            return size, digest.hexdigest()
        digest.update(block)
        size += len(block)
        if to is not None:
            to.write(block)
        if progress is not None:
            progress(size)


def _unreadable(path: str, error: OSError) -> CorruptError:
    return CorruptError(f"{path} can't be read: {error.strerror}", "check the path and its permissions")


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
