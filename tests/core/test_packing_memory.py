"""Quantized and packed, a model is held once: what the process has of its own peaks at that and little more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptcli.core.build import random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.runtime import DTYPES
from gptcli.spec.config import ModelConfig
from tests.conftest import ROOT

# What a mapped file has in memory the system takes back when it wants it; what counts is the process's own.
CHILD = """
import json, sys, threading
from pathlib import Path
import torch
from gptcli.core.build import open_model
from gptcli.core.decode import Decoder

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

folder, native, dtype, quantize = sys.argv[1:]
torch.set_num_threads(1)
torch.ones(300, 300) @ torch.ones(300, 300)
before, most, done = own(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        most.append(own())

watcher = threading.Thread(target=watch)
watcher.start()
model = open_model(Path(folder), None, device="cpu", dtype=dtype, quantize=quantize, native=Path(native))
decoder = Decoder(model.transformer, model.stepping)
decoder.prefill([list(range(100))], 140)
for token in range(20):
    decoder.step(torch.tensor([token]))
now = own()
done.set()
watcher.join()
assert model.stepping.told.startswith("native step"), model.stepping.told
decoder.prefill([list(range(100))], 140)  # it can still go through prompts
packed = model.stepping._native.packed_bytes
table = model.transformer.embedding.weight.nbytes
print(json.dumps({"peak": max(most) - before, "now": now - before, "packed": packed, "table": table}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 50 M parameters, of which the tables have next to none."""
    config = ModelConfig(
        family="gpt2",
        vocab_size=400,
        context=256,
        layers=16,
        width=512,
        heads=8,
        kv_heads=8,
        head_dim=64,
        mlp_width=2048,
    )
    folder = tmp_path_factory.mktemp("models") / "tall"
    save_folder(random_model(config, 0), folder, dtype=DTYPES["float32"])
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which tells what a process has")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_peak_is_what_is_packed_and_a_layer(folder: Path, built: Path, dtype: str, quantize: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(built), dtype, quantize]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    rest = 16 << 20  # activations, the cache, what libraries keep
    layer = 4 * 12 * 512 * 512  # bytes in float32; a prompt has some of its matrices as numbers, one after the other
    assert found["now"] <= found["packed"] + found["table"] + rest
    assert found["peak"] <= found["packed"] + found["table"] + 2 * layer + rest
