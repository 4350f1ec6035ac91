"""Training on a CUDA device: the losses of the CPU, what is found out by trying, and runs that go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptcli.core.attention import attend, attention_pattern, gather
from gptcli.train.loss import Objective, cross_entropy
from gptcli.train.ranks import Ranks
from tests.conftest import ROOT
from tests.train import small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


def trained(out: Path, device: str, **more: Any) -> list[dict[str, Any]]:
    return list(small.run(out, small.model().to(device), [small.corpus(60, "held out", 1)], **more))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_are_those_of_the_cpu(tmp_path: Path, optimizer: str) -> None:
    options = {"steps": 20, "optimizer": optimizer, "eval_every": 10}
    host, card = (trained(tmp_path / device, device, **options) for device in ("cpu", DEVICE))
    assert card[0]["device"].startswith(DEVICE)
    # Muon's orthogonal updates are computed in bfloat16 on either.
    torch.testing.assert_close(losses(card), losses(host), rtol=0, atol=1e-4 if optimizer == "adamw" else 2e-2)
    evals = [[event["bits_per_byte"] for event in run if event["event"] == "eval"] for run in (host, card)]
    torch.testing.assert_close(evals[1], evals[0], rtol=1e-2, atol=0)


def test_bfloat16_learns_as_float32_does(tmp_path: Path) -> None:
    exact, fast = (
        losses(trained(tmp_path / str(dtype), DEVICE, steps=60, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert fast[-1] < fast[0]
    assert abs(fast[-1] - exact[-1]) < 0.05


def test_what_is_found_out_by_trying_is_told_and_used_again(tmp_path: Path) -> None:
    options = {"steps": 6, "save_every": 3, "dtype": torch.bfloat16}
    first = trained(tmp_path, DEVICE, **options)
    chosen = {name: first[0][name] for name in ("micro_batch", "compile", "checkpoint_activations")}
    assert 1 <= chosen["micro_batch"] <= 4
    checkpoint = small.newest(tmp_path)
    assert checkpoint.state["options"]["choices"] == chosen


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_compiling_and_saving_memory_leave_the_losses(tmp_path: Path, saving: bool, compiled: bool) -> None:
    plain = losses(trained(tmp_path / "plain", DEVICE, compile=False, steps=8))
    other = losses(trained(tmp_path / "other", DEVICE, compile=compiled, checkpoint_activations=saving, steps=8))
    torch.testing.assert_close(other, plain, rtol=0, atol=2e-2)


def test_a_run_goes_on(tmp_path: Path) -> None:
    whole = losses(trained(tmp_path / "whole", DEVICE, steps=8, compile=False))
    part = small.run(tmp_path / "part", small.model().to(DEVICE), steps=8, save_every=4, compile=False)
    for event in part:
        if event["event"] == "save":
            break
    part.close()
    resume = small.newest(tmp_path / "part")
    rest = losses(trained(tmp_path / "part", DEVICE, steps=8, save_every=4, compile=False, resume=resume))
    torch.testing.assert_close(rest, whole[4:], rtol=0, atol=1e-3)


def test_cross_entropy_in_chunks_is_cross_entropy() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    vectors = torch.randn((300, 32), device=DEVICE, generator=generator, requires_grad=True)
    matrix = torch.randn((5000, 32), device=DEVICE, generator=generator, requires_grad=True)
    targets = torch.randint(5000, (300,), device=DEVICE, generator=generator)
    targets[::7] = -100
    ours = cross_entropy(vectors, matrix, targets)
    gradients = torch.autograd.grad(ours, (vectors, matrix))
    theirs = F.cross_entropy(vectors @ matrix.t(), targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs, (vectors, matrix)), rtol=1e-4, atol=1e-4)


def test_documents_apart_see_nothing_of_each_other() -> None:
    query, key, value = (torch.randn((2, 4, 64, 16), device=DEVICE) for _ in range(3))
    documents = (torch.arange(64, device=DEVICE) // 20)[None].expand(2, -1)
    mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    slow = gather(attention_pattern(query, key, mask), value)
    torch.testing.assert_close(attend(query, key, value, mask), slow, rtol=1e-3, atol=1e-3)


def test_too_many_rows_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli.train import fit

    real = fit._pass

    def with_little_memory(objective: Any, rows: int, apart: bool) -> None:
        if rows > 3:
            raise torch.OutOfMemoryError
        real(objective, rows, apart)

    monkeypatch.setattr(fit, "_pass", with_little_memory)
    objective = Objective(small.model().to(DEVICE), torch.float32)
    assert fit.choose(objective, small.plan(compile=False), 16, Ranks(DEVICE)).micro_batch == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_devices_train_one_model(tmp_path: Path, tiny_folder: Path, parallel: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king who had a daughter. " * 400)
    size = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "32", "--batch-tokens", "256"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gptcli"]
    command += ["train", str(text), "-o", str(tmp_path / "out"), "--tokenizer", str(tiny_folder), *size]
    command += ["--steps", "8", "--seed", "1", "--parallel", parallel, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f'"parallel": "{parallel}"' in done.stdout
