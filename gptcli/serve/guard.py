"""Stands before the application: who may ask, and what was answered."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptcli.errors import BusyError
from gptcli.serve.app import Service
from gptcli.serve.limits import Access, Limits
from gptcli.serve.metrics import Metrics
from gptcli.serve.openai_error import ApiError, answer

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
# Tells whether the server is there, and nothing else.
_OPEN = frozenset({"/health"})
_CORS = "Access-Control-Allow-"


class Guard:
    """Lets a request through to the application, or answers it; counts both."""

    def __init__(
        self, app: ASGIApp, service: Service, limits: Limits, access: Access, metrics: Metrics, paths: Iterable[str]
    ) -> None:
        """``paths``: that are counted one by one; all others are counted together."""
        self._app, self._service, self._metrics = app, service, metrics
        self._limits, self._access = limits, access
        self._paths = frozenset(paths)
        self._hosts = _LOOPBACK | {host.lower() for host in access.hosts}
        self._key = access.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        by_socket = scope["server"] is not None and scope["server"][1] is None
        headers = Headers(scope=scope)
        origin = None if by_socket else headers.get("origin")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests[self._route(scope["path"]), message["status"]] += 1
                if origin:
                    message["headers"] = [*message.get("headers", ()), *self._cors(origin)]
            await send(message)

        refused: ApiError | BusyError | None = None
        if not by_socket:
            refused = self._not_from_here(headers, origin)
            if refused is None and scope["method"] == "OPTIONS" and origin:
                await _preflight(headers)(scope, receive, counted)
                return
            refused = refused or self._without_key(scope["path"], headers)
        if refused is None and self._service.open_requests >= self._limits.requests:
            refused = BusyError(f"{self._limits.requests} requests are being answered already")
        if refused is not None:
            await answer(refused, self._limits.retry_seconds)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _not_from_here(self, headers: Headers, origin: str | None) -> ApiError | None:
        host = headers.get("host", "").lower()
        name, colon, port = host.rpartition(":")
        if not (colon and port.isdecimal()):
            name = host
        if name not in self._hosts:
            return ApiError("the Host header names another machine", status=403, code="wrong_host")
        allowed = self._access.origins
        if origin and origin not in allowed and "*" not in allowed and origin.lower() != f"http://{host}":
            return ApiError("pages from elsewhere may not ask", status=403, code="wrong_origin")
        return None

    def _without_key(self, path: str, headers: Headers) -> ApiError | None:
        if not self._key or path in _OPEN:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(key.strip().encode("latin-1"), self._key)
        if kind.lower() == "bearer" and right:
            return None
        said = "wrong" if key else "missing (Authorization: Bearer KEY)"
        return ApiError(f"the API key is {said}", status=401, code="invalid_api_key")

    def _cors(self, origin: str) -> list[tuple[bytes, bytes]]:
        if origin not in self._access.origins and "*" not in self._access.origins:
            return []
        return [((_CORS + "Origin").encode(), origin.encode("latin-1")), (b"Vary", b"Origin")]

    def _route(self, path: str) -> str:
        if path in self._paths:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else "other"


def _preflight(headers: Headers) -> Response:
    """What a browser asks before a page's request."""
    asked = headers.get("access-control-request-headers", "*")
    allowed = {_CORS + "Methods": "GET, POST", _CORS + "Headers": asked, "Access-Control-Max-Age": "600"}
    return Response(status_code=204, headers=allowed)
