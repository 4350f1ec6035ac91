"""The engine's thread and asyncio: tickets go over there, steps come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from gptcli.core.build import Model
from gptcli.core.requests import Step
from gptcli.serve.engine import Delivery, Engine, Ticket

Result = TypeVar("Result")


class Bridge:
    """An engine, seen from an event loop: the one that runs when this is made."""

    def __init__(self, model: Model, **limits: int) -> None:
        """``limits`` as of ``Engine``."""
        self._loop = asyncio.get_running_loop()
        self.engine = Engine(model, self._deliver, **limits)

    def _deliver(self, made: Delivery) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._dispatch, made)

    @staticmethod
    def _dispatch(made: Delivery) -> None:
        for ticket, steps in made:
            ticket.inbox.put_nowait((ticket, steps))

    async def run(self, tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, list[Step]], None]:
        """The steps of some tickets as they are made, each with its ticket's number, until all have ended.

        Raises what ``Engine.submit`` does, and a ticket's own error. However it ends, none is left running.
        """
        inbox: asyncio.Queue[tuple[Ticket, list[Step]]] = asyncio.Queue()
        for ticket in tickets:
            ticket.inbox = inbox
        self.engine.submit_all(tickets)
        try:
            left = len(tickets)
            while left:
                ticket, steps = await inbox.get()
                if not steps and ticket.error is not None:  # what was made before is told first
                    raise ticket.error
                left -= steps[-1].finish is not None
                yield tickets.index(ticket), steps
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def call(self, work: Callable[[], Result]) -> Result:
        """``Engine.call``: what ``work`` makes of the model, between two steps of the others."""
        return await asyncio.wrap_future(self.engine.call(work))

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """What ``work`` makes, which is given up when the caller hangs up meanwhile (ClientDisconnect)."""
    task: asyncio.Future[Result] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await request.receive()
