"""HTTP from the side that asks: every way in which an answer comes, is cut short, or does not come."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gptcli.serve.wire import Wire, WireError
from tests.conftest import PATIENCE
from tests.serve.running import running

OK = b"HTTP/1.1 200 OK\r\n"
BODY = "Once\nupon\n\na ü time".encode()
CHUNKS = b"5\r\nOnce\n\r\nB;x=y\r\nupon\n\na \xc3\xbc \r\n4\r\ntime\r\n0\r\nx: y\r\n\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS
WHOLE = {
    "length": OK + b"content-length: 20\r\n\r\n" + BODY,
    "chunks": CHUNKED,
    "to the end": OK + b"Connection: close\r\n\r\n" + BODY,
}
CUT = {
    "nothing": b"",
    "half a line": OK[:9],
    "half a head": OK + b"content-length: 5\r\n",
    "half a body": OK + b"content-length: 21\r\n\r\n" + BODY,
    "half a chunk": CHUNKED[:-20],
    "no last chunk": CHUNKED[: CHUNKED.index(b"0\r\nx")],
    "another protocol": b"220 mail.example.org\r\n",
    "no size": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}

Serve = Callable[..., Path]


class Scripted:
    """Answers each request of a connection with the next of its blocks, and closes behind the last."""

    def __init__(self, path: Path, connections: Sequence[Sequence[bytes]]) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connections = connections
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):  # whoever asked has gone
            for answers in self._connections:
                talk, _ = self._listener.accept()
                with talk:
                    for answer in answers:
                        self.asked.append(talk.recv(1 << 16))
                        for number in range(0, len(answer), 7):  # in small pieces
                            talk.sendall(answer[number : number + 7])

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._listener.close()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., tuple[Wire, Scripted]]]:
    with ExitStack() as stack:

        def serve(*connections: Sequence[bytes]) -> tuple[Wire, Scripted]:
            server = Scripted(tmp_path / "s", connections)
            wire = Wire(tmp_path / "s", PATIENCE)
            stack.callback(server.close)
            stack.callback(wire.close)
            return wire, server

        yield serve


@pytest.mark.parametrize("kind", WHOLE)
def test_a_body_comes_whole_and_by_lines(kind: str, scripted: Callable[..., tuple[Wire, Scripted]]) -> None:
    wire, server = scripted([WHOLE[kind]], [WHOLE[kind]])
    answer = wire.ask("GET", "/a")
    assert (answer.status, answer.ended) == (200, False)
    assert answer.read() == BODY
    assert (answer.ended, answer.read(), answer.readline()) == (True, b"", b"")
    wire.close()
    answer = wire.ask("POST", "/b", b"{}")
    lines = []
    while line := answer.readline():
        lines.append(line)
    assert lines == BODY.splitlines(keepends=True)
    assert answer.ended
    assert server.asked[0].startswith(b"GET /a HTTP/1.1\r\nHost: localhost\r\n")
    assert server.asked[1].endswith(b"\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize("kind", CUT)
def test_what_is_cut_short_is_no_answer(kind: str, scripted: Callable[..., tuple[Wire, Scripted]]) -> None:
    wire, _ = scripted([CUT[kind]])
    with pytest.raises(WireError):
        wire.ask("GET", "/").read()


def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_is_opened_again(
    scripted: Callable[..., tuple[Wire, Scripted]],
) -> None:
    wire, server = scripted([WHOLE["length"], WHOLE["chunks"]], [WHOLE["length"]])
    for _ in range(3):
        assert wire.ask("GET", "/").read() == BODY
    assert len(server.asked) == 3


def test_an_answer_that_ends_the_connection_lets_the_next_open_one(
    scripted: Callable[..., tuple[Wire, Scripted]],
) -> None:
    wire, _ = scripted([WHOLE["to the end"]], [WHOLE["length"]])
    for _ in range(2):
        assert wire.ask("GET", "/").read() == BODY


def test_who_is_interrupted_does_not_ask_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        wire = Wire(tmp_path / "s", PATIENCE)
        failed: list[BaseException] = []

        def ask() -> None:
            try:
                wire.ask("GET", "/first").read()
                wire.ask("GET", "/second")
            except WireError as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        talk, _ = listener.accept()
        with talk:
            talk.recv(1 << 16)
            talk.sendall(WHOLE["length"])
            assert talk.recv(1 << 16)
            wire.interrupt()
            asking.join(PATIENCE)
        assert len(failed) == 1
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        wire.close()


def test_patience_ends_and_nobody_there_is_told(tmp_path: Path) -> None:
    wire = Wire(tmp_path / "s", 0.05)
    with pytest.raises(FileNotFoundError):
        wire.ask("GET", "/")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ConnectionRefusedError):
            wire.ask("GET", "/")
        listener.listen()
        with pytest.raises(TimeoutError):
            wire.ask("GET", "/")


def test_a_real_server_is_understood(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path) as server:
        wire = Wire(server.path, PATIENCE)
        assert wire.ask("GET", "/nowhere").status == 404
        wire.close()
        asked = {"prompt": "Once", "seed": 1, "max_tokens": 5}
        for _ in range(2):
            whole = wire.ask("POST", "/v1/completions", json.dumps(asked).encode())
            text = json.loads(whole.read())["choices"][0]["text"]
            stream = wire.ask("POST", "/v1/completions", json.dumps({**asked, "stream": True}).encode())
            events = [line[6:] for line in stream.read().splitlines() if line.startswith(b"data: {")]
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text
        wire.close()
