"""From a key to suggestions: a warm ``complete``, by curl and as a command, beside a cold ``generate -n 8``.

    python tests/bench/warm.py [--rounds 31]

A text is typed a character at a time, as an editor would ask: each round asks for one character more. The process is of
this benchmark's own, started for it and ended with it. What curl takes is what a shell's widget takes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import environment, in_turn, report, seconds_of, summary

TEXT = (
    "Once upon a time there was a little girl who lived with her grandmother in a small house near the forest. "
    "Every morning she went to the river to fetch water, and every evening the old woman told her a story about "
)
LEAST = 20  # characters that were typed before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="gptcli-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        gptcli = [sys.executable, "-m", "gptcli"]
        typed = [TEXT[: LEAST + number] for number in range(rounds)]
        complete = [*gptcli, "complete", "--min-prob", "0.1", "--deadline", "150ms", "--no-stdin"]
        subprocess.run([*gptcli, "generate", "x", "-n", "64", "--warm"], check=True, capture_output=True)
        socket = next(Path(folder, "gptcli").glob("*.sock"))
        try:
            things = {
                "cold generate -n 8": lambda: seconds_of([*gptcli, "generate", "--no-warm", "-n", "8", "Once upon"]),
                "warm complete": lambda at=iter(typed): seconds_of([*complete, next(at)]),
            }
            if shutil.which("curl"):
                things["curl"] = lambda at=iter(typed): by_curl(socket, next(at))
            seconds_of([*gptcli, "generate", "--no-warm", "-n", "8", "Once upon"])  # fill the page cache
            measured = in_turn(things, rounds)
        finally:
            subprocess.run([*gptcli, "serve", "--stop"], check=True, capture_output=True)
    cold = statistics.median(measured["cold generate -n 8"])
    rows, late = {}, {}
    for name, values in measured.items():
        late[name] = sorted(values)[int(0.95 * (len(values) - 1))]
        middle = statistics.median(values)
        rows[name] = f"{1000 * middle:7.0f} ms   p95 {1000 * late[name]:5.0f} ms   {middle / cold:5.3f} x cold"
    rows["load"] = ", ".join(f"{each:.2f}" for each in os.getloadavg())
    ratios = {name: statistics.median(values) / cold for name, values in measured.items()}
    seconds = {name: summary(values) for name, values in measured.items()}
    report("from key to text", rows, {"seconds": seconds, "p95_seconds": late, "ratios": ratios})


def by_curl(socket: Path, prefix: str) -> float:
    """Seconds of what a widget runs."""
    command = ["curl", "-qsf", "--unix-socket", str(socket), "--data-urlencode", "prefix@-", "-d", "until=line"]
    asked = [*command, "-d", "min_prob=0.1", "-d", "deadline_seconds=0.15", "http://localhost/gptcli/complete"]
    start = time.perf_counter()
    subprocess.run(asked, input=prefix.encode(), check=True, capture_output=True, env=environment())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
