"""``gptcli serve``: keep a model warm for every command, and for whoever speaks OpenAI's API."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
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

# Seconds that a process may take to leave: answers that are being given end first.
_STOPPING = 5.0
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
    background: Annotated[
        bool, typer.Option("--background", help="Return once the model is warm, and leave it to itself.")
    ] = False,
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
    It stays until Ctrl-C; with --background it has no terminal, and stays until --stop.
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
    if background and line is not None:
        raise UsageError("--background and ranks do not go together", "let torchrun run in the background")

    from gptcli.cli.opening import find, open_for_inference
    from gptcli.core.signals import not_ignored
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
    for number in not_ignored(signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # also while the model loads the socket is taken away
    sockets: list[socket.socket] = [claimed.listener]
    try:
        files = fingerprint(found.folder)
        if address:
            sockets.append(_listen(*address))
        if background and ready_fd is None and (process := _go_on_alone(out, place)):
            claimed.hand_over(process)
            _meet(out, place, process)
            _tell_where(out, found.name, place, sockets)
            return
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

        app = api.app(service, inner.routes)
        if line is not None:
            line.when_lost = lambda: service.stop()  # which is another once the server runs
        ready = partial(_tell_where, out, found.name, place, sockets)
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


def _tell_where(out: Output, name: str, place: Place, sockets: Sequence[socket.socket]) -> None:
    """Say where the model answers: at its place, and at the second socket, if there is one."""
    url = None
    if sockets[1:]:
        host, port = sockets[1].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    out.note(f"{name} is warm at {place.socket}")
    if url:
        out.note(f"OpenAI's API is at {url}")
    if out.json:
        out.record({"model": name, "socket": str(place.socket), "url": url})


def _go_on_alone(out: Output, place: Place) -> int:
    """Fork: the new process gets 0, has no terminal, and says what it has to say in its log; this one gets its number.

    Nothing that has threads is loaded yet.
    """
    log = place.open_log()
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        out.close()
        if process := os.fork():
            return process
        os.setsid()
        for number, to in enumerate((nothing, nothing, log)):
            os.dup2(to, number)
        out.json, out.color = False, "never"
        return 0
    finally:
        os.close(log)
        os.close(nothing)


def _meet(out: Output, place: Place, process: int) -> None:
    """Wait until a process answers. Raises what it said where it has ended instead; Ctrl-C ends it."""
    from gptcli.cli.warm import why_it_ended
    from gptcli.serve.client import Client, GoneError

    try:
        Client(place).get("/health")
    except GoneError as gone:
        os.waitpid(process, 0)
        raise why_it_ended(place, gone) from None
    except KeyboardInterrupt:
        os.kill(process, signal.SIGTERM)
        raise


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
            told = {"model": place.model, "starting": True}
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


def _inode(place: Place) -> int | None:
    """Which socket is at a place; None for none."""
    with suppress(OSError):
        return place.socket.stat().st_ino
    return None


def _stop(out: Output, asked: list[Place]) -> None:
    from gptcli.serve.client import Client

    for place in asked:
        served = _inode(place)
        told = Client(place, timeout=5).post("/gptcli/stop", {})
        deadline = time.monotonic() + _STOPPING
        while _inode(place) == served and time.monotonic() < deadline:  # who starts another finds the place free
            time.sleep(0.01)
        if out.json:
            out.record({**told, "socket": str(place.socket)})
        else:
            out.note(f"the process at {place.socket} ends")
