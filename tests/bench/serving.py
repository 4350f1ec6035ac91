"""Many clients at one server: tokens per second beside decoding without one, and how long the first token takes.

    python tests/bench/serving.py [--model weights/fable] [--clients 32] [--tokens 128] [--rounds 5]
    python tests/bench/serving.py --against llama-server=127.0.0.1:8080      # another server with the same API
    python tests/bench/serving.py --short                                  # everything once, proves that it works

The server is a process of its own, at a TCP port of the loopback; the clients share one process, which only reads what
comes and looks at the clock. All ask at once, each with its own prompt, and want all their tokens (``ignore_eos``).
``decode`` is what ``gptcli bench`` measures at a batch of 8, in a process of its own, in turn with the servers.

A server that runs on the same machine can be measured in the same run, with ``--against``: it is asked the same over
``/v1/completions``. It has to ignore the end of the text when ``ignore_eos`` says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from common import ROOT, environment, in_turn, report, summary

sys.path.insert(0, str(ROOT))

GOAL = 0.7
WORDS = ["the", "king", "a", "child", "water", "morning", "her", "brother", "seven", "birds", "an", "old", "house"]


class Load(NamedTuple):
    """Seconds of a load: all of it, and until each client had its first token (streams alone)."""

    tokens_per_second: float
    first: list[float]


# --- children ---


def serve(folder: Path, dtype: str, rows: int) -> None:
    """Be a server; the port goes to stdout."""
    from gptcli.cli.caches import native_cache
    from gptcli.core.build import open_model
    from gptcli.serve import inner
    from gptcli.serve.app import Service
    from gptcli.serve.limits import Limits
    from gptcli.serve.openai import Api
    from gptcli.serve.server import listen, run
    from gptcli.text.tokenizer import Tokenizer

    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype=dtype, native=native_cache())
    api = Api(Limits(rows=rows))
    service = Service(model, folder, "bench", "bench", api.limits.engine)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    run(api.app(service, inner.routes), service, [listener], api.limits, ready=lambda: print(port, flush=True))


def decode(folder: Path, dtype: str, tokens: int) -> None:
    """Be what decodes without a server: a line in, tokens per second out."""
    from gptcli.cli.caches import native_cache
    from gptcli.core.build import open_model
    from gptcli.core.measure import measure_decode
    from gptcli.text.tokenizer import Tokenizer

    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype=dtype, native=native_cache())
    print("ready", flush=True)
    for _ in sys.stdin:
        figure = measure_decode(model, batch=8, prompt=32, tokens=tokens, rounds=1)
        print((figure.tokens or 0) / figure.seconds[0], flush=True)


@contextmanager
def child(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """This file as another process, and the first line that it writes."""
    command = [sys.executable, str(Path(__file__).resolve()), *args]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


# --- clients ---


async def ask(address: tuple[str, int], fields: dict[str, object]) -> tuple[float, bytes]:
    """Seconds to the first byte behind the headers, and the whole answer."""
    body = json.dumps(fields).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    told = await reader.readuntil(b"\r\n\r\n")
    if not told.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError((told + await reader.read()).decode())
    parts = [await reader.read(1 << 16)]
    first = time.perf_counter() - start
    while part := await reader.read(1 << 16):
        parts.append(part)
    writer.close()
    return first, b"".join(parts)


async def load(address: tuple[str, int], options: argparse.Namespace, round_: int, stream: bool) -> Load:
    """All clients at once; each round asks what the server has not seen before."""
    asked = [
        {
            "prompt": f"Round {round_}, " + " ".join(WORDS[(client * 7 + place) % len(WORDS)] for place in range(12)),
            "max_tokens": options.tokens,
            "temperature": options.temperature,
            "seed": client,
            "ignore_eos": True,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
        for client in range(options.clients)
    ]
    start = time.perf_counter()
    answers = await asyncio.gather(*(ask(address, fields) for fields in asked))
    seconds = time.perf_counter() - start
    wanted = f'"completion_tokens":{options.tokens},'.encode()
    if not all(wanted in body.replace(b" ", b"") for _, body in answers):
        raise RuntimeError("a text has another length than was asked for")
    return Load(options.clients * options.tokens / seconds, sorted(first for first, _ in answers))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "weights" / "fable")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", action="append", default=[], metavar="NAME=HOST:PORT")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--child", choices=["serve", "decode"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.short:
        options.tokens, options.rounds, options.clients = 8, 1, min(options.clients, 8)
    if options.child == "serve":
        return serve(options.model, options.dtype, options.rows)
    if options.child == "decode":
        return decode(options.model, options.dtype, options.tokens)
    firsts: dict[str, list[float]] = {}
    rounds = iter(range(10**9))
    with ExitStack() as stack:
        common = ["--model", str(options.model), "--dtype", options.dtype, "--tokens", str(options.tokens)]
        _, port = stack.enter_context(child("--child", "serve", "--rows", str(options.rows), *common))
        decoder, _ = stack.enter_context(child("--child", "decode", *common))
        servers = {"gptcli": ("127.0.0.1", int(port))}
        for each in options.against:
            name, _, address = each.partition("=")
            servers[name] = (address.rpartition(":")[0], int(address.rpartition(":")[2]))

        def decoded() -> float:
            assert decoder.stdin is not None
            assert decoder.stdout is not None
            decoder.stdin.write("\n")
            decoder.stdin.flush()
            return float(decoder.stdout.readline())

        def served(name: str, stream: bool) -> Callable[[], float]:
            def measure() -> float:
                done = asyncio.run(load(servers[name], options, next(rounds), stream))
                firsts.setdefault(name, []).extend(done.first if stream else [])
                return done.tokens_per_second

            return measure

        things: dict[str, Callable[[], float]] = {"decode, batch 8": decoded}
        for name in servers:
            things |= {f"{name}, streaming": served(name, True), f"{name}, whole": served(name, False)}
        for measure in things.values():
            measure()
        firsts.clear()
        measured = in_turn(things, options.rounds)
    middle = {name: summary(values)["median"] for name, values in measured.items()}
    base = middle["decode, batch 8"]
    rows = {name: f"{value:9.1f} tokens/s   {value / base:5.2f} x decode" for name, value in middle.items()}
    first = {name: {"p50": percentile(seen, 0.5), "p95": percentile(seen, 0.95)} for name, seen in firsts.items()}
    for name, seen in first.items():
        rows[f"{name}, first token"] = f"p50 {seen['p50'] * 1000:.1f} ms   p95 {seen['p95'] * 1000:.1f} ms"
    result = {
        "tokens_per_second": {name: summary(values) for name, values in measured.items()},
        "of_decode": {name: value / base for name, value in middle.items()},
        "first_token_seconds": first,
        "goal": GOAL,
    }
    title = f"serving {options.model.name}, {options.clients} clients x {options.tokens} tokens"
    report(title, rows, {**result, "clients": options.clients, "tokens": options.tokens})


if __name__ == "__main__":
    main()
