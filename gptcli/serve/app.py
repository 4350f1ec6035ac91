"""The warm process as an ASGI application: what every route needs, who may use which, errors as answers."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gptcli.core.build import Model
from gptcli.errors import BusyError, ExitCode, GptcliError
from gptcli.serve.bridge import Bridge


@dataclass
class Service:
    """One warm model and what the process knows about itself.

    Attributes:
        model, folder: what is served, and where it came from; ``files`` its fingerprint when it was loaded.
        version: of gptcli.
        limits: as ``Engine`` takes them.
        stop: asks the process to end.
        started, last: seconds on ``time.monotonic``: since when it runs, and when the last request ended.
        open_requests: that are being answered.
        bridge: to the engine, while the application runs.
    """

    model: Model
    folder: Path
    files: str
    version: str
    limits: Mapping[str, int] = field(default_factory=dict)
    stop: Callable[[], None] = lambda: None
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    open_requests: int = 0
    _bridge: Bridge | None = None

    @property
    def bridge(self) -> Bridge:
        if self._bridge is None:
            raise BusyError("the server is starting or stopping", "try again in a moment")
        return self._bridge

    @property
    def idle_seconds(self) -> float:
        """For how long nobody has asked for anything."""
        return 0.0 if self.open_requests or self._bridge is None else time.monotonic() - self.last


def make_app(service: Service, routes: Sequence[BaseRoute]) -> ASGIApp:
    """An application of some routes; the engine lives as long as it does."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        service._bridge = Bridge(service.model, **service.limits)
        try:
            yield
        finally:
            bridge, service._bridge = service._bridge, None
            bridge.close()

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=_HANDLERS)
    app.state.service = service
    return _Counting(app, service)


class _Counting:
    """Counts the requests that are being answered, and when the last one ended."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._service.open_requests += 1
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is there to be told
        finally:
            self._service.open_requests -= 1
            self._service.last = time.monotonic()


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


def came_by_socket(request: Request) -> bool:
    """Whether a request came over the Unix socket, and so from the user who serves."""
    server = request.scope.get("server")
    return server is not None and server[1] is None


def only_by_socket(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that is not there for whoever comes over TCP."""

    async def guarded(request: Request) -> Response:
        if not came_by_socket(request):
            return JSONResponse({"error": {"type": "not_found", "message": "there is nothing here"}}, 404)
        return await endpoint(request)

    return guarded


# HTTP status by the exit code that the same error has on the command line.
STATUS = {ExitCode.USAGE: 400, ExitCode.NOT_FOUND: 404, ExitCode.LIMIT: 400, ExitCode.RESOURCE: 503}


def status_of(error: GptcliError) -> int:
    """The HTTP status that tells of an error."""
    return 429 if isinstance(error, BusyError) else STATUS.get(error.exit_code, 500)


async def _answer_error(request: Request, error: Exception) -> Response:
    """As the command line has it with ``--json``; the routes of the OpenAI API answer theirs themselves."""
    assert isinstance(error, GptcliError)
    return JSONResponse(error_object(error), status_of(error))


async def _answer_fault(request: Request, error: Exception) -> Response:
    """What should not happen; the log tells of it, too."""
    return JSONResponse(error_object(GptcliError(f"a fault of gptcli: {type(error).__name__}: {error}")), 500)


_HANDLERS: dict[Any, Any] = {GptcliError: _answer_error, Exception: _answer_fault}


def error_object(error: GptcliError) -> dict[str, Any]:
    """An error as every command tells it with ``--json``."""
    return {"error": {"type": error.type, "message": error.message, "hint": error.hint}}
