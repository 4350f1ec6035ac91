"""A request's JSON object, read field by field: what is wrong is told by name, null is as good as missing."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.requests import Request as HttpRequest

from gptcli.core.settings import Sampling
from gptcli.serve.limits import Limits
from gptcli.serve.openai_error import ApiError, wrong

Default = TypeVar("Default", int, "int | None")
Result = TypeVar("Result")

# Fields of OpenAI's and of other servers that change the answer and that we don't have, with the values that change
# nothing. Everything else that is not known is ignored: it is about billing, storing, speed, who asks.
_FOR_ALL: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "grammar": ("",),
    "json_schema": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "response_format": ({"type": "text"},),
}
REFUSED_IN_COMPLETIONS = _FOR_ALL
REFUSED_IN_CHAT = {
    **_FOR_ALL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


class Fields:
    """The object; every method raises ApiError (400) for a value that the field can't have."""

    def __init__(self, values: Mapping[str, Any], size: int = 0) -> None:
        """``size``: bytes of the whole."""
        self._values = values
        self.size = size

    def get(self, name: str) -> Any:
        """As it came; None where it is missing or null."""
        return self._values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise wrong(name, value, "a string")
        return value

    def whole(self, name: str, default: Default, least: int, most: int) -> Default:
        """A whole number from ``least`` to ``most``."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise wrong(name, value, f"a whole number from {least} to {most}" if most < 2**31 - 1 else _least(least))
        return value

    def number(self, name: str, default: float, least: float = -math.inf, most: float = math.inf) -> float:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, value, "a number")
        if not least <= value <= most or abs(value) > 1e30:
            span = f"from {least:g} to {most:g}" if most < math.inf else f"of {least:g} or more"
            raise wrong(name, value, f"a number {span}" if least > -math.inf else "a finite number")
        return float(value)

    def refuse(self, names: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise for a field that would change the answer, if only we had it."""
        for name, harmless in names.items():
            value = self.get(name)
            if value is not None and value not in harmless:
                raise ApiError(f"{name} is not supported by this server", param=name, code="unsupported_parameter")


def _least(least: int) -> str:
    return f"a whole number of {least} or more"


# Bytes of a request that are read and tokenized in no time.
_LARGE = 1 << 16
# Larger than any context.
MANY = 2**31 - 1


async def fields_of(request: HttpRequest, limits: Limits) -> Fields:
    """A request's body. Raises ApiError for one that is too large (413), too slow (408) or no JSON object (400)."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limits.body_bytes:
        _too_large(limits)
    try:
        body = await asyncio.wait_for(_body(request, limits), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError("the body did not come in time", status=408, code="timeout") from None
    try:
        value = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError("the body is not a JSON object", code="invalid_json")
    return Fields(value, len(body))


async def aside(fields: Fields, work: Callable[..., Result], *args: Any) -> Result:
    """What ``work`` makes of a request; in a thread where there is so much of it that others would wait."""
    return await asyncio.to_thread(work, *args) if fields.size > _LARGE else work(*args)


async def _body(request: HttpRequest, limits: Limits) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.body_bytes:
            _too_large(limits)
    return bytes(body)


def _too_large(limits: Limits) -> NoReturn:
    raise ApiError(f"the body is larger than {limits.body_bytes:,} bytes", status=413, code="body_too_large")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def sampling_of(fields: Fields, limits: Limits, vocab_size: int) -> Sampling:
    """How to draw: OpenAI's fields and ours (``top_k``, ``min_p``, ``repetition_penalty``)."""
    repetition = fields.number("repetition_penalty", 1.0, 0)
    if repetition == 0:
        raise wrong("repetition_penalty", repetition, "a number above 0")
    return Sampling(
        temperature=fields.number("temperature", 1.0, 0),
        top_k=max(0, fields.whole("top_k", 0, -1, MANY)),  # -1 is how some clients say "all"
        top_p=max(1e-9, fields.number("top_p", 1.0, 0, 1)),  # 0 keeps the likeliest token alone
        min_p=fields.number("min_p", 0.0, 0, 1),
        repetition_penalty=repetition,
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        logit_bias=_biases(fields, limits, vocab_size),
    )


def _biases(fields: Fields, limits: Limits, vocab_size: int) -> dict[int, float]:
    given = fields.get("logit_bias")
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > limits.biases:
        raise wrong("logit_bias", given, f"an object of at most {limits.biases} token ids with numbers")
    biases = {}
    for name, bias in given.items():
        id_ = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else -1
        if not 0 <= id_ < vocab_size:
            raise ApiError(f"logit_bias has {name!r}, which is no token id", param="logit_bias", code="invalid_value")
        biases[id_] = Fields({"logit_bias": bias}).number("logit_bias", 0.0, -100, 100)
    return biases


def stops_of(fields: Fields, limits: Limits) -> tuple[str, ...]:
    """``stop``: a string or several."""
    given = fields.get("stop")
    stops = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops) or len(stops) > limits.stops:
        raise wrong("stop", given, f"a string, or a list of at most {limits.stops}")
    return tuple(stop for stop in stops if stop)


def streams(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream, options = fields.flag("stream"), fields.get("stream_options")
    if options is None:
        return stream, False
    if not stream or not isinstance(options, dict):
        raise ApiError("stream_options needs stream: true, and is an object", param="stream_options")
    return stream, Fields(options).flag("include_usage")
