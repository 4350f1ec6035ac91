"""``/tokenize`` and ``/detokenize``, as llama.cpp's server and vLLM have them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptcli.core.build import Model
from gptcli.core.generate import prompt_ids
from gptcli.serve.app import service_of
from gptcli.serve.openai_chat import prompt_of
from gptcli.serve.openai_completions import is_ids
from gptcli.serve.openai_error import ApiError, as_json, wrong
from gptcli.serve.openai_fields import Fields


async def tokenize(request: HttpRequest, fields: Fields) -> Response:
    """The tokens of ``prompt`` or ``content`` (a text), or of ``messages`` (up to where the answer begins).

    A prompt has the start token in front, where the model has one, unless ``add_special_tokens`` is false; a content
    has it if ``add_special`` is true.
    """
    service = service_of(request)
    model = service.model
    if fields.get("messages") is not None:
        ids, *_ = await prompt_of(service, fields)
    elif fields.get("prompt") is not None:
        ids = _ids(model, fields.text("prompt"), fields.flag("add_special_tokens", True))
    elif fields.get("content") is not None:
        ids = _ids(model, fields.text("content"), fields.flag("add_special"))
    else:
        raise ApiError("there is neither prompt nor content nor messages", param="prompt", code="invalid_value")
    tokens: list[Any] = list(ids)
    if fields.flag("with_pieces"):
        tokens = [{"id": id_, "piece": _piece(model.tokenizer.token_bytes(id_))} for id_ in ids]
    return as_json({"tokens": tokens, "count": len(ids), "max_model_len": model.config.context})


def _ids(model: Model, text: str, special: bool) -> list[int]:
    ids: list[int] = prompt_ids(model, text) if special and text else model.tokenizer.encode(text)
    return ids


def _piece(data: bytes) -> str | list[int]:
    """Its text, or, of part of a character, its bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: HttpRequest, fields: Fields) -> Response:
    """The text of ``tokens``."""
    model, ids = service_of(request).model, fields.get("tokens")
    if ids != [] and not is_ids(ids):
        raise wrong("tokens", ids, "a list of token ids")
    text = model.tokenizer.decode(ids)
    return as_json({"content": text, "prompt": text})
