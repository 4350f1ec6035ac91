"""Loading a model of 1.5B parameters in bfloat16 from the page cache, beside reading its bytes.

    python tests/bench/load.py [--preset gpt2-xl] [--rounds 5] [--folder DIR]
    python tests/bench/load.py --short          # the shipped model, one round: proves that it works

A load maps the files and copies nothing, so three things are measured in turn, each in a process of its own: the load;
the load and one read in every page of every weight, as the first step would make it; and, for comparison, both ways to
get at the bytes without a model: reading the files into one small buffer, used again and again, and mapping them and
reading in every page. Imports are not counted. A first round that is not counted fills the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from common import ROOT, environment, in_turn, random_folder, report, summary

PAGE = 4096
CHILD = f"""
import mmap, sys, time
from pathlib import Path
import torch
from gptcli.core.build import open_model

folder, what = Path(sys.argv[1]), sys.argv[2]
files = sorted(folder.glob("*.safetensors"))

def touch(data):
    return int(torch.frombuffer(data, dtype=torch.uint8)[::{PAGE}].sum(dtype=torch.int64))

start = time.perf_counter()
if what == "read":
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
elif what == "map":
    for file in files:
        with open(file, "rb") as stream:
            touch(mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE))
else:
    model = open_model(folder, None, device="cpu")
    if what == "load and touch":
        # Once for each piece of storage: a file that holds query, key and value as one has three views of it.
        pieces = {{weight.untyped_storage().data_ptr(): weight for weight in model.transformer.parameters()}}
        for weight in pieces.values():
            bytes_ = torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())
            int(bytes_[::{PAGE}].sum(dtype=torch.int64))
print(time.perf_counter() - start)
"""
LOADS, BYTES = ("load", "load and touch"), ("read", "map")


def seconds(folder: Path, what: str) -> float:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), what]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, env=env).stdout))


def main() -> None:
    options = parse()
    with ExitStack() as stack:
        folder = options.folder or stack.enter_context(random_folder(options.preset, dtype="bfloat16"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        things = {name: (lambda name=name: seconds(folder, name)) for name in (*LOADS, *BYTES)}
        seconds(folder, "read")
        found = {name: summary(values) for name, values in in_turn(things, options.rounds).items()}
    ratios = {
        f"{ours} / {bytes_}": found[ours]["median"] / found[bytes_]["median"] for ours in LOADS for bytes_ in BYTES
    }
    rows = {
        name: f"{1000 * s['median']:.0f} ms ({1000 * s['least']:.0f}-{1000 * s['most']:.0f})"
        for name, s in found.items()
    }
    rows |= {name: f"{ratio:.2f} x" for name, ratio in ratios.items()}
    title = f"loading {size / 1e9:.2f} GB from the page cache"
    report(title, rows, {"bytes": size, "seconds": found, "ratios": ratios, "rounds": options.rounds})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-xl")
    parser.add_argument("--folder", type=Path, help="a model folder, instead of a random one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="one round with the shipped model")
    options = parser.parse_args()
    if options.short:
        options.folder, options.rounds = ROOT / "weights" / "fable", 1
    return options


if __name__ == "__main__":
    main()
