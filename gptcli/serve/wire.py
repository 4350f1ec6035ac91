"""HTTP over a Unix socket, from the side that asks: as much of it as a warm process speaks (RFC 9112).

The standard library's client would take longer to import (TLS, mail headers) than a warm process to answer.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_LONGEST_LINE = 1 << 16
_BLOCK = 1 << 16


class WireError(Exception):
    """What came is no HTTP, or has ended before it was whole."""


class Wire:
    """A connection, opened when it is needed and kept for the next request; one request at a time."""

    def __init__(self, path: Path, timeout: float | None = None) -> None:
        """``timeout``: seconds that each wait may take; None waits."""
        self._path, self._timeout = path, timeout
        self._socket: socket.socket | None = None
        self._interrupted = False

    def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Send a request, with a body of JSON or none; returns when the answer's head is there.

        Raises OSError (TimeoutError among them) or WireError where no answer comes.
        """
        kept = self._socket is not None
        try:
            return self._asked(method, path, body)
        except (ConnectionError, WireError):
            # One that was kept may have been closed meanwhile, which is seen only now.
            if not kept or self._interrupted:
                raise
        return self._asked(method, path, body)

    def open(self, timeout: float | None = None) -> None:
        """Connect anew, and from now on with this ``timeout``, so that ``interrupt`` finds somebody. Raises OSError."""
        self.close()
        self._timeout = timeout
        try:
            self._connected()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def interrupt(self) -> None:
        """Let whoever waits for an answer find that there is none; from another thread or a signal."""
        self._interrupted = True
        connected = self._socket  # which the other thread may close meanwhile
        if connected is not None:
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def _asked(self, method: str, path: str, body: bytes | None) -> Answer:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: identity\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        try:
            connected = self._connected()
            refused: OSError | None = None
            try:
                connected.sendall(f"{head}\r\n".encode("ascii") + (body or b""))
            except (BrokenPipeError, ConnectionResetError) as error:
                refused = error  # perhaps it was answered before it was read
            try:
                return Answer(self, connected.makefile("rb"))
            except (ConnectionError, WireError):
                raise refused or WireError("the connection was closed without an answer") from None
        except BaseException:
            self.close()
            raise

    def _connected(self) -> socket.socket:
        if self._socket is None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            made.settimeout(self._timeout)
            self._socket, self._interrupted = made, False
            made.connect(str(self._path))
        return self._socket


class Answer:
    """What is answered: ``status`` at once, the body as it is read.

    Attributes:
        ended: whether the body was read to its end.
    """

    def __init__(self, wire: Wire, file: BinaryIO) -> None:
        self._wire, self._file = wire, file
        self._held = b""
        self.ended = False
        version, _, rest = self._line().partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise WireError("it does not speak HTTP")
        self.status = int(rest[:3])
        headers: dict[bytes, bytes] = {}
        while line := self._line():
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        self._closes = headers.get(b"connection", b"").lower() == b"close"
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        told = headers.get(b"content-length", b"")
        self._left = int(told) if told.isdigit() else None  # bytes of the body; None: to the end of the connection

    def read(self) -> bytes:
        """All that is left of the body. Raises as ``Wire.ask``."""
        blocks = [self._held]
        self._held = b""
        while block := self._more():
            blocks.append(block)
        return b"".join(blocks)

    def readline(self) -> bytes:
        """The next line of the body, with its end; nothing at the end of all. Raises as ``Wire.ask``."""
        while b"\n" not in self._held and (block := self._more()):
            self._held += block
        line, end, self._held = self._held.partition(b"\n")
        return line + end

    def _more(self) -> bytes:
        """The next block; nothing at the end."""
        if self.ended:
            return b""
        if self._chunked:
            return self._chunk()
        block = b"" if self._left == 0 else self._file.read1(min(_BLOCK, self._left or _BLOCK))  # type: ignore[attr-defined]
        if self._left is None:
            if not block:
                self._end(closed=True)
            return block
        if self._left and not block:
            raise WireError("the answer has ended in its middle")
        self._left -= len(block)
        if not self._left:
            self._end()
        return block

    def _chunk(self) -> bytes:
        told = self._line().partition(b";")[0].strip()
        try:
            size = int(told, 16)
        except ValueError:
            raise WireError("it does not speak HTTP") from None
        if size == 0:
            while self._line():
                pass  # trailers
            self._end()
            return b""
        block = self._file.read(size)
        if len(block) < size or self._line():
            raise WireError("the answer has ended in its middle")
        return block

    def _line(self) -> bytes:
        line = self._file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise WireError("the answer has ended in its middle")
        return line.rstrip(b"\r\n")

    def _end(self, *, closed: bool = False) -> None:
        self.ended = True
        self._file.close()
        if self._closes or closed:
            self._wire.close()
