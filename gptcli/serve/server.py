"""Runs the application on sockets that are there already, until it is told to stop, a signal comes, or it was idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from gptcli.core import runtime
from gptcli.core.signals import not_ignored
from gptcli.serve.app import Service
from gptcli.serve.connection import bounded
from gptcli.serve.limits import Limits

# Seconds for answers that are being given when the process is asked to end.
_GRACE = 3


# Of what a request failed of, uvicorn's for the routes whose faults go through to it.
_LOGGERS = ("gptcli.serve", "uvicorn.error")


def _in_one_line(record: logging.LogRecord) -> bool:
    """Have a log tell of a fault in one line; its traceback is for who debugs, as everywhere in gptcli."""
    if record.exc_info and not runtime.debugging():
        record.msg, record.args = f"{record.getMessage().strip()}: {record.exc_info[1]!r}", ()
        record.exc_info = record.exc_text = None
    return True


class _Server(uvicorn.Server):
    """Uvicorn, which leaves signals to us: it would let the one that ended it kill the process before it tidies up."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A TCP socket that listens. Raises OSError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def run(
    app: ASGIApp,
    service: Service,
    sockets: Sequence[socket.socket],
    limits: Limits,
    *,
    ready: Callable[[], None],
    idle_seconds: float = 0.0,
) -> int | None:
    """Serve until the end; with ``idle_seconds`` it comes when nobody has asked for anything for so long.

    ``ready`` is called when the first request can be answered. Returns the signal that ended it, or None.
    """
    return asyncio.run(_serve(app, service, sockets, limits, ready, idle_seconds))


async def _serve(
    app: ASGIApp,
    service: Service,
    sockets: Sequence[socket.socket],
    limits: Limits,
    ready: Callable[[], None],
    idle_seconds: float,
) -> int | None:
    config = uvicorn.Config(
        app,
        http=bounded(limits),
        log_level="error",
        access_log=False,
        lifespan="on",
        ws="none",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_in_one_line)
    server = _Server(config, ready)
    ended_by: list[int] = []

    def stop(number: int | None = None) -> None:
        server.should_exit = True
        if number is not None:
            ended_by.append(number)

    service.stop = stop
    loop = asyncio.get_running_loop()
    for number in not_ignored(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    watch = asyncio.create_task(_stop_when_idle(service, idle_seconds)) if idle_seconds else None
    try:
        await server.serve(sockets=list(sockets))
    finally:
        if watch:
            watch.cancel()
    return ended_by[0] if ended_by else None


async def _stop_when_idle(service: Service, seconds: float) -> None:
    while (left := seconds - service.idle_seconds) > 0:
        await asyncio.sleep(left)
    service.stop()
