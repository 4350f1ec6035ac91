"""``/v1/completions``: continue texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gptcli.core import runtime
from gptcli.core.build import Model
from gptcli.core.generate import prompt_ids, start_ids
from gptcli.core.reading import read_prompt
from gptcli.core.requests import Request
from gptcli.serve.app import Service, service_of
from gptcli.serve.engine import Ticket
from gptcli.serve.limits import Limits
from gptcli.serve.metrics import Metrics
from gptcli.serve.openai_answer import Job, run
from gptcli.serve.openai_error import ApiError, encode, wrong
from gptcli.serve.openai_fields import MANY, REFUSED_IN_COMPLETIONS, Fields, aside, sampling_of, stops_of, streams
from gptcli.serve.openai_text import Told, Writer, spelled, told_of
from gptcli.text.infill import Infill


@dataclass(frozen=True)
class Prompt:
    """A text to continue: its ids, and how many of them in front are not the caller's own."""

    ids: list[int]
    text: str
    added: int = 0


class CompletionForm:
    """A choice is a text."""

    prefix = "cmpl-"
    object = "text_completion"
    part_object = "text_completion"

    def opening(self, index: int) -> str | None:
        return None

    def part(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> str:
        told = "null" if tokens is None else encode(self._logprobs(tokens))
        end = "null" if finish is None else f'"{finish}"'
        return f'{{"index":{index},"text":{encode(text)},"logprobs":{told},"finish_reason":{end}}}'

    def whole(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> dict[str, Any]:
        told = None if tokens is None else self._logprobs(tokens)
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    @staticmethod
    def _logprobs(tokens: Sequence[Told]) -> dict[str, Any]:
        tops = [{spelled(data): logprob for data, logprob in reversed(told.top)} for told in tokens]
        return {
            "tokens": [told.text for told in tokens],
            "token_logprobs": [told.logprob for told in tokens],
            "top_logprobs": [top or None for top in tops],
            "text_offset": [told.offset for told in tokens],
        }


async def complete(request: HttpRequest, fields: Fields, limits: Limits, metrics: Metrics) -> Response:
    """Answer a request for completions."""
    service = service_of(request)
    model = service.model
    fields.refuse(REFUSED_IN_COMPLETIONS)
    each = fields.whole("n", 1, 1, limits.choices)
    if fields.whole("best_of", each, 1, MANY) != each:
        raise ApiError("best_of is not supported by this server", param="best_of", code="unsupported_parameter")
    stream, usage_at_end = streams(fields)
    sampling, stop = sampling_of(fields, limits, model.config.vocab_size), stops_of(fields, limits)
    logprobs = fields.whole("logprobs", None, 0, limits.logprobs)
    max_tokens = fields.whole("max_tokens", 16, 0, MANY)
    seed = seed_of(fields)
    echo, ignore_eos = fields.flag("echo"), fields.flag("ignore_eos")
    prompts = await aside(fields, prompts_of, fields, model)
    if suffix := fields.text("suffix"):
        infill = _infill(model, echo)
        stop = (*stop, *infill.ends)
        prompts = await aside(fields, _between, infill, model, prompts, suffix)
    check_count(limits, len(prompts) * each)
    tickets: list[Ticket] = []
    writers: list[Writer] = []
    for prompt in prompts:
        check_length(model, prompt.ids)
        echoed = await _echoed(service, prompt, logprobs) if echo and logprobs is not None else []
        for _ in range(each):
            asked = Request(prompt.ids, seed + len(tickets), max_tokens, stop, ignore_eos)
            tickets.append(Ticket(asked, sampling, logprobs, whole=not stream))
            writers.append(Writer(model.tokenizer, prompt.text if echo else "", echoed))
    job = Job(tickets, writers, each, CompletionForm(), logprobs is not None, stream, usage_at_end)
    return await run(request, job, metrics)


def _infill(model: Model, echo: bool) -> Infill:
    """How the model fills in before a suffix. Raises ApiError where it can't."""
    infill = Infill.of(model.tokenizer)
    if infill is None:
        message = (
            f"{model.name} continues texts and knows nothing of what follows: its tokenizer has no tokens for filling "
            "in (such as <|fim_prefix|>). gptcli complete --suffix ranks continuations by how well a suffix follows"
        )
        raise ApiError(message, param="suffix", code="unsupported_parameter")
    if echo:
        raise ApiError("echo shows nothing sensible beside a suffix", param="echo", code="unsupported_parameter")
    return infill


def _between(infill: Infill, model: Model, prompts: Sequence[Prompt], suffix: str) -> list[Prompt]:
    """Prompts that ask for what stands between each and the suffix."""
    return [
        Prompt(infill.prompt(model.tokenizer, prompt.ids[prompt.added :], suffix), prompt.text) for prompt in prompts
    ]


async def _echoed(service: Service, prompt: Prompt, logprobs: int) -> list[Told]:
    """A prompt's tokens with their log-probabilities, those that we put in front left out."""
    reports = await service.bridge.call(lambda: read_prompt(service.model, prompt.ids, logprobs))
    return told_of(service.model.tokenizer, prompt.ids[prompt.added :], reports[prompt.added :])


def seed_of(fields: Fields) -> int:
    """The seed of choice 0; without one it is drawn."""
    seed = fields.whole("seed", None, -(2**63), 2**63 - 1)
    return runtime.draw_seed() if seed is None else seed


def prompts_of(fields: Fields, model: Model) -> list[Prompt]:
    """``prompt``: a string, several, a list of ids, or several; none is an empty text."""
    given = fields.get("prompt")
    if given is None:
        given = ""
    if isinstance(given, str) or is_ids(given):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong("prompt", given, "a string, a list of strings, a list of token ids, or a list of such lists")
    return [_prompt(each, model) for each in given]


def _prompt(given: Any, model: Model) -> Prompt:
    if isinstance(given, str):
        ids = prompt_ids(model, given)
        return Prompt(ids, given, added=int(model.tokenizer.start_id is not None or not given))
    if given == []:
        return Prompt(start_ids(model), "", added=1)
    if not is_ids(given):
        raise wrong("prompt", given, "a string, a list of strings, a list of token ids, or a list of such lists")
    return Prompt(given, model.tokenizer.decode(given))


def is_ids(given: Any) -> bool:
    """Whether this is a list of token ids, at least one."""
    return isinstance(given, list) and bool(given) and all(type(id_) is int for id_ in given)


def check_count(limits: Limits, count: int) -> None:
    """Raise for more choices than a request may have."""
    most = min(limits.choices, limits.waiting)
    if count > most:
        raise ApiError(f"the request asks for {count} texts; at most {most} go", param="n", code="too_many_choices")


def check_length(model: Model, ids: Sequence[int], param: str = "prompt") -> None:
    """Raise for a prompt longer than the context, and for ids that there are not."""
    context, vocab_size = model.config.context, model.config.vocab_size
    if len(ids) > context:
        raise ApiError(
            f"the context of {model.name} is {context} tokens, but {param} is {len(ids)}",
            param=param,
            code="context_length_exceeded",
        )
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        outside = next(id_ for id_ in ids if not 0 <= id_ < vocab_size)
        shown = json.dumps(outside) if abs(outside) < 10**12 else "a token id"
        raise ApiError(f"{shown} is outside the vocabulary of {vocab_size}", param=param, code="invalid_value")
