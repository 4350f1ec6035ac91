"""What a server has done, in Prometheus's text format (version 0.0.4)."""

from __future__ import annotations

import resource
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptcli.serve.engine import Counts, Engine, Ticket

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """How often values up to some bounds were seen."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*map(repr, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {total}"


class Metrics:
    """Kept by whoever answers, on the event loop's thread; the engine keeps its own counts."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.first = Histogram(_FIRST)
        self.token = Histogram(_TOKEN)

    def ended(self, ticket: Ticket, made: int) -> None:
        """Note how long a text of so many tokens took."""
        self.first.add(ticket.first - ticket.submitted)
        if made > 1:
            self.token.add((ticket.ended - ticket.first) / (made - 1))

    def text(self, engine: Engine | None) -> str:
        """All of it."""
        return "\n".join([*self._lines(engine), ""])

    def _lines(self, engine: Engine | None) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Answers by route and status.")
        for (route, status), count in sorted(self.requests.items()):
            yield f'gptcli_requests_total{{route="{route}",status="{status}"}} {count}'
        counts = engine.counts if engine else Counts()
        running, waiting = engine.load if engine else (0, 0)
        for name, kind, text, value in (
            ("texts_total", "counter", "Texts asked for; a request may ask for several.", counts.requests),
            ("cancelled_total", "counter", "Texts that nobody waited for any more.", counts.cancelled),
            ("failed_total", "counter", "Texts that ended with an error.", counts.failed),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens),
            ("known_tokens_total", "counter", "Those that were not computed again.", counts.known_tokens),
            ("made_tokens_total", "counter", "Tokens made.", counts.made_tokens),
            ("steps_total", "counter", "Steps of decoding, each a token for every text that runs.", counts.steps),
            ("busy_seconds_total", "counter", "In which the model had work.", counts.busy_seconds),
            ("running", "gauge", "Texts that are decoded now.", running),
            ("waiting", "gauge", "Texts that wait for a place.", waiting),
            ("cache_bytes", "gauge", "Keys and values, in use and remembered.", engine.cache_bytes if engine else 0),
        ):
            yield from _head(name, kind, text)
            yield f"gptcli_{name} {value!r}"
        yield from _head("first_token_seconds", "histogram", "From the request to the first token.")
        yield from self.first.lines("gptcli_first_token_seconds")
        yield from _head("token_seconds", "histogram", "From a token to the next, the mean of each text.")
        yield from self.token.lines("gptcli_token_seconds")
        yield "# HELP process_resident_memory_bytes Resident memory size in bytes."
        yield "# TYPE process_resident_memory_bytes gauge"
        yield f"process_resident_memory_bytes {memory_bytes()}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP gptcli_{name} {text}"
    yield f"# TYPE gptcli_{name} {kind}"


def memory_bytes() -> int:
    """The process's memory; where the system does not tell what it is now, what it was at most."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
