"""``/v1/chat/completions``: answer a conversation, written out by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptcli.core.requests import Request
from gptcli.errors import CorruptError, UnsupportedError, UsageError
from gptcli.serve.app import Service, service_of
from gptcli.serve.engine import Ticket
from gptcli.serve.limits import Limits
from gptcli.serve.metrics import Metrics
from gptcli.serve.openai_answer import Job, run
from gptcli.serve.openai_completions import check_count, check_length, seed_of
from gptcli.serve.openai_error import ApiError, encode, wrong
from gptcli.serve.openai_fields import MANY, REFUSED_IN_CHAT, Fields, aside, sampling_of, stops_of, streams
from gptcli.serve.openai_text import Told, Writer, spelled
from gptcli.text.template import ROLES, ChatTemplate
from gptcli.text.transcript import Transcript, Trim, open_chat


class ChatForm:
    """A choice is a message."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    part_object = "chat.completion.chunk"

    def opening(self, index: int) -> str | None:
        delta = '{"role":"assistant","content":""}'
        return f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}'

    def part(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> str:
        delta = f'{{"content":{encode(text)}}}' if text or tokens else "{}"
        told = "null" if tokens is None else encode(_logprobs(tokens))
        end = "null" if finish is None else f'"{finish}"'
        return f'{{"index":{index},"delta":{delta},"logprobs":{told},"finish_reason":{end}}}'

    def whole(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        told = None if tokens is None else _logprobs(tokens)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": finish}


def _logprobs(tokens: Sequence[Told]) -> dict[str, Any]:
    return {
        "content": [
            {**_token(told.data, told.logprob), "top_logprobs": [_token(data, logprob) for data, logprob in told.top]}
            for told in tokens
        ],
        "refusal": None,
    }


def _token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": spelled(data), "logprob": logprob, "bytes": list(data)}


async def chat(request: HttpRequest, fields: Fields, limits: Limits, metrics: Metrics) -> Response:
    """Answer a request for the next message."""
    service = service_of(request)
    model = service.model
    fields.refuse(REFUSED_IN_CHAT)
    each = fields.whole("n", 1, 1, limits.choices)
    check_count(limits, each)
    stream, usage_at_end = streams(fields)
    sampling, stop = sampling_of(fields, limits, model.config.vocab_size), stops_of(fields, limits)
    likeliest = fields.whole("top_logprobs", 0, 0, limits.logprobs)
    logprobs = likeliest if fields.flag("logprobs") else None
    if likeliest and logprobs is None:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    old = fields.whole("max_tokens", -1, 0, MANY)
    max_tokens = fields.whole("max_completion_tokens", old, 0, MANY)
    seed, ignore_eos = seed_of(fields), fields.flag("ignore_eos")
    ids, marks, template = await prompt_of(service, fields)
    check_length(model, ids, "messages")
    asked = [Request(ids, seed + index, max_tokens, (*stop, *marks), ignore_eos) for index in range(each)]
    tickets = [Ticket(one, sampling, logprobs, whole=not stream) for one in asked]
    # As ``gptcli chat`` shows them: what a base model writes begins with the space behind the colon.
    trims = isinstance(template, Transcript)
    writers = [Writer(model.tokenizer, trim=Trim() if trims else None) for _ in asked]
    return await run(
        request, Job(tickets, writers, each, ChatForm(), logprobs is not None, stream, usage_at_end), metrics
    )


async def prompt_of(service: Service, fields: Fields) -> tuple[list[int], tuple[str, ...], ChatTemplate]:
    """The ids of a conversation up to where the answer begins, what ends it besides the end of text, and its form."""
    model = service.model
    messages = messages_of(fields)
    if len(messages) > model.config.context:  # each is a token at the least: no need to write them out
        check_length(model, [0] * len(messages), "messages")
    try:
        template = template_of(service)
        ids = await aside(fields, template.encode, model.tokenizer, messages)
    except (CorruptError, UsageError, UnsupportedError) as error:  # refused by the template, for instance
        raise ApiError(error.message, param="messages") from None
    marks = template.ends(model.tokenizer)
    special = model.tokenizer.special_tokens
    return ids, tuple(mark for mark in marks if special.get(mark) not in model.config.eos_ids), template


def template_of(service: Service) -> ChatTemplate:
    """The model's chat template, or a transcript, as ``gptcli chat`` has it. Raises as ``open_chat`` does."""
    model = service.model
    start = model.tokenizer.start_id if model.tokenizer.start_id is not None else model.config.bos_id
    end = next(iter(model.config.eos_ids), None)
    return open_chat(service.folder, model.tokenizer, start, end)


def messages_of(fields: Fields) -> list[dict[str, str]]:
    """``messages`` with their texts; empty ones are left out, and a developer speaks as the system."""
    given = fields.get("messages")
    if not isinstance(given, list):
        raise wrong("messages", given, 'a list of {"role", "content"}')
    messages = []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise wrong(where, message, "an object")
        role = message.get("role")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}, developer")
        if message.get("tool_calls") or message.get("function_call"):
            raise ApiError("tools are not supported by this server", param=where, code="unsupported_parameter")
        content = _content(message.get("content"), f"{where}.content")
        if content.strip():
            messages.append({"role": role, "content": content})
    if not messages:
        raise ApiError("there is no message with a text", param="messages", code="invalid_value")
    return messages


def _content(given: Any, where: str) -> str:
    """A message's text: a string, or a list of parts that are texts."""
    if given is None or isinstance(given, str):
        return given or ""
    if not isinstance(given, list):
        raise wrong(where, given, "a string or a list of text parts")
    texts = []
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(where, part, 'a part {"type": "text", "text": ...}; others are not supported')
        texts.append(part["text"])
    return "".join(texts)
