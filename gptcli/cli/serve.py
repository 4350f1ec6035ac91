"""``gptcli serve``: keep a model warm for every command, and for whoever speaks OpenAI's API."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli import __version__
from gptcli.cli import options, placing, ranks
from gptcli.cli.out import Output
from gptcli.cli.warm import check_extra
from gptcli.errors import NotFoundError, OutputError, UsageError
from gptcli.spec.library import DEFAULT_MODEL

if TYPE_CHECKING:
    import socket

    from gptcli.serve.place import Place

_LOOPBACK = {"127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::1": "::1", "[::1]": "::1", "": "127.0.0.1"}


def serve(
    ctx: typer.Context,
    model: options.Model = None,
    http: Annotated[
        str | None, typer.Option("--http", metavar="[HOST:]PORT", help="Also OpenAI's API over TCP, on loopback.")
    ] = None,
    idle: Annotated[
        float, typer.Option("--idle", metavar="MINUTES", min=0, help="Leave after so long without a request; 0: stay.")
    ] = 0,
    status: Annotated[
        bool, options.typed_option("--status", help="Tell which models are warm, and what they did.")
    ] = False,
    stop: Annotated[bool, options.typed_option("--stop", help="End the warm process.")] = False,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Requests that are decoded together.")] = 32,
    waiting: Annotated[
        int, typer.Option("--waiting", metavar="N", min=1, help="More that may wait for a place.")
    ] = 256,
    prefix_memory: Annotated[
        int, typer.Option("--prefix-memory", metavar="MB", min=0, help="For texts that later prompts may begin with.")
    ] = 256,
    header_timeout: Annotated[
        float,
        typer.Option("--header-timeout", metavar="SECONDS", min=0.1, help="A request's headers may take so long."),
    ] = 30,
    api_key: Annotated[
        str, typer.Option("--api-key", metavar="KEY", help="What whoever comes over TCP has to know.")
    ] = "",
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="A page in a browser that may ask, too; repeatable; * is any."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    tp: ranks.Tp = None,
    offload: ranks.Offload = False,
    plan: placing.Plan = False,
    gpus: placing.Gpus = None,
    offline: options.Offline = False,
    ready_fd: Annotated[int | None, typer.Option("--ready-fd", hidden=True)] = None,
) -> None:
    """Keep a model warm for all commands, and serve OpenAI's API.

    One process a user and model, at a Unix socket that the user alone can open. The commands find it by themselves.
    """
    out: Output = ctx.obj
    options.choice("--quantize", quantize, options.QUANTIZE)
    if placing.asked(ctx, plan):
        held: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "tp": tp, "offload": offload}
        placing.show_placing(out, model or DEFAULT_MODEL, gpus, sequences=rows, **held)
        return
    if status and stop:
        raise UsageError("--status and --stop exclude each other", "give one of them")
    if status or stop:
        (_tell if status else _stop)(out, list(_asked_places(model)))
        return
    check_extra()
    address = _parse_address(http) if http is not None and ready_fd is None else None
    line = ranks.join(out, tp, "serve", device=device, threads=threads)

    from gptcli.cli.opening import find, open_for_inference
    from gptcli.serve.place import Place, claim, claim_or_meet, fingerprint, runtime_folder

    found = find(model)
    place = Place.of(runtime_folder(), found.folder)
    claimed = claim(place) if ready_fd is None else claim_or_meet(place)
    if ready_fd is not None:
        with suppress(OSError):
            os.write(ready_fd, b"1")
            os.close(ready_fd)
    if claimed is None:
        if ready_fd is not None:
            return  # another was faster, and serves as well
        raise UsageError(f"{found.name} is served already", "gptcli serve --status tells more, --stop ends it")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # also while the model loads the socket is taken away
    sockets: list[socket.socket] = [claimed.listener]
    try:
        files = fingerprint(found.folder)
        if address:
            sockets.append(_listen(*address))
        asked: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
        loaded = open_for_inference(str(found.folder), out, threads=threads, line=line, offload=offload, **asked)
        loaded.name = found.name
        from gptcli.serve import inner, server
        from gptcli.serve.app import Service
        from gptcli.serve.limits import Access, Limits
        from gptcli.serve.openai import Api

        limits = Limits(header_timeout, rows=rows, waiting=waiting, prefix_bytes=prefix_memory << 20)
        api = Api(limits, Access(api_key=api_key, origins=tuple(cors or ())))
        service = Service(loaded, found.folder, files, __version__, limits.engine)

        def ready() -> None:
            out.note(f"{found.name} is warm at {place.socket}")
            if address:
                host, port = sockets[1].getsockname()[:2]
                out.note(f"OpenAI's API is at http://{f'[{host}]' if ':' in host else host}:{port}/v1")

        app = api.app(service, inner.routes)
        if line is not None:
            line.when_lost = lambda: service.stop()  # which is another once the server runs
        ended_by = server.run(app, service, sockets, limits, ready=ready, idle_seconds=60 * idle)
        if ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        if line is not None:
            line.check()
    finally:
        for each in sockets[1:]:
            each.close()
        claimed.release()


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``8000``, ``localhost:8000`` or ``[::1]:8000``; only loopback is served."""
    host, _, port = text.rpartition(":")
    try:
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 16:
        raise UsageError(f"--http {text!r} is not [HOST:]PORT", "for instance --http 8000")
    if host not in _LOOPBACK:
        raise UsageError(
            f"--http {text!r}: only loopback is served",
            f"use --http {number}, and a tunnel (ssh -L) or a proxy that checks who comes",
        )
    return _LOOPBACK[host], number


def _listen(host: str, port: int) -> socket.socket:
    from gptcli.serve.server import listen

    try:
        return listen(host, port)
    except OSError as error:
        raise OutputError(f"port {port} of {host} can't be listened at: {error.strerror}", "choose another") from None


def _asked_places(model: str | None) -> Iterator[Place]:
    """Where to look: at one model's place, or at all that listen."""
    from gptcli.cli.opening import find
    from gptcli.serve.place import Place, listens, places, runtime_folder

    runtime = runtime_folder()
    if model is not None:
        found = find(model)
        place = Place.of(runtime, found.folder)
        if not listens(place):
            raise NotFoundError(f"{found.name} is not warm", "gptcli serve starts it")
        yield place
        return
    listening = [place for place in places(runtime) if listens(place)]
    if not listening:
        raise NotFoundError("no model is warm", "gptcli serve starts one")
    yield from listening


def _tell(out: Output, asked: list[Place]) -> None:
    from gptcli.serve.client import Client, GoneError

    for place in asked:
        try:
            told = Client(place, timeout=5).get("/gptcli/status")
        except GoneError:
            told = {"model": place.name, "starting": True}
        told["socket"] = str(place.socket)
        if out.json:
            out.record(told)
        else:
            out.data("\n".join(_lines(told)))


def _lines(told: dict[str, Any]) -> Iterator[str]:
    """What a person wants to know of a warm process."""
    if told.get("starting"):
        yield f"{told['model']}  is starting"
        return
    rows = {
        told["model"]: f"{told['device']}, {told['dtype']}"
        + ("" if told["quantize"] == "none" else f", {told['quantize']}"),
        "process": f"{told['pid']}, since {_time(told['seconds'])}, idle for {_time(told['idle_seconds'])}",
        "requests": f"{told['requests']:,}, of which {told['running']} run and {told['waiting']} wait",
        "tokens": f"{told['prompt_tokens']:,} read ({told['known_tokens']:,} known), {told['made_tokens']:,} made",
        "cache": f"{told['cache_bytes'] / 1e6:,.1f} MB",
        "step": told["step"],
        "socket": told["socket"],
    }
    width = max(map(len, rows))
    yield from (f"{name:{width}}  {value}" for name, value in rows.items())


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _stop(out: Output, asked: list[Place]) -> None:
    from gptcli.serve.client import Client

    for place in asked:
        told = Client(place, timeout=5).post("/gptcli/stop", {})
        if out.json:
            out.record({**told, "socket": str(place.socket)})
        else:
            out.note(f"the process at {place.socket} ends")
