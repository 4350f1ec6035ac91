"""Preparing training data: megabytes a second and peak memory, beside tiktoken's own batch encoding.

    python tests/bench/prepare.py [--megabytes 1000] [--threads N] [--tokenizer weights/fable] [--json-lines]

A synthetic file of stories is prepared into an empty cache, then once more from the full one. tiktoken's
``encode_ordinary_batch`` gets the same threads and the first part of the same documents: what it gives back for all of
them would not fit into memory. Each runs in a process of its own, one after the other, over several rounds; peak memory
is told beside that of a process that prepares a few bytes, and without the mapped shards, which nobody has to hold.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, in_turn, report, summary

OURS = """
import json, resource, sys, time
from pathlib import Path
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.prepare import prepare
folder, cache, threads, path = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tokenizer = Tokenizer.from_folder(folder)
files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
start_id = tokenizer.special_tokens["<|endoftext|>"]
start = time.perf_counter()
train, valid = prepare("x", [path], tokenizer, files, start_id, cache=cache, held_out=0.01, workers=threads)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
tokens = sum(len(part.tokens) for part in (train, valid) if part)
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "tokens": tokens}))
"""

THEIRS = """
import json, sys, time
from pathlib import Path
from gptcli.text.tokenizer import Tokenizer
folder, threads, path, most = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
encoding = Tokenizer.from_folder(folder)._coder._encoding
with open(path, encoding="utf-8") as file:
    text = file.read(most)
if path.endswith(".jsonl"):
    documents = [json.loads(line)["text"] for line in text.split("\\n")[:-1]]
else:
    documents = text.split("<|endoftext|>")[:-1]
start = time.perf_counter()
encoding.encode_ordinary_batch(documents, num_threads=threads)
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": sum(len(text.encode()) for text in documents)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "weights" / "fable")
    parser.add_argument("--json-lines", action="store_true")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from gptcli.text.bulk import cores

    threads = args.threads or cores()
    sample = 32_000_000
    with tempfile.TemporaryDirectory() as folder:
        name = "stories.jsonl" if args.json_lines else "stories.txt"
        path, cache = Path(folder) / name, Path(folder) / "cache"
        write_stories(path, args.megabytes * 1_000_000)
        size = path.stat().st_size
        tiny = Path(folder) / "tiny.txt"
        tiny.write_text("Once upon a time")
        idle = run(OURS, args.tokenizer, cache, threads, tiny)["peak_bytes"]
        results: list[dict[str, Any]] = []
        again: list[float] = []

        def ours() -> float:
            shutil.rmtree(cache)
            results.append(run(OURS, args.tokenizer, cache, threads, path))
            again.append(run(OURS, args.tokenizer, cache, threads, path)["seconds"])
            return size / 1e6 / results[-1]["seconds"]

        def theirs() -> float:
            done = run(THEIRS, args.tokenizer, threads, path, sample)
            return done["bytes"] / 1e6 / done["seconds"]

        speeds = in_turn({"gptcli": ours, "tiktoken": theirs}, args.rounds)
        shards = sum(file.stat().st_size for file in cache.rglob("*") if file.suffix in (".train", ".valid"))
    peak = max(result["peak_bytes"] for result in results)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["gptcli"] / medians["tiktoken"]
    report(
        f"prepare {size / 1e6:,.0f} MB on {threads} threads",
        {
            "gptcli": f"{medians['gptcli']:.1f} MB/s, {results[0]['tokens']:,} tokens",
            "tiktoken, encode_ordinary_batch": f"{medians['tiktoken']:.1f} MB/s (of the first {sample / 1e6:.0f} MB)",
            "ratio": f"{ratio:.2f}",
            "again, from the cache": f"{statistics.median(again):.2f} s",
            "peak memory": f"{peak / 1e6:,.0f} MB; {idle / 1e6:,.0f} MB for a few bytes",
            "shards": f"{shards / 1e6:,.0f} MB",
        },
        {
            "bytes": size,
            "threads": threads,
            "tokens": results[0]["tokens"],
            "megabytes_per_second": {name: summary(values) for name, values in speeds.items()},
            "ratio": ratio,
            "again_seconds": summary(again),
            "peak_bytes": peak,
            "idle_bytes": idle,
            "shard_bytes": shards,
        },
    )


def run(script: str, *args: object) -> dict[str, Any]:
    """Run a script in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def write_stories(path: Path, size: int) -> None:
    """A file of made-up stories: words of a random language whose frequencies fall off as in a real one."""
    chance = random.Random(0)
    syllables = [first + second for first in [*"bcdfghklmnprstvw", "th", "sh"] for second in [*"aeiou", "ai", "ea"]]
    words = ["".join(chance.choices(syllables, k=chance.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    stories: list[str] = []
    length = 0
    while length < min(size, 8_000_000):
        sentences = []
        for _ in range(int(chance.lognormvariate(2.5, 1))):
            sentence = " ".join(chance.choices(words, weights, k=chance.randrange(4, 20))).capitalize()
            sentences.append(sentence + chance.choice((".", ".", "!", ".\n\n")))
        stories.append(" ".join(sentences))
        length += len(stories[-1])
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for story in stories:
                if path.suffix == ".jsonl":
                    written += file.write(json.dumps({"text": story}) + "\n")
                else:
                    written += file.write(f"{story}\n<|endoftext|>\n")
                if written >= size:
                    break


if __name__ == "__main__":
    main()
