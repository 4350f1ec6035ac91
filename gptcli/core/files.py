"""Files on their way to the disk: written whole or not at all, and what can't be written told as one error."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from gptcli.errors import OutputError

_AHEAD = 1 << 25  # bytes that are asked for at a time


def write_whole(file: Path, data: bytes | memoryview, *, private: bool = False, like_before: bool = False) -> None:
    """Write beside, sync, rename: whoever looks finds what was there before, or all of the new.

    A link stays one, and a device or a pipe is written into. A ``private`` file only its owner may read and write; one
    ``like_before`` has the permissions, the owner and the other names (hard links) of the file that was there: where
    these can't be had by renaming it is written in place. Raises OutputError.
    """
    with output_errors(file):
        if file.exists() and not file.is_file():  # what can't be replaced, or must not be: /dev/stdout, /dev/null
            file.write_bytes(data)
            return
        target = file.resolve()
        before = target.stat() if like_before and target.exists() else None
        if before is not None and before.st_nlink > 1:
            _write_in_place(target, data)
            return
        try:
            handle, name = tempfile.mkstemp(prefix=".writing-", suffix=target.suffix, dir=target.parent)
        except PermissionError:
            if before is None:
                raise
            _write_in_place(target, data)  # the folder is not ours, but the file is
            return
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if before is not None and not _become(name, before):
                os.unlink(name)
                _write_in_place(target, data)
                return
            if before is None and not private:
                os.chmod(name, 0o666 & ~umask())  # a temporary file is its owner's alone
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _become(name: str, before: os.stat_result) -> bool:
    """Give a file the owner and the permissions of another one; whether that could be done."""
    made = os.stat(name)
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.chown(name, before.st_uid, before.st_gid)
        except OSError:
            return False
    os.chmod(name, stat.S_IMODE(before.st_mode))
    return True


def _write_in_place(file: Path, data: bytes | memoryview) -> None:
    with file.open("r+b") as stream:
        stream.write(data)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def written_file(file: Path) -> Iterator[Path]:
    """A temporary file beside ``file``; on leaving, it is synced and renamed to it: for what is too large for memory.

    A failure leaves what stood there as it was, and is raised as OutputError.
    """
    temporary = None
    with output_errors(file):
        target = file.resolve()
        try:
            handle, name = tempfile.mkstemp(prefix=".writing-", suffix=target.suffix, dir=target.parent)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            temporary.chmod(0o666 & ~umask())  # a temporary file is its owner's alone
            sync(temporary)
            os.replace(temporary, target)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Within, what can't be written is an OutputError that says why and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} could not be written: {_reason(error)}", _what_to_do(error)) from None


def read_ahead(files: Iterable[Path]) -> None:
    """Have the system read files into its page cache beside what goes on, one after the other, in large pieces.

    What is mapped is else read when it is touched, in small pieces that the disk waits between. Costs next to nothing
    for what is there already; nothing is done where the system can't be told.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_read_ahead, args=(list(files),), daemon=True).start()


def _read_ahead(files: list[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError), file.open("rb") as stream:
            for start in range(0, os.fstat(stream.fileno()).st_size, _AHEAD):
                os.posix_fadvise(stream.fileno(), start, _AHEAD, os.POSIX_FADV_WILLNEED)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The permissions that new files of this process do without."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _what_to_do(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "space" in str(error).lower() or "large" in str(error).lower():
        return "make room on the disk; what was there before is unchanged"
    return "check that the folder can be written; what was there before is unchanged"
