"""What benchmarks share: things run in turn, medians with their spread, a card for people, one JSON line last."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def in_turn(things: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each thing once a round, one after the other, so that a slow minute slows all of them."""
    measured: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, measure in things.items():
            measured[name].append(measure())
    return measured


def environment() -> dict[str, str]:
    """Ours, in which Python keeps what it has compiled, as it does for whoever installs a program."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def seconds_of(command: list[str]) -> float:
    """Wall seconds of a process whose output nobody reads. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, env=environment(), **streams)
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def report(title: str, rows: Mapping[str, str], result: Mapping[str, Any]) -> None:
    """The card on stderr, the result as JSON on stdout."""
    width = max(map(len, rows), default=0)
    print(title, file=sys.stderr)
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}", file=sys.stderr)
    print(json.dumps({"benchmark": title, **result}))


@contextmanager
def random_folder(preset: str, *, dtype: str = "float32", shards: int = 1) -> Iterator[Path]:
    """A folder of random weights in the shape of a preset, gone afterwards."""
    sys.path.insert(0, str(ROOT))
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.params import count_params
    from gptcli.spec.presets import read_preset

    config = read_preset(preset)
    size = count_params(config).total_stored * DTYPES[dtype].itemsize
    with tempfile.TemporaryDirectory() as folder:
        save_folder(random_model(config, 0), Path(folder), dtype=DTYPES[dtype], shard_bytes=-(-size // shards) + 1)
        yield Path(folder)
