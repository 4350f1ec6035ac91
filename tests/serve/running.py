"""The whole application behind real sockets in this process, and a client of the standard library."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from gptcli.core.build import open_model
from gptcli.serve import inner
from gptcli.serve.app import Service
from gptcli.serve.connection import bounded
from gptcli.serve.engine import Engine
from gptcli.serve.limits import Access, Limits
from gptcli.serve.openai import Api
from gptcli.serve.server import listen
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import PATIENCE


class Answer(NamedTuple):
    """What came back; ``json`` of it, or the ``events`` of a stream."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, which ends as it should."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


class Running:
    """A server that runs."""

    def __init__(self, service: Service, api: Api, port: int, path: Path) -> None:
        self.service, self.api, self.port, self.path = service, api, port, path

    @property
    def engine(self) -> Engine:
        return self.service.bridge.engine

    def connection(self, *, tcp: bool = False) -> http.client.HTTPConnection:
        return (
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE) if tcp else UnixConnection(self.path)
        )

    def raw(self, *, tcp: bool = False) -> socket.socket:
        """A connection on which anything can be sent."""
        if tcp:
            return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection = self.connection()
        connection.connect()
        raw: socket.socket = connection.sock
        return raw

    def ask(self, method: str, path: str, body: Any = None, *, tcp: bool = False, **headers: str) -> Answer:
        """One request; a body that is not bytes is sent as JSON."""
        connection = self.connection(tcp=tcp)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, **more: Any) -> Answer:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any, **more: Any) -> Answer:
        return self.ask("POST", path, body, **more)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """What ``/v1/completions`` answers when all goes well."""
        answer = self.post("/v1/completions", {"prompt": prompt, "seed": 1, **fields})
        assert answer.status == 200, answer.body
        return answer.json

    def rest(self) -> None:
        """Wait until the engine has nothing to do: what it is asked comes behind what it had."""
        done, idle = threading.Event(), False
        while not idle:  # and once more: what it counts, it may count behind the last that it does
            idle = self.engine.idle
            self.engine.call(done.set).result(PATIENCE)


@contextmanager
def running(
    folder: Path, place: Path, limits: Limits | None = None, access: Access | None = None, hosts: Sequence[str] = ()
) -> Iterator[Running]:
    """Serve a model folder in float32, at a Unix socket in the folder ``place`` and a port of the loopback."""
    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    api = Api(limits, access)
    service = Service(model, folder, "files", "test", api.limits.engine)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(str(place / "s"))
    unix.listen(128)
    tcp = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        api.app(service, inner.routes),
        http=bounded(api.limits),
        log_level="error",
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=3,
    )
    server, started = uvicorn.Server(config), threading.Event()
    failed: list[BaseException] = []

    async def serve() -> None:
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[unix, tcp])
        started.set()
        await server.main_loop()
        await server.shutdown(sockets=[unix, tcp])

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(PATIENCE)
        assert not failed, failed
        yield Running(service, api, tcp.getsockname()[1], place / "s")
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        unix.close()
        tcp.close()
