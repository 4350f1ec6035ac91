"""The OpenAI API of a warm process: its routes, who may use them, and how much of them.

What ``cli/serve.py`` makes of it::

    api = Api(limits, access)
    service = Service(..., limits=limits.engine)
    run(api.app(service, inner.routes), service, sockets)
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from gptcli.errors import BusyError
from gptcli.serve.app import Service, make_app, service_of
from gptcli.serve.guard import Guard
from gptcli.serve.limits import Access, Limits
from gptcli.serve.metrics import MEDIA_TYPE, Metrics
from gptcli.serve.openai_chat import chat
from gptcli.serve.openai_completions import complete
from gptcli.serve.openai_embeddings import embed
from gptcli.serve.openai_error import ApiError, answer, as_json
from gptcli.serve.openai_fields import Fields, fields_of
from gptcli.serve.openai_tokens import detokenize, tokenize

Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The routes, with what they share."""

    def __init__(self, limits: Limits | None = None, access: Access | None = None) -> None:
        self.limits = limits or Limits()
        self.access = access or Access()
        self.metrics = Metrics()
        self._created = int(time.time())
        self.routes: list[Route] = [
            self._get("/v1/models", self._models),
            self._get("/v1/models/{id:path}", self._model),
            self._post("/v1/completions", lambda r, f: complete(r, f, self.limits, self.metrics)),
            self._post("/v1/chat/completions", lambda r, f: chat(r, f, self.limits, self.metrics)),
            self._post("/v1/embeddings", lambda r, f: embed(r, f, self.limits)),
            self._post("/tokenize", tokenize),
            self._post("/detokenize", detokenize),
            self._get("/health", self._health),
            self._get("/metrics", self._metrics),
        ]

    def app(self, service: Service, routes: Sequence[BaseRoute] = ()) -> ASGIApp:
        """The whole application: other routes first, then these, and whoever may not ask stays outside."""
        elsewhere = Route("/{path:path}", self._told(self._elsewhere), methods=_METHODS)
        made = make_app(service, [*routes, *self.routes, elsewhere])
        paths = [route.path for route in [*routes, *self.routes] if isinstance(route, Route)]
        return Guard(made, service, self.limits, self.access, self.metrics, paths)

    def _get(self, path: str, endpoint: Endpoint) -> Route:
        return Route(path, self._told(endpoint), methods=["GET"])

    def _post(self, path: str, endpoint: Callable[[Request, Fields], Awaitable[Response]]) -> Route:
        async def read(request: Request) -> Response:
            fields = await fields_of(request, self.limits)
            check_model(service_of(request), fields.get("model"))
            return await endpoint(request, fields)

        return Route(path, self._told(read), methods=["POST"])

    def _told(self, endpoint: Endpoint) -> Endpoint:
        """An endpoint whose errors are told as OpenAI tells them."""

        async def telling(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                raise
            except Exception as error:
                return answer(error, self.limits.retry_seconds)

        return telling

    async def _models(self, request: Request) -> Response:
        return as_json({"object": "list", "data": [self._about(service_of(request))]})

    async def _model(self, request: Request) -> Response:
        service = service_of(request)
        check_model(service, request.path_params["id"])
        return as_json(self._about(service))

    def _about(self, service: Service) -> dict[str, object]:
        return {
            "id": service.model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "gptcli",
            "max_model_len": service.model.config.context,
        }

    async def _health(self, request: Request) -> Response:
        try:
            _ = service_of(request).bridge
        except BusyError:
            return as_json({"status": "not ready"}, 503)
        return as_json({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(service_of(request).bridge.engine), media_type=MEDIA_TYPE)

    async def _elsewhere(self, request: Request) -> Response:
        path = request.url.path
        allowed = {method for route in self.routes if route.path == path for method in route.methods or ()}
        if allowed:
            answered = answer(ApiError(f"{path} does not take {request.method}", status=405, code="wrong_method"))
            answered.headers["Allow"] = ", ".join(sorted(allowed))
            return answered
        raise ApiError(f"there is no {path}", status=404, code="unknown_url")


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def check_model(service: Service, asked: object) -> None:
    """Raise (404) for a model that is not served. Without one asked for, the one that is there is meant."""
    if asked is None or asked == "":
        return
    if not isinstance(asked, str) or asked not in (service.model.name, service.folder.name, str(service.folder)):
        shown = asked[:100] if isinstance(asked, str) else "that"
        message = f"there is no model {shown!r} here; this server has {service.model.name!r}"
        raise ApiError(message, status=404, param="model", code="model_not_found")
