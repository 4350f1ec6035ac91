"""Many clients at once, well and badly behaved: each gets what it would get alone, and nothing is left behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli.serve.limits import Limits
from gptcli.serve.metrics import memory_bytes
from tests.conftest import PATIENCE, ROOT
from tests.serve.running import Running, running

CLIENTS = 64
WORDS = ["Once upon a time", "The king", "a", "One day the children said that", "They were happy. "]
GARBAGE = [
    b"\x00\xff\xfe" * 50,
    b"GET\r\n\r\n",
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"prompt"',
    b"POST /v1/completions HTTP/1.1\r\nHo",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"",
]


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[Running]:
    with running(tiny_folder, tmp_path, Limits(rows=8, prefix_bytes=1 << 20)) as server:
        yield server


def body(number: int) -> dict[str, Any]:
    """What client ``number`` asks for."""
    fields = [{"temperature": 0}, {"top_p": 0.8}, {"top_k": 9, "logprobs": 1}, {"n": 2}, {"frequency_penalty": 0.7}]
    prompt = WORDS[number % len(WORDS)] + " and" * (number % 7)
    return {"prompt": prompt, "seed": number, "max_tokens": 5 + number % 20, **fields[number % 3 + number % 2]}


def texts(server: Running, number: int) -> list[str]:
    """The choices that client ``number`` gets; every second one streams."""
    stream = number % 2 == 1
    answer = server.post("/v1/completions", {**body(number), "stream": stream}, tcp=number % 3 == 0)
    assert answer.status == 200, answer.body
    parts: dict[int, str] = {}
    for value in answer.events if stream else [answer.json]:
        for choice in value["choices"]:
            parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
    return [parts[index] for index in sorted(parts)]


def hang_up(server: Running, number: int) -> None:
    """Ask for a long text and leave in the middle of it."""
    connection = server.connection(tcp=number % 2 == 0)
    fields = {"prompt": "a", "seed": number, "max_tokens": 60, "ignore_eos": True, "stream": number % 4 != 0, "n": 3}
    connection.request("POST", "/v1/completions", json.dumps(fields))
    if fields["stream"]:
        assert connection.getresponse().read1(10)
    connection.close()


def send_garbage(server: Running, number: int) -> None:
    with server.raw(tcp=number % 2 == 0) as raw:
        raw.sendall(GARBAGE[number % len(GARBAGE)])
        if number % 3 == 0:
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass


def test_every_client_gets_what_it_would_get_alone(server: Running) -> None:
    wanted = [texts(server, number) for number in range(CLIENTS)]
    assert len({tuple(each) for each in wanted}) > CLIENTS // 2
    got: dict[int, list[str]] = {}
    failed: list[BaseException] = []
    together = threading.Barrier(2 * CLIENTS)

    def client(number: int) -> None:
        try:
            together.wait(PATIENCE)
            if number < CLIENTS:
                got[number] = texts(server, number)
            elif number % 2:
                hang_up(server, number)
            else:
                send_garbage(server, number // 2)
        except BaseException as error:
            failed.append(error)

    before = memory_bytes()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(2 * CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not failed
    assert [got[number] for number in range(CLIENTS)] == wanted
    server.rest()
    assert server.engine.load == (0, 0)
    assert server.engine.cache_bytes <= 1 << 20
    assert memory_bytes() - before < 100 << 20
    assert texts(server, 3) == wanted[3]
    while server.service.open_requests:  # of those who left; each is noticed at the latest when its text ends
        assert server.get("/health").status == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_whoever_hangs_up_stops_the_work(server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Its text is not made to the end: the engine is held at its second step until the caller was seen to leave."""
    pool, step = server.engine._pool, server.engine._pool.step
    reached, left, steps = threading.Event(), threading.Event(), []

    def held(tokens: Any) -> Any:
        steps.append(tokens)
        if len(steps) == 2:
            reached.set()
            assert left.wait(PATIENCE)
        return step(tokens)

    monkeypatch.setattr(pool, "step", held)
    connection = server.connection()
    fields = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(fields))
    assert reached.wait(PATIENCE)
    if stream:
        connection.getresponse().close()
    connection.close()
    while server.service.open_requests:
        assert server.get("/health").status == 200
    left.set()
    server.rest()
    assert len(steps) == 2
    assert server.engine.counts.cancelled == 1
    assert server.engine.counts.made_tokens <= 4


# Serves and asks in a process in which only a Unix socket, and TCP on the loopback, may be opened.
WATCHED = """
import ipaddress, socket, sys
from pathlib import Path

opened = []

def watch(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        local = isinstance(address, (str, bytes)) or address is None
        if not local and not ipaddress.ip_address(address[0]).is_loopback:
            raise RuntimeError(f"{event} {address}")
        opened.append(address)
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        if args[0] not in ("127.0.0.1", "localhost"):
            raise RuntimeError(f"{event} {args}")

sys.addaudithook(watch)
from tests.serve.running import running
with running(Path(sys.argv[1]), Path(sys.argv[2])) as server:
    for tcp in (False, True):
        for stream in (False, True):
            asked = {"prompt": "a", "stream": stream, "max_tokens": 3}
            assert server.post("/v1/completions", asked, tcp=tcp).status == 200
            messages = [{"role": role, "content": "a"} for role in ("system", "user")]
            talk = {"messages": messages, "stream": stream, "max_tokens": 3}
            assert server.post("/v1/chat/completions", talk, tcp=tcp).status == 200
        assert server.post("/v1/embeddings", {"input": "a"}, tcp=tcp).status == 200
        assert server.get("/metrics", tcp=tcp).status == 200
assert any(isinstance(address, tuple) for address in opened)
try:
    socket.create_connection(("192.0.2.1", 9), timeout=1)
except RuntimeError:
    print("watched")
"""


def test_nothing_but_the_socket_and_the_loopback_is_opened(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCHED, str(tiny_folder), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.returncode) == ("watched\n", 0), done.stderr
