"""How long a folder of 100 shards takes to count: GPT-3's, hollow files with nothing on the disk but headers.

python tests/bench/count_shards.py [--rounds 11] [--shards 100]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, in_turn, report, seconds_of, summary

sys.path.insert(0, str(ROOT))

from gptcli.spec.config import read_config
from gptcli.spec.match import match_folder
from gptcli.spec.params import count_params
from gptcli.spec.presets import read_preset
from tests.spec.shards import hollow_folder


def counting(folder: Path) -> float:
    """Seconds of reading all headers, matching them with the configuration, and counting."""
    start = time.perf_counter()
    config = read_config(folder)
    match_folder(folder, config)
    count_params(config)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shards", type=int, default=100)
    args = parser.parse_args()
    gptcli = [sys.executable, "-m", "gptcli", "count-params"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        header_bytes = hollow_folder(folder, read_preset("gpt3"), args.shards)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        measured = in_turn(
            {
                "counting": lambda: counting(folder),
                "process": lambda: seconds_of([*gptcli, name]),
                "process, on paper": lambda: seconds_of([*gptcli, "gpt3"]),
                "process, by tensor": lambda: seconds_of([*gptcli, name, "--by", "tensor"]),
            },
            args.rounds,
        )
    seconds = {name: summary(values) for name, values in measured.items()}
    rows = {name: f"{1000 * value['median']:7.1f} ms" for name, value in seconds.items()}
    rows["files"] = f"{args.shards} shards, {size / 1e9:,.0f} GB, {header_bytes / 1e3:,.0f} kB of headers"
    ratio = seconds["process"]["median"] / seconds["process, on paper"]["median"]
    rows["ratio"] = f"{ratio:5.2f} x the same without files"
    report("count shards", rows, {"shards": args.shards, "bytes": size, "seconds": seconds, "ratio": ratio})


if __name__ == "__main__":
    main()
