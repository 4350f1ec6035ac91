"""Errors as the OpenAI API tells them: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from gptcli.errors import BusyError, CorruptError, GptcliError, LimitError
from gptcli.serve.app import status_of

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(GptcliError):
    """Something that a caller of the API did wrong, with its HTTP status and the field that it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def wrong(param: str, value: object, wanted: str) -> ApiError:
    """A field that has a value it should not have."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(f"{param} is {shown}, but should be {wanted}", param=param, code="invalid_value")


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """An error's status and its object."""
    param = code = None
    if isinstance(error, ApiError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, GptcliError):
        # Of the model that is served; of files that are asked for it would be 404.
        status = 500 if isinstance(error, CorruptError) else status_of(error)
        code = "rate_limit_exceeded" if isinstance(error, BusyError) else None
        code = "context_length_exceeded" if isinstance(error, LimitError) else code
    else:
        status = 500
    message = error.message if isinstance(error, GptcliError) else "the server failed to answer; its log says why"
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(error: Exception, retry_seconds: int = 1) -> Response:
    """An error as an answer."""
    log_unexpected(error)
    status, value = told(error)
    headers = {"Retry-After": str(retry_seconds)} if status in (429, 503) else {}
    if status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not read
    return as_json(value, status, headers)


def log_unexpected(error: Exception) -> None:
    """What nobody expected is for whoever serves, not for whoever asks."""
    if not isinstance(error, GptcliError):
        logging.getLogger("gptcli.serve").error("a request failed", exc_info=error)


def as_json(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; half a surrogate, which JSON can hold and UTF-8 can't, becomes a question mark."""
    body = encode(value).encode("utf-8", "replace")
    return Response(body, status, headers, media_type="application/json")


# Made once: json.dumps makes an encoder for each call that is not plain.
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
