"""Tokenizing: megabytes a second of ``gptcli tokenize`` beside tiktoken's own batch encoding, and how fast it starts.

    python tests/bench/tokenizing.py [--megabytes 100] [--threads N] [--tokenizer weights/fable] [--rounds 5]
                                     [--text FILE] [--ttok .venv-ttok/bin/ttok]

A file of made-up stories (or ``--text``, repeated up to the size) is counted, its ids are written, and the same text in
64 files is counted, each by a whole ``gptcli tokenize`` with its start; tiktoken's ``encode_ordinary_batch`` gets the
same cores and the stories as a list, and only the call is timed. It holds all ids as Python integers, so it gets the
first 32 MB. All in turn. Peak memory is beside that of a process that counts a few bytes.

``echo hello | gptcli tokenize --count`` stands beside ``echo hello | ttok``, where that is installed
(``pip install ttok``). (The script is not called tokenize.py, or Python's own module of that name would not be found.)
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
from typing import Any

from common import ROOT, environment, in_turn, report, summary
from prepare import THEIRS, run, write_stories

PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(done.returncode)
"""
FILES = 64
SAMPLE = 32_000_000


def main() -> None:
    args = parse()
    sys.path.insert(0, str(ROOT))
    from gptcli.text.bulk import cores

    threads = args.threads or cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # what gptcli starts sees these
    tokenize = [sys.executable, "-m", "gptcli", "tokenize", "-m", str(args.tokenizer.resolve())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "stories.txt"
        write(args.text, path, args.megabytes * 1_000_000)
        size = path.stat().st_size
        pieces = parts(path, folder / "parts")
        results: list[dict[str, Any]] = []

        def theirs() -> float:
            results.append(run(THEIRS, args.tokenizer.resolve(), threads, path, SAMPLE))
            return results[-1]["bytes"] / 1e6 / results[-1]["seconds"]

        things = {
            "count": lambda: size / 1e6 / seconds([*tokenize, "--count", str(path)]),
            "count of 64 files": lambda: size / 1e6 / seconds([*tokenize, "--count", *map(str, pieces)]),
            "ids": lambda: size / 1e6 / seconds(tokenize, path),
            "tiktoken": theirs,
        }
        speeds = in_turn(things, args.rounds)
        peaks = {name: peak([*tokenize, "--count", name]) for name in (str(path), "a few bytes")}
    small = {"gptcli": [*tokenize, "--count"]}
    if args.ttok:
        small["ttok"] = [args.ttok]
    for command in small.values():
        seconds(command)
    starts = in_turn({name: (lambda c=c: seconds(c)) for name, c in small.items()}, 2 * args.rounds + 1)
    show(args, speeds, starts, [*peaks.values()], size, threads)


def show(
    args: argparse.Namespace,
    speeds: dict[str, list[float]],
    starts: dict[str, list[float]],
    peaks: list[int],
    size: int,
    threads: int,
) -> None:
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratios = {name: median / medians["tiktoken"] for name, median in medians.items()}
    rows = {
        name: f"{median:6.1f} MB/s  ({min(speeds[name]):.1f}-{max(speeds[name]):.1f})   "
        f"{ratios[name]:.2f} x encode_ordinary_batch"
        for name, median in medians.items()
    }
    rows["peak memory"] = f"{peaks[0] / 1e6:.0f} MB; {peaks[1] / 1e6:.0f} MB for a few bytes"
    begin = {name: statistics.median(values) for name, values in starts.items()}
    for name, median in begin.items():
        rows[f"echo hello | {name}"] = f"{1000 * median:6.0f} ms"
    if args.ttok:
        ratios["start"] = begin["gptcli"] / begin["ttok"]
        rows["start, gptcli / ttok"] = f"{ratios['start']:.2f}"
    else:
        rows["left out"] = "ttok: pip install ttok, and name it with --ttok"
    report(
        f"tokenize {size / 1e6:,.0f} MB on {threads} threads",
        rows,
        {
            "bytes": size,
            "threads": threads,
            "megabytes_per_second": {name: summary(values) for name, values in speeds.items()},
            "start_seconds": {name: summary(values) for name, values in starts.items()},
            "peak_bytes": peaks[0],
            "idle_bytes": peaks[1],
            "ratios": ratios,
            "load": os.getloadavg(),
        },
    )


def seconds(command: list[str], stdin: Path | None = None) -> float:
    """Wall seconds of a process that is fed a file, or ``hello``, and whose output goes through a pipe to nowhere."""
    with tempfile.TemporaryFile() as hello:
        hello.write(b"hello\n")
        hello.seek(0)
        start = time.perf_counter()
        with stdin.open("rb") if stdin else hello as source:
            process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, cwd=ROOT, env=environment())
            assert process.stdout
            while process.stdout.read1(1 << 20):
                pass
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)
        return time.perf_counter() - start


def peak(command: list[str]) -> int:
    """The most bytes that a process had in memory."""
    done = subprocess.run([sys.executable, "-c", PEAK, *command], check=True, capture_output=True, cwd=ROOT)
    return int(done.stdout)


def write(text: Path | None, path: Path, size: int) -> None:
    if text is None:
        write_stories(path, size)
        return
    data = text.read_bytes()
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(data)


def parts(path: Path, folder: Path) -> list[Path]:
    """The file as so many files, cut at line ends."""
    folder.mkdir()
    found = []
    with path.open("rb") as source:
        for number in range(FILES):
            found.append(folder / f"{number:03}.txt")
            with found[-1].open("wb") as file:
                file.write(source.read(path.stat().st_size // FILES))
                file.write(source.readline())
                if number == FILES - 1:
                    shutil.copyfileobj(source, file)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--threads", type=int, help="cores to use; default all")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "weights" / "fable")
    parser.add_argument("--text", type=Path, help="a text to repeat, instead of made-up stories")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ttok", default=shutil.which("ttok"), help="the program ttok, by default the one in PATH")
    return parser.parse_args()


if __name__ == "__main__":
    main()
