"""One blob of the Hub's cache: fetched so that what is there stays, checked by its hash before it gets its name.

huggingface_hub begins a file anew after an interruption and does not compare its hash; gigabytes over a shaky line need
both. The place is the one that its cache has for it (``blobs/<hash>``), guarded by the same lock, so that it finds the
file there; the part that is not whole is ``blobs/<hash>.incomplete``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import BinaryIO

from gptcli.errors import CorruptError, NetworkError
from gptcli.hub.reach import Hub, Listing, RemoteFile, is_of_transport
from gptcli.spec.library import blob_digest

# Seconds between tries that bring no byte; after the last the fetch is given up.
PAUSES = (1.0, 2.0, 4.0, 8.0)
MOST_OVER_HTTP = 50_000_000_000  # bytes; the Hub hands out larger files in pieces alone, which its own library joins
_SILENCE = 30.0  # seconds without a byte until a connection counts as broken
_PASSING = (408, 429, 500, 502, 503, 504)

# Told how many bytes came; fewer than none where some turned out to be worthless.
Progress = Callable[[int], None]


class Stopped(Exception):
    """Somebody asked to stop; what is there stays."""


def fetch(
    hub: Hub, listing: Listing, file: RemoteFile, blob: Path, lock: Path, stop: Event, progress: Progress
) -> None:
    """Bring a file's bytes to ``blob``, going on behind those of an earlier try.

    Raises NetworkError when the connection breaks for good, CorruptError when the bytes are not those that the Hub
    promised (they are thrown away), Stopped when told to.
    """
    from huggingface_hub.utils import WeakFileLock

    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists() and blob.stat().st_size == file.size:  # another process was faster
            progress(file.size)
            return
        partial = blob.with_name(blob.name + ".incomplete")
        resumed = partial.exists() and partial.stat().st_size > 0
        digest = _complete(hub, listing, file, partial, stop, progress)
        if digest != file.digest and resumed:  # what was there before may have been wrong: once more, from the start
            progress(-partial.stat().st_size)
            partial.unlink()
            digest = _complete(hub, listing, file, partial, stop, progress)
        if digest != file.digest:
            partial.unlink()
            raise refuse(file, digest)
        partial.replace(blob)  # also over one of another size


def digest_of(file: RemoteFile, place: Path, stop: Event | None = None) -> str:
    """The hash of a file on the disk, of the kind that the Hub has of it. Raises Stopped when told to."""

    def check() -> None:
        if stop is not None and stop.is_set():
            raise Stopped

    return blob_digest(place, file.digest or "", check)


def refuse(file: RemoteFile, digest: str) -> CorruptError:
    """The error of bytes that are not those which the Hub promised."""
    return CorruptError(
        f"{file.name} came with the hash {digest[:16]}..., not {str(file.digest)[:16]}...: it was thrown away",
        "try again; if it stays so, the Hub, a mirror or a proxy changes the file",
    )


def _complete(hub: Hub, listing: Listing, file: RemoteFile, partial: Path, stop: Event, progress: Progress) -> str:
    """Bring the partial file to its whole size, however often the connection breaks; returns its hash."""
    size = file.size or 0
    with partial.open("a+b", buffering=0) as stream:
        if stream.tell() > size:
            stream.truncate(0)
        progress(stream.tell())
        tries = 0
        while (have := stream.tell()) < size:
            if stop.is_set():
                raise Stopped
            try:
                with hub.failures(listing.name, listing.revision, file.name):
                    _go_on(hub, listing, file, stream, stop, progress)
                failure: Exception | None = None
            except NetworkError as error:
                failure = error
            tries = 0 if stream.tell() > have else tries + 1
            if tries > len(PAUSES):
                raise NetworkError(
                    f"the connection broke after {stream.tell():,} of {size:,} bytes of {file.name}: {failure}",
                    "what is there stays: the same command goes on from it",
                ) from None
            if tries and stop.wait(PAUSES[tries - 1]):
                raise Stopped
    return digest_of(file, partial, stop)


def _go_on(hub: Hub, listing: Listing, file: RemoteFile, stream: BinaryIO, stop: Event, progress: Progress) -> None:
    """One request for what is missing. Returns when the connection ends, however early."""
    from huggingface_hub.utils import hf_raise_for_status

    have, size = stream.tell(), file.size or 0
    headers = hub.headers() | ({"Range": f"bytes={have}-"} if have else {})
    url = hub.url(listing, file.name)
    with hub.session.stream("GET", url, headers=headers, timeout=_SILENCE, follow_redirects=True) as response:
        if response.status_code in _PASSING:
            raise NetworkError(f"status {response.status_code}")
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # a server that knows no ranges sends all of it
            stream.truncate(0)
            progress(-have)
        try:
            for block in response.iter_bytes():
                if stop.is_set():
                    raise Stopped
                room = size - stream.tell()
                stream.write(block[:room])
                progress(min(len(block), room))
                if len(block) > room:
                    break
        except Exception as error:
            if not is_of_transport(error):
                raise
            raise NetworkError(str(error) or type(error).__name__) from None
