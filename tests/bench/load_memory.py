"""Peak memory of loading GPT-2 124M in float32, in one file and in shards: it should be the weights once.

    python tests/bench/load_memory.py

The child loads the folder and reads every weight; its peak resident memory is held against a child that only imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import random_folder, report

CHILD = """
import json, resource, sys, time
import torch
from pathlib import Path
from gptcli.core.build import open_model
from gptcli.text.tokenizer import Tokenizer

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had before this process began
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
model = open_model(Path(sys.argv[1]), None, device="cpu", dtype=sys.argv[2])
loaded = peak()
start = time.perf_counter()
for weight in model.transformer.parameters():
    weight.sum()
touched = time.perf_counter() - start
size = sum(weight.nbytes for weight in model.transformer.parameters())
seconds = {"load_seconds": model.load_seconds, "touch_seconds": touched}
print(json.dumps({"before": before, "after": peak(), "weights": size, **seconds}))
"""


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Peak bytes before and after loading, in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(folder), dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    rows, results = {}, {}
    for name, stored, asked, shards in (
        ("float32, one file", "float32", "float32", 1),
        ("float32, 4 shards", "float32", "float32", 4),
        ("bfloat16 read as float32", "bfloat16", "float32", 1),
    ):
        with random_folder("gpt2", dtype=stored, shards=shards) as folder:
            found = measure(folder, asked)
        ratio = (found["after"] - found["before"]) / found["weights"]
        results[name] = {**found, "ratio": ratio}
        rows[name] = (
            f"{ratio:.2f} x the weights ({found['weights'] / 1e6:.0f} MB), loaded in {found['load_seconds']:.2f} s"
        )
    report("peak memory of loading GPT-2 124M, beyond the runtime's", rows, {"results": results})


if __name__ == "__main__":
    main()
