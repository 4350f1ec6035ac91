"""A model of 3 billion parameters in Llama's shape, random, in four shards: what opening it costs.

    python tests/bench/big_folder.py [--preset llama-3.2-3b] [--folder DIR] [--tokens 4]

Needs as much room on the disk as the model has bytes (6.4 GB), and a tenth more memory than that; the folder is deleted
afterwards. Three things are asked: that loading in bfloat16 and reading every weight takes no more memory than the
weights and a tenth; that it goes at the disk's own speed, with the files put out of the page cache before; and that
``count-params`` takes less than a second. Then it generates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, environment, report, seconds_of

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from gptcli.spec.config import ModelConfig

SHARDS = 4
_BLOCK = 1 << 24  # random numbers that are made once and used again


def write(folder: Path, config: ModelConfig) -> int:
    """The folder, shard by shard; its bytes of weights."""
    import torch
    from safetensors.torch import save_file

    from gptcli.spec.config import to_hf
    from gptcli.spec.match import disk_layout, written_name
    from tests.conftest import tiny_tokenizer

    (folder / "config.json").write_text(json.dumps({**to_hf(config), "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_bytes(tiny_tokenizer())
    noise = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    layout = disk_layout(config)
    sizes = {name: 2 * torch.Size(entry.shape).numel() for name, entry in layout.items()}
    whole = sum(sizes.values())
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    done = 0
    for name, size in sizes.items():
        shards[min(SHARDS - 1, done * SHARDS // whole)].append(name)
        done += size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        save_file({written_name(config, name): filled(layout[name].shape, noise) for name in names}, folder / file)
        weight_map |= {written_name(config, name): file for name in names}
    index = {"metadata": {"total_size": whole}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return whole


def filled(shape: tuple[int, ...], noise: Any) -> Any:
    """Random numbers, and ones for norms."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    for part in tensor.view(-1).split(_BLOCK):
        part.copy_(noise[: len(part)])
    return tensor


def shards_of(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("*.safetensors")))


def forget(folder: Path) -> None:
    """Put the files out of the page cache, as far as the system obeys."""
    for file in shards_of(folder):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_seconds(folder: Path) -> float:
    """To read the files' bytes, one after the other."""
    forget(folder)
    buffer = bytearray(1 << 24)
    start = time.perf_counter()
    for file in shards_of(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-3.2-3b")
    parser.add_argument("--folder", help="Where to write it; a temporary folder by default.")
    parser.add_argument("--tokens", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        from load_memory import measure

        from gptcli.spec.presets import read_preset

        size = write(folder, read_preset(asked.preset))

        reading = read_seconds(folder)
        forget(folder)
        loaded = measure(folder, "bfloat16")
        command = [sys.executable, "-m", "gptcli"]
        counting = min(seconds_of([*command, "count-params", name]) for _ in range(3))
        made = subprocess.run(
            [*command, "generate", "-m", name, "Once upon a time", "-n", str(asked.tokens), "-t", "0", "--json",
             "--dtype", "bfloat16", "--ignore-eos", "--no-warm"],
            check=True, capture_output=True, stdin=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
    answer = json.loads(made.stdout)
    ratio = (loaded["after"] - loaded["before"]) / size
    loading = loaded["load_seconds"] + loaded["touch_seconds"]
    rows = {
        "weights": f"{size / 1e9:.2f} GB in {SHARDS} shards",
        "memory": f"{ratio:.3f} x the weights",
        "loading": f"{loaded['load_seconds']:.2f} s; all read: {loading:.2f} s, {size / 1e9 / loading:.2f} GB a second",
        "disk": f"{reading:.2f} s to read the bytes: {size / 1e9 / reading:.2f} GB/s",
        "count-params": f"{counting:.2f} s",
        "generate": f"{len(answer['tokens'])} tokens, {answer['timing']['tokens_per_second']:.2f} a second",
    }
    result = {
        "bytes": size,
        "memory_ratio": ratio,
        "load_seconds": loading,
        "read_seconds": reading,
        "count_seconds": counting,
        "tokens_per_second": answer["timing"]["tokens_per_second"],
    }
    report(f"opening {asked.preset}, random, in {SHARDS} shards", rows, result)


if __name__ == "__main__":
    main()
