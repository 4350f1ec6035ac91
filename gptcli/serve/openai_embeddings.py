"""``/v1/embeddings``: texts as vectors of length 1, pooled as ``gptcli embed`` does."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptcli.core.build import Model
from gptcli.core.embedding import text_vectors
from gptcli.core.generate import prompt_ids
from gptcli.serve.app import Service, service_of
from gptcli.serve.bridge import unless_gone
from gptcli.serve.limits import Limits
from gptcli.serve.openai_completions import check_length, is_ids
from gptcli.serve.openai_error import as_json, wrong
from gptcli.serve.openai_fields import Fields, aside

# Tokens that go through the model between two steps of decoding.
_AT_ONCE = 1024


async def embed(request: HttpRequest, fields: Fields, limits: Limits) -> Response:
    """Answer a request for vectors."""
    service = service_of(request)
    # The first numbers of such a vector are no better than any others.
    fields.refuse({"dimensions": (service.model.config.width,)})
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", form, "float or base64")
    texts = await aside(fields, inputs_of, fields, service.model, limits)
    vectors = await unless_gone(request, _vectors(service, texts))
    count = sum(map(len, texts))
    shown: list[Any] = [_base64(vector) for vector in vectors] if form == "base64" else vectors
    return as_json(
        {
            "object": "list",
            "model": service.model.name,
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
    )


async def _vectors(service: Service, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    found: list[list[float]] = []
    for part in _parts(texts):
        found += await service.bridge.call(partial(_compute, service.model, part))
    return found


def _compute(model: Model, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    return [vector.numbers() for vector in text_vectors(model, texts, normalize=True)]


def _parts(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Texts in order, so many together that others are not kept waiting for long."""
    first = tokens = 0
    for place, ids in enumerate(texts):
        if tokens and tokens + len(ids) > _AT_ONCE:
            yield texts[first:place]
            first, tokens = place, 0
        tokens += len(ids)
    yield texts[first:]


def inputs_of(fields: Fields, model: Model, limits: Limits) -> list[list[int]]:
    """``input``: a string, several, a list of ids, or several; as ids."""
    given = fields.get("input")
    if isinstance(given, str) or is_ids(given):
        given = [given]
    if not isinstance(given, list) or not 0 < len(given) <= limits.inputs:
        most = f"a string, a list of strings, a list of token ids, or a list of such lists, at most {limits.inputs}"
        raise wrong("input", given, most)
    texts = []
    for each in given:
        if each == "" or not (isinstance(each, str) or is_ids(each)):
            raise wrong("input", each, "a text, or token ids, and not empty")
        ids = prompt_ids(model, each) if isinstance(each, str) else each
        check_length(model, ids, "input")
        texts.append(ids)
    return texts


def _base64(vector: Sequence[float]) -> str:
    """Its float32 numbers, the lowest byte first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
