"""What gptcli's own commands ask a warm process for, over the socket: ``/gptcli/...``, JSON in, JSON or NDJSON out.

The core's values travel as they are: a Request is an object with its fields, a Step a line. ``serve/client.py`` is the
other end.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gptcli.core import complete as core
from gptcli.core import runtime
from gptcli.core.generate import check_prompt, prompt_ids
from gptcli.core.requests import Request, Step
from gptcli.core.runner import LocalModel
from gptcli.core.settings import Sampling
from gptcli.errors import CheckError, GptcliError, UsageError
from gptcli.serve.app import Service, error_object, only_by_socket, service_of
from gptcli.serve.bridge import unless_gone
from gptcli.serve.engine import Ticket
from gptcli.serve.place import fingerprint
from gptcli.spec.config import read_config
from gptcli.spec.match import match_folder, stored_dtype


async def status(request: HttpRequest) -> Response:
    """Who serves what, since when, and what was done."""
    service = service_of(request)
    engine, model = service.bridge.engine, service.model
    running, waiting = engine.load
    return JSONResponse(
        {
            "model": model.name,
            "folder": str(service.folder),
            **model.used,
            "version": service.version,
            "pid": os.getpid(),
            "seconds": time.monotonic() - service.started,
            "idle_seconds": service.idle_seconds,
            "running": running,
            "waiting": waiting,
            "cache_bytes": engine.cache_bytes,
            **asdict(engine.counts),
            "step": model.stepping.tell(),
        }
    )


async def stop(request: HttpRequest) -> Response:
    """End, after those that are being answered."""
    service_of(request).stop()
    return JSONResponse({"stopping": True})


async def opened(request: HttpRequest) -> Response:
    """What a command needs to know of the model, if it is just what it would load itself; else 409."""
    service, asked = service_of(request), await body_of(request)
    if reason := why_not(service, asked):
        error = CheckError(reason, "start another with --warm, or go on without it")
        return JSONResponse(error_object(error), 409)
    model = service.model
    return JSONResponse(
        {
            "name": model.name,
            "used": model.used,
            "context": model.config.context,
            "vocab_size": model.config.vocab_size,
            "step": model.stepping.tell(),
        }
    )


def why_not(service: Service, asked: Mapping[str, Any]) -> str | None:
    """Why a service's model is not the one that a command would load with such options; None where it is."""
    model, folder = service.model, service.folder
    if asked.get("version") != service.version:
        return f"the warm process is gptcli {service.version}"
    if fingerprint(folder) != service.files:
        return f"the files of {model.name} have changed since the warm process loaded them"
    if asked.get("quantize", "none") != model.quantize:
        return f"the warm process has {model.name} with --quantize {model.quantize}"
    device = runtime.pick_device(str(asked.get("device", "auto")))
    if device.type != model.device.type or (device.index is not None and device != model.device):
        return f"the warm process has {model.name} on {model.device}"
    stored = stored_dtype(match_folder(folder, read_config(folder)))
    if runtime.pick_dtype(str(asked.get("dtype", "auto")), stored, model.device) is not model.dtype:
        return f"the warm process has {model.name} in {model.dtype_name}"
    return None


async def tokens(request: HttpRequest) -> Response:
    """The ids of a text, alone or as a prompt."""
    body = await body_of(request)
    model, text, special = service_of(request).model, text_in(body, "text"), bool(body.get("special"))
    ids = (
        prompt_ids(model, text, special=special)
        if body.get("prompt")
        else model.tokenizer.encode(text, special=special, follows=bool(body.get("follows")))
    )
    return JSONResponse({"ids": ids})


async def pieces(request: HttpRequest) -> Response:
    """The bytes of tokens."""
    body = await body_of(request)
    return JSONResponse({"pieces": _pieces(service_of(request), body.get("ids", []))})


async def predict(request: HttpRequest) -> Response:
    """The distributions after some prompts, or how likely continuations are."""
    service, body = service_of(request), await body_of(request)
    runner, prompts, choices = LocalModel(service.model), body.get("prompts", []), body.get("choices")
    if choices is not None:
        scored = await unless_gone(request, service.bridge.call(lambda: runner.continuations(prompts, choices)))
        return JSONResponse({"continuations": [[asdict(each) for each in continuations] for continuations in scored]})
    temperatures, top = body.get("temperatures", [1.0]), int(body.get("top", 10))
    found = await unless_gone(request, service.bridge.call(lambda: runner.distributions(prompts, temperatures, top)))
    shown = {candidate.id for distributions in found for candidate in distributions[0].top}
    told = [[asdict(each) for each in distributions] for distributions in found]
    return JSONResponse({"distributions": told, "pieces": _pieces(service, shown)})


async def complete(request: HttpRequest) -> Response:
    """Continuations for a cursor: JSON for JSON; for a form (what curl sends) a line each, its probability first."""
    service, form = service_of(request), "form-urlencoded" in request.headers.get("content-type", "")
    body = _fields((await request.body()).decode("utf-8", "replace")) if form else await body_of(request)
    prefix = text_in(body, "prefix", "")
    try:
        asked: dict[str, Any] = {
            name: kind(body[name]) for name, kind in _COMPLETE.items() if body.get(name) is not None
        }
    except (TypeError, ValueError) as error:
        raise UsageError(f"the request can't be read: {error}", "numbers should be numbers") from None
    # The time that it waits for its turn is the caller's too.
    end = time.perf_counter() + asked.get("deadline_seconds", 0.0)

    def work() -> dict[str, Any]:
        if "deadline_seconds" in asked:
            asked["deadline_seconds"] = max(1e-3, end - time.perf_counter())
        prefixes = service.bridge.engine.prefixes
        return core.complete(service.model, prefix, prefixes=prefixes, **asked).plain(service.model)

    found = await unless_gone(request, service.bridge.call(work))
    if not form:
        return JSONResponse(found)
    lines = [f"{each['probability']:.6f}\t{_one_line(each['text'])}\n" for each in found["completions"]]
    return PlainTextResponse("".join(lines))


_COMPLETE: dict[str, Callable[[Any], Any]] = {
    "suffix": str,
    "num": int,
    "max_tokens": int,
    "until": str,
    "min_prob": float,
    "deadline_seconds": float,
    "special": bool,
}


def _fields(form: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(form, keep_blank_values=True).items()}


def _one_line(text: str) -> str:
    """Nothing that a terminal or a shell would take for more than text on one line."""
    kept = text.split("\n")[0]
    return "".join(character for character in kept if character.isprintable())


async def generate(request: HttpRequest) -> Response:
    """Steps as lines, as they are made; the last line has the timing, or an error."""
    service, body = service_of(request), await body_of(request)
    try:
        sampling = Sampling(**{**body["sampling"], "logit_bias": _biases(body["sampling"].get("logit_bias", {}))})
        asked = [Request(**{**each, "stop": tuple(each.get("stop", ()))}) for each in body["requests"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the request can't be read: {error}", "use the client of the same version") from None
    logprobs, slide, whole = body.get("logprobs"), bool(body.get("slide")), bool(body.get("whole"))
    tickets = [Ticket(each, sampling, logprobs, slide, whole) for each in asked]
    for ticket in tickets:  # before the answer begins
        check_prompt(service.model, ticket.request.prompt)
    return StreamingResponse(_lines(service, tickets), media_type="application/x-ndjson")


async def _lines(service: Service, tickets: list[Ticket]) -> AsyncIterator[str]:
    try:
        async for row, steps in service.bridge.run(tickets):
            yield "".join(json.dumps(_as_line(service, row, step), ensure_ascii=False) + "\n" for step in steps)
    except GptcliError as error:
        yield json.dumps(error_object(error)) + "\n"
        return
    first = min(ticket.first or ticket.ended for ticket in tickets)
    last = max(ticket.ended for ticket in tickets)
    timing = {
        "prefill_seconds": first - min(ticket.submitted for ticket in tickets),
        "decode_seconds": last - first,
        "known": [ticket.known for ticket in tickets],
        "step": service.model.stepping.tell(),
    }
    yield json.dumps({"timing": timing}) + "\n"


def _as_line(service: Service, row: int, step: Step) -> dict[str, Any]:
    line: dict[str, Any] = {"row": row, "token": step.token, "text": step.text}
    if step.finish:
        line["finish"] = step.finish
    if step.slid:
        line["slid"] = step.slid
    if step.chosen:
        line["chosen"] = [step.chosen.id, step.chosen.logprob]
        line["top"] = [[choice.id, choice.logprob] for choice in step.top]
        line["pieces"] = _pieces(service, [choice.id for choice in (step.chosen, *step.top)])
    return line


def _pieces(service: Service, ids: Iterable[int]) -> dict[int, str]:
    return {id_: service.model.tokenizer.token_bytes(id_).hex() for id_ in ids}


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    """JSON has no numbers for keys."""
    try:
        return {int(id_): float(bias) for id_, bias in given.items()}
    except ValueError:
        raise UsageError("logit_bias is not ID: BIAS", "use the client of the same version") from None


async def body_of(request: HttpRequest) -> dict[str, Any]:
    """A request's JSON object. Raises UsageError where it is none."""
    try:
        value = json.loads(await request.body())
    except ValueError as error:
        raise UsageError(f"the body is not JSON: {error}", "send a JSON object") from None
    if not isinstance(value, dict):
        raise UsageError("the body is no JSON object", "send one")
    return value


def text_in(body: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A text in a body. Raises UsageError where it is something else."""
    value = body.get(name, default)
    if not isinstance(value, str):
        raise UsageError(f"{name} should be a text", "send a string")
    return value


routes = [
    Route("/gptcli/status", only_by_socket(status), methods=["GET"]),
    Route("/gptcli/stop", only_by_socket(stop), methods=["POST"]),
    Route("/gptcli/open", only_by_socket(opened), methods=["POST"]),
    Route("/gptcli/tokens", only_by_socket(tokens), methods=["POST"]),
    Route("/gptcli/pieces", only_by_socket(pieces), methods=["POST"]),
    Route("/gptcli/predict", only_by_socket(predict), methods=["POST"]),
    Route("/gptcli/complete", only_by_socket(complete), methods=["POST"]),
    Route("/gptcli/generate", only_by_socket(generate), methods=["POST"]),
]
