"""Runs the texts that a request asks for, and answers: whole, or as server-sent events while they are made."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptcli.core.requests import Step
from gptcli.serve.app import Service, service_of
from gptcli.serve.bridge import unless_gone
from gptcli.serve.engine import Ticket
from gptcli.serve.metrics import Metrics
from gptcli.serve.openai_error import as_json, encode, log_unexpected, told
from gptcli.serve.openai_text import Told, Writer


class Form(Protocol):
    """How choices are written; ``whole`` and ``part`` give one as JSON."""

    prefix: str  # of the answer's id
    object: str
    part_object: str

    def opening(self, index: int) -> str | None:
        """What a stream begins a choice with."""

    def part(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> str:
        """What a stream goes on with."""

    def whole(self, index: int, text: str, tokens: Sequence[Told] | None, finish: str | None) -> dict[str, Any]:
        """All of it."""


@dataclass(frozen=True)
class Job:
    """What a request has become.

    Attributes:
        tickets, writers: one for each choice, ``each`` of them for each prompt.
        form: how to answer; ``logprobs``: whether tokens are told.
        stream, usage_at_end: as asked.
    """

    tickets: Sequence[Ticket]
    writers: Sequence[Writer]
    each: int
    form: Form
    logprobs: bool
    stream: bool
    usage_at_end: bool

    def note(self, metrics: Metrics) -> None:
        """Once it has ended."""
        for ticket, writer in zip(self.tickets, self.writers, strict=True):
            metrics.ended(ticket, writer.made)

    def usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has."""
        firsts = self.tickets[:: self.each]
        prompt = sum(len(ticket.request.prompt) for ticket in firsts)
        made = sum(writer.made for writer in self.writers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(ticket.known for ticket in firsts)},
        }


async def run(request: HttpRequest, job: Job, metrics: Metrics) -> Response:
    """The answer. Raises what keeps the first token from being made; what happens later, a stream tells itself."""
    service = service_of(request)
    steps = service.bridge.run(job.tickets)
    head = {"id": job.form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": service.model.name}
    if not job.stream:
        return as_json(await unless_gone(request, _whole(steps, job, service, head, metrics)))
    first = await unless_gone(request, anext(steps))
    return _Events(first, steps, job, service, head, metrics)


async def _whole(
    steps: AsyncGenerator[tuple[int, list[Step]], None],
    job: Job,
    service: Service,
    head: Mapping[str, Any],
    metrics: Metrics,
) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(steps):
        async for index, made in steps:
            text, tokens, finish = job.writers[index].take(made)
            choices[index] = job.form.whole(index, text, tokens if job.logprobs else None, finish)
    job.note(metrics)
    return {
        **head,
        "object": job.form.object,
        "system_fingerprint": f"fp_{service.files}",
        "choices": [choices[index] for index in range(len(job.tickets))],
        "usage": job.usage(),
    }


class _Events(Response):
    """The answer as server-sent events, each written as soon as its step was made."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: tuple[int, list[Step]],
        steps: AsyncGenerator[tuple[int, list[Step]], None],
        job: Job,
        service: Service,
        head: Mapping[str, Any],
        metrics: Metrics,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._first, self._steps, self._job, self._metrics = first, steps, job, metrics
        start = {**head, "object": job.form.part_object, "system_fingerprint": f"fp_{service.files}"}
        # All events of an answer but for their choices.
        self._before = f"data: {encode(start)[:-1]},"
        self._after = ',"usage":null}\n\n' if job.usage_at_end else "}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._steps):  # however it ends, nobody goes on making it
            await unless_gone(HttpRequest(scope, receive), self._write(send))

    async def _write(self, send: Send) -> None:
        job = self._job
        openings = (job.form.opening(index) for index in range(len(job.tickets)))
        text = "".join(self._event(opening) for opening in openings if opening is not None)
        text += self._events(*self._first)
        try:
            if text:
                await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": True})
            async for index, steps in self._steps:
                if text := self._events(index, steps):
                    body = text.encode("utf-8", "replace")
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:
            log_unexpected(error)
            _, value = told(error)
            await send({"type": "http.response.body", "body": f"data: {encode(value)}\n\n".encode("utf-8", "replace")})
            return
        end = f'{self._before}"choices":[],"usage":{encode(job.usage())}}}\n\n' if job.usage_at_end else ""
        job.note(self._metrics)
        await send({"type": "http.response.body", "body": f"{end}data: [DONE]\n\n".encode("utf-8", "replace")})

    def _event(self, choice: str) -> str:
        return f'{self._before}"choices":[{choice}]{self._after}'

    def _events(self, index: int, steps: Sequence[Step]) -> str:
        """The event of some steps; nothing as long as they show nothing."""
        text, tokens, finish = self._job.writers[index].take(steps)
        if not (text or tokens or finish):
            return ""
        return self._event(self._job.form.part(index, text, tokens if self._job.logprobs else None, finish))
