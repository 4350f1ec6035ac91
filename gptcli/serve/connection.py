"""Connections on which a request never ends: uvicorn would wait for its headers for ever, and hold them in memory."""

from __future__ import annotations

import asyncio
from typing import Any

from gptcli.serve.limits import Limits

# Bytes of headers: of other servers most take no more.
_HEADER_BYTES = 1 << 16


def bounded(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP, on connections that are closed when a request takes too long, or its headers too much.

    The headers may take ``limits.header_seconds``, from the first of their bytes or, for a connection's first request,
    from its beginning. A body may take ``limits.body_seconds`` more, and once more as much for whoever reads it to say
    so first. What comes between two requests, or never, uvicorn closes by itself.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    whole: Any = AutoHTTPProtocol

    class Bounded(whole):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None
        _unread = 0  # bytes of headers that have not come to their end

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self._within(limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._within(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            cycle = self.cycle
            if cycle is not before:
                self._unread = 0
                self._within(limits.header_seconds + 2 * limits.body_seconds if cycle.more_body else None)
            elif cycle is None or cycle.response_complete:  # headers, or what nobody reads any more
                self._unread += len(data)
                if self._timer is None:
                    self._within(limits.header_seconds)
                if self._unread > _HEADER_BYTES:
                    self._give_up()
            elif not cycle.more_body:
                self._within(None)

        def _within(self, seconds: float | None) -> None:
            """Give up after so long; None: not at all."""
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None if seconds is None else self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            self._within(None)
            if not self.transport.is_closing():
                self.transport.abort()

    return Bounded
