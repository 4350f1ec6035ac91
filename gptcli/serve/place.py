"""Where a warm process is found: a socket for each user and model, in a folder that is the user's alone.

Whoever serves holds a lock on a file beside the socket for as long as it lives, and the system lets go of it however it
ends. So of two that start at once one gets it, and a socket without a locked file is stale and may be taken away.

Without torch, and without anything that takes long to import: it is read at every key that is pressed.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import socket
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, NotFoundError, ResourceError

# The bytes of a socket's path that every system takes (Linux 107, macOS 103).
_LONGEST = 103
_MOMENT = 0.01  # seconds


def _sha256(data: bytes = b"") -> Any:
    """hashlib's, without OpenSSL where Python has one of its own: loading that takes longer than asking."""
    for name in ("_sha2", "_sha256"):
        with suppress(ImportError):
            return importlib.import_module(name).sha256(data)
    return importlib.import_module("hashlib").sha256(data)


def runtime_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The user's folder for sockets, made with mode 0700 where it is missing.

    ``$XDG_RUNTIME_DIR/gptcli``, or ``gptcli-UID`` among the temporary files. Raises CorruptError where it belongs to
    somebody else or others may write there: they could answer in our name, and read what is asked.
    """
    if told := environment.get("XDG_RUNTIME_DIR"):
        folder = Path(told) / "gptcli"
    else:
        import tempfile

        folder = Path(tempfile.gettempdir()) / f"gptcli-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        hint = "set XDG_RUNTIME_DIR to a folder of yours"
        raise NotFoundError(f"{folder} can't be used for sockets: {error}", hint) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise CorruptError(
            f"{folder} is not a folder of yours alone", "remove it, or set XDG_RUNTIME_DIR to a folder of yours"
        )
    return folder


@dataclass(frozen=True)
class Place:
    """The files of one model's warm process: its socket, its lock, and what it has to say."""

    folder: Path
    name: str

    @classmethod
    def of(cls, runtime: Path, model: Path) -> Place:
        """The place of a model's folder."""
        key = _sha256(os.fsencode(model.resolve())).hexdigest()[:12]
        return cls(runtime, f"{model.resolve().name[:24]}-{key}")

    @property
    def model(self) -> str:
        """What its folder is called (the beginning of it, where that is long)."""
        return self.name.rpartition("-")[0]

    @property
    def socket(self) -> Path:
        return self.folder / f"{self.name}.sock"

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.name}.lock"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def open_log(self) -> int:
        """A descriptor of the log, begun anew; the caller closes it."""
        return os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)


def places(runtime: Path) -> list[Place]:
    """All that were ever used."""
    return [Place(runtime, file.stem) for file in sorted(runtime.glob("*.lock"))]


class Claim:
    """The right to serve at a place, held until ``release``, and the socket that listens there."""

    def __init__(self, place: Place, lock: int, listener: socket.socket) -> None:
        self.place = place
        self.listener = listener
        self._lock = lock
        self._handed_over = False

    def hand_over(self, process: int) -> None:
        """Let a fork of this process have it: here it is let go of, and stays as it is."""
        _sign(self._lock, process)
        self.listener.close()
        os.close(self._lock)
        self._handed_over = True

    def release(self) -> None:
        """Take the socket away and let others serve."""
        if self._handed_over:
            return
        with suppress(OSError):
            self.place.socket.unlink()
        self.listener.close()
        os.close(self._lock)


def claim(place: Place) -> Claim | None:
    """Listen at a place, readable by its user alone (0600); None where somebody does already.

    Who connects waits until the model is loaded, and learns at once when that fails: the socket listens before anything
    else is done. A stale socket is taken away. Raises ResourceError where the system has no socket for us.
    """
    if len(os.fsencode(place.socket)) > _LONGEST:
        raise ResourceError(f"{place.socket} is too long for a socket", "set XDG_RUNTIME_DIR to a shorter path")
    lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    _sign(lock, os.getpid())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            place.socket.unlink()
        # Nobody else gets into the folder, so nobody sees the socket before its mode is set.
        listener.bind(str(place.socket))
        place.socket.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        os.close(lock)
        raise ResourceError(f"{place.socket} can't be listened at: {error}", "set XDG_RUNTIME_DIR elsewhere") from None
    return Claim(place, lock, listener)


def _sign(lock: int, process: int) -> None:
    """Write down whose a lock is, for whoever looks."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(process).encode(), 0)


def listens(place: Place) -> bool:
    """Whether somebody does; a socket that nobody reads any more refuses."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(OSError):
        probe.connect(str(place.socket))
        return True
    return False


def claim_or_meet(place: Place) -> Claim | None:
    """As ``claim``; but where it is somebody else's, None comes back only when that one listens there.

    Between their lock and their socket there is a moment in which whoever is told to connect would find nobody.
    """
    while (claimed := claim(place)) is None and not listens(place):
        time.sleep(_MOMENT)
    return claimed


def fingerprint(model: Path) -> str:
    """Changes when a file of a model's folder does: names, sizes and times, not contents."""
    digest = _sha256()
    with suppress(OSError):
        for file in sorted(model.iterdir()):
            if file.suffix in (".json", ".safetensors", ".txt", ".jinja"):
                status = file.stat()
                digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
