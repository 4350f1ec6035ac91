"""Connections that never come to an end of their request are closed; all others are left alone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gptcli.serve.connection import _HEADER_BYTES
from gptcli.serve.limits import Limits
from tests.conftest import PATIENCE
from tests.serve.running import Running, running

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def hasty(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for headers a moment only."""
    with running(tiny_folder, tmp_path_factory.mktemp("s"), Limits(header_seconds=0.3, body_seconds=0.2)) as server:
        yield server


@pytest.fixture(scope="module")
def patient(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits longer for them than any test lasts."""
    with running(tiny_folder, tmp_path_factory.mktemp("s"), Limits(header_seconds=10 * PATIENCE)) as server:
        yield server


def rest_of(raw: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with suppress(ConnectionResetError):  # it closed with something unread
        while block := raw.recv(1 << 16):
            found += block
    return found


def answer_to(server: Running, sent: bytes) -> bytes:
    """All that is answered; on a busy machine what is sent may come too late, and is sent again."""
    for _ in range(20):
        with server.raw() as raw, suppress(BrokenPipeError):
            raw.sendall(sent)
            if found := rest_of(raw):
                return found
    raise AssertionError("nothing was answered")


def test_headers_without_an_end_close_the_connection(hasty: Running) -> None:
    with ExitStack() as stack:
        opened = []
        for tcp in (False, True):
            for sent in (b"", b"PO", HEAD, HEAD + b"Content-Length: 5\r\nX-Slow"):
                raw = stack.enter_context(hasty.raw(tcp=tcp))
                with suppress(BrokenPipeError, ConnectionResetError):
                    raw.sendall(sent)
                opened.append(raw)
        assert [rest_of(raw) for raw in opened] == [b""] * 8


def test_headers_that_trickle_in_close_it_too(hasty: Running) -> None:
    closed = threading.Event()
    with hasty.raw() as raw:

        def trickle() -> None:
            with suppress(OSError):
                raw.sendall(HEAD)
                while not closed.wait(0.01):
                    raw.sendall(b"X")

        sender = threading.Thread(target=trickle)
        sender.start()
        assert rest_of(raw) == b""
        closed.set()
        sender.join(PATIENCE)


def test_the_second_request_of_a_connection_has_no_more_time(hasty: Running) -> None:
    first = b""
    while not first:
        with hasty.raw() as raw, suppress(BrokenPipeError, ConnectionResetError):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            first = raw.recv(1 << 16)  # nothing, where even that came too late
            raw.sendall(b"GET /health HTTP/1.1\r\n")
            first += rest_of(raw)
    assert first.count(b"HTTP/1.1 200 OK") == 1


def test_a_body_without_an_end_is_told_and_closes_it(hasty: Running) -> None:
    assert answer_to(hasty, HEAD + b"Content-Length: 100\r\n\r\n{").startswith(b"HTTP/1.1 408 ")
    assert hasty.service.open_requests == 0


def test_a_body_that_no_limit_of_its_route_ends_closes_it(hasty: Running) -> None:
    with hasty.raw() as raw, suppress(BrokenPipeError):
        raw.sendall(HEAD.replace(b"/v1/completions", b"/gptcli/tokens") + b"Content-Length: 100\r\n\r\n{")
        assert rest_of(raw) == b""


def test_headers_without_measure_close_it(patient: Running) -> None:
    with patient.raw() as raw:
        with suppress(BrokenPipeError, ConnectionResetError):
            raw.sendall(HEAD + b"X-Long: " + b"x" * (4 * _HEADER_BYTES))
        assert b" 200 " not in rest_of(raw)


def test_an_answer_may_take_longer_than_its_headers(hasty: Running) -> None:
    """The engine is held until a connection that came later was given up."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert done.wait(PATIENCE)

    holding = hasty.engine.call(hold)
    assert held.wait(PATIENCE)
    body = b'{"prompt": "a", "max_tokens": 2}'
    asked = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    answers: list[bytes] = []
    asking = threading.Thread(target=lambda: answers.append(answer_to(hasty, asked)))
    asking.start()
    end = time.monotonic() + PATIENCE
    while not hasty.engine.load[1]:
        assert time.monotonic() < end
        time.sleep(0.01)
    with hasty.raw() as raw:
        assert rest_of(raw) == b""
    done.set()
    holding.result(PATIENCE)
    asking.join(PATIENCE)
    (answer,) = answers
    assert answer.startswith(b"HTTP/1.1 200 ")
