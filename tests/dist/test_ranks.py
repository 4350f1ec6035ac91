"""Several ranks on gloo: what one process learns, two and four learn, within rounding, however they hold the model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from gptcli.core import runtime
from gptcli.core.build import open_model
from gptcli.core.checkpoint import disk_tensors
from gptcli.errors import ResourceError, UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train import fit
from gptcli.train.group import Group
from gptcli.train.ranks import Ranks, join
from gptcli.train.state import checkpoints
from tests.conftest import ROOT
from tests.dist.scenarios import CONTEXT, ROWS, STEPS, WIDTH, Scenario, fresh, make, plan, sample, write

ALONE = [
    Scenario("adamw", optimizer="adamw"),
    Scenario("muon"),
    Scenario("untied", tied=False),
    Scenario("bfloat16", dtype="bfloat16", checkpointing=True),
]
TWO = [
    Scenario("ddp-adamw-2", "ddp", "adamw"),
    Scenario("ddp-muon-2", "ddp"),
    Scenario("fsdp-adamw-2", "fsdp", "adamw"),
    Scenario("fsdp-muon-2", "fsdp"),
    Scenario("fsdp-bfloat16-2", "fsdp", dtype="bfloat16", checkpointing=True),
    Scenario("ddp-bfloat16-2", "ddp", dtype="bfloat16", checkpointing=True),
    Scenario("muon-then-fsdp-2", "fsdp", resume="muon"),
    Scenario("adamw-then-ddp-2", "ddp", "adamw", resume="adamw"),
    Scenario("interrupted-ddp-2", "ddp", interrupted=True),
    Scenario("interrupted-fsdp-2", "fsdp", interrupted=True),
    Scenario("spoiled-2", "ddp", spoiled=True),
    Scenario("by-clock-2", "ddp", by_clock=True),
]
FOUR = [
    Scenario("ddp-adamw-4", "ddp", "adamw"),
    Scenario("fsdp-muon-4", "fsdp"),
    Scenario("fsdp-untied-4", "fsdp", tied=False),
    Scenario("fsdp-muon-2-then-fsdp-4", "fsdp", resume="fsdp-muon-2"),
    Scenario("fsdp-adamw-2-then-ddp-4", "ddp", "adamw", resume="fsdp-adamw-2"),
]
THEN_ALONE = [
    Scenario("ddp-muon-2-then-alone", resume="ddp-muon-2"),
    Scenario("fsdp-adamw-2-then-alone", optimizer="adamw", resume="fsdp-adamw-2"),
    Scenario("fsdp-muon-4-then-alone", resume="fsdp-muon-4"),
]
SAME = [one for one in [*TWO, *FOUR] if not (one.resume or one.interrupted or one.spoiled or one.by_clock)]
RESUMED = [one for one in [*TWO, *FOUR, *THEN_ALONE] if one.resume]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each in a folder of its name: alone, on two ranks by torchrun, on four, and alone again."""
    folder = tmp_path_factory.mktemp("runs")
    for scenario in ALONE:
        make(scenario, folder, Ranks())
    write(folder, TWO)
    finished = by_torchrun(2, folder)
    assert finished == (0, "", "")
    write(folder, FOUR)
    finished = by_hand(4, folder)
    assert finished == (0, "", "")
    for scenario in THEN_ALONE:
        make(scenario, folder, Ranks())
    return folder


def environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    return {**os.environ, **threads, "PYTHONPATH": str(ROOT)}


def by_torchrun(count: int, folder: Path) -> tuple[int, str, str]:
    launched = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "tests.dist.scenarios"]
    command = [sys.executable, "-m", *launched, str(folder)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout, ours(done.stderr)


def ours(said: str) -> str:
    """Without warnings of torch's own network code, which tries again by itself when a machine is busy."""
    return "".join(line for line in said.splitlines(keepends=True) if not re.match(r"\[W\d{4} ", line))


def free_port() -> int:
    """One below those that the system gives to whoever wants any, so that nobody gets it before the ranks listen."""
    for port in random.Random(os.getpid()).sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("of a hundred ports none is free")


def by_hand(count: int, folder: Path) -> tuple[int, str, str]:
    """As any launcher would that sets the variables; without torchrun's own process."""
    port = free_port()
    processes = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        told = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-m", "tests.dist.scenarios", str(folder)]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env={**environment(), **told}, cwd=ROOT, **streams))
    try:
        outputs = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = max(abs(process.returncode) for process in processes)
    return code, "".join(out for out, _ in outputs), ours("".join(errors for _, errors in outputs))


def events(runs: Path, scenario: Scenario, rank: int = 0) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads((runs / scenario.name / f"rank-{rank}.json").read_text())
    return told


def alone(scenario: Scenario) -> Scenario:
    """The run that one process makes of the same."""
    plain = replace(scenario, name="", kind="none", resume=None)
    return next(one for one in ALONE if replace(one, name="") == plain)


def weights(runs: Path, scenario: Scenario) -> dict[str, torch.Tensor]:
    return load_file(runs / scenario.name / "model.safetensors")


def moved(runs: Path, scenario: Scenario) -> dict[str, torch.Tensor]:
    """How far training has moved each tensor of the model folder."""
    before = dict(disk_tensors(fresh(scenario), torch.float32))
    change = {name: tensor - before[name] for name, tensor in weights(runs, scenario).items()}
    for name in change:
        if name.endswith("c_attn.bias"):
            # A key's bias changes no attention pattern: its gradient is nothing but rounding, which Adam blows up.
            change[name][WIDTH : 2 * WIDTH] = 0
    return change


class Bounds(NamedTuple):
    """How far losses, lengths of gradients (both relative) and weights (to how far they moved) may be apart."""

    loss: float
    length: float
    weights: float


def bounds(scenario: Scenario) -> Bounds:
    """Several times what was measured. Muon multiplies in bfloat16, which rounds the order of sums up."""
    if scenario.dtype == "bfloat16":
        return Bounds(1e-4, 1e-3, 0.05)
    return Bounds(1e-6, 2e-6, 1e-4) if scenario.optimizer == "adamw" else Bounds(1e-5, 3e-4, 0.05)


def assert_same(runs: Path, scenario: Scenario) -> None:
    """The same events and weights as of one process, within what the order of sums makes of them."""
    allowed, reference = bounds(scenario), alone(scenario)
    expected, found = events(runs, reference), events(runs, scenario)
    if scenario.resume:
        expected = [expected[0] | {"step": 3}, *(one for one in expected if one["step"] > 3)]
    assert [(one["event"], one["step"]) for one in found] == [(one["event"], one["step"]) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["tokens"] == one["step"] * ROWS * CONTEXT
        if one["event"] in ("step", "eval"):
            assert one["loss"] == pytest.approx(other["loss"], rel=allowed.loss)
        if one["event"] == "step":
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=allowed.length)
            assert (one["lr"], one["skipped"]) == (other["lr"], False)
        if one["event"] == "eval":
            assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=allowed.loss)
            assert one["best"] == pytest.approx(other["best"], rel=allowed.loss)
        if one["event"] == "sample":
            assert float(one["text"]) == pytest.approx(float(other["text"]), rel=10 * allowed.loss)
    made, wanted = moved(runs, scenario), moved(runs, reference)
    assert made.keys() == wanted.keys()
    for name, change in made.items():
        assert (change - wanted[name]).norm() <= allowed.weights * wanted[name].norm(), name


@pytest.mark.parametrize("scenario", SAME, ids=lambda one: one.name)
def test_several_ranks_learn_what_one_does(runs: Path, scenario: Scenario) -> None:
    assert_same(runs, scenario)
    start = events(runs, scenario)[0]
    assert (start["parallel"], start["ranks"]) == (scenario.kind, int(scenario.name[-1]))
    assert start["accumulate"] == ROWS // start["ranks"]
    assert start["parameters"] == events(runs, alone(scenario))[0]["parameters"]


@pytest.mark.parametrize("scenario", RESUMED, ids=lambda one: one.name)
def test_a_run_goes_on_with_another_number_of_ranks(runs: Path, scenario: Scenario) -> None:
    assert_same(runs, scenario)
    assert events(runs, scenario)[0]["resumed"] is True


@pytest.mark.parametrize("scenario", [*SAME, *RESUMED], ids=lambda one: one.name)
def test_what_several_ranks_saved_opens(runs: Path, scenario: Scenario, tiny_folder: Path) -> None:
    model = open_model(runs / scenario.name, Tokenizer.from_folder(tiny_folder), device="cpu")
    logsumexp = sample(model.transformer, STEPS)["text"]
    told = next(one for one in reversed(events(runs, scenario)) if one["event"] == "sample")
    # Ranks that share a model in bfloat16 sample in it.
    assert float(logsumexp) == pytest.approx(float(told["text"]), rel=1e-3 if scenario.dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize(
    ("name", "files"), [("muon", 1), ("ddp-muon-2", 1), ("ddp-adamw-4", 1), ("fsdp-muon-2", 2), ("fsdp-muon-4", 4)]
)
def test_a_checkpoint_has_a_file_for_each_rank_that_holds_its_own(runs: Path, name: str, files: int) -> None:
    for step in (3, 6):
        folder = runs / name / "checkpoints" / f"step-{step:09d}"
        assert len(list(folder.glob("part-*"))) == files
        assert json.loads((folder / "state.json").read_text())["parts"] == files


def test_a_rank_may_hold_no_row_of_a_tensor(runs: Path) -> None:
    folder = runs / "fsdp-muon-4" / "checkpoints" / f"step-{STEPS:09d}"
    parts = [load_file(file) for file in sorted(folder.glob("part-*"))]
    assert [len(part["model.positions.weight"]) for part in parts] == [2, 2, 2, 0]
    assert [len(part["model.embedding.weight"]) for part in parts] == [71, 71, 71, 70]
    assert [len(part["optimizer.blocks.0.mlp.up.weight.momentum_buffer"]) for part in parts] == [24] * 4


@pytest.mark.parametrize("name", ["interrupted-ddp-2", "interrupted-fsdp-2"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_saves(runs: Path, name: str) -> None:
    scenario = next(one for one in TWO if one.name == name)
    for rank in (0, 1):
        told = [(one["event"], one.get("step")) for one in events(runs, scenario, rank)]
        assert told == [("start", 0), ("step", 1), ("step", 2), ("save", 2), ("interrupted", None)]
    assert [found.step for found in checkpoints(runs / name)] == [2]
    assert weights(runs, scenario).keys() == weights(runs, ALONE[1]).keys()
    lines = (runs / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "step", "step", "save"]


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(runs: Path) -> None:
    scenario = next(one for one in TWO if one.spoiled)
    for rank in (0, 1):
        steps = [one for one in events(runs, scenario, rank) if one["event"] == "step"]
        assert [one["skipped"] for one in steps] == [False, True, False, False, False, False]
        assert steps[1]["grad_norm"] is None
    assert all(bool(tensor.isfinite().all()) for tensor in weights(runs, scenario).values())


def test_the_clock_of_one_rank_counts_for_all(runs: Path) -> None:
    scenario = next(one for one in TWO if one.by_clock)
    first, second = ([one for one in events(runs, scenario, rank) if one["event"] == "step"] for rank in (0, 1))
    assert 5 < len(first) == len(second)
    assert [one["lr"] for one in first] == [one["lr"] for one in second]
    assert [one["loss"] for one in first] == [one["loss"] for one in second]
    assert first[-1]["lr"] < 0.002


# --- Who joins


PLACE = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def start(**changes: str | None) -> None:
        for name, value in {**PLACE, **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return start


def test_the_environment_says_which_rank_this_is(started: Callable[..., None]) -> None:
    started()
    assert runtime.rank_place() == runtime.RankPlace(rank=3, count=4, local_rank=1)


@pytest.mark.parametrize("missing", PLACE)
def test_a_process_that_is_not_told_all_is_on_its_own(started: Callable[..., None], missing: str) -> None:
    started(**{missing: None})
    ranks = join("cpu")
    assert (ranks.rank, ranks.count, ranks.kind, ranks.device) == (0, 1, "none", torch.device("cpu"))
    assert ranks.share("none", torch.float32) is ranks


def test_one_rank_of_one_is_on_its_own(started: Callable[..., None]) -> None:
    started(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert runtime.rank_place() is None


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"LOCAL_RANK": "5"}, {"WORLD_SIZE": "many"}])
def test_variables_that_name_no_rank_are_refused(started: Callable[..., None], wrong: dict[str, str]) -> None:
    started(**wrong)
    with pytest.raises(UsageError, match="names no rank"):
        join("cpu")


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_ranks_do_not_share_a_device_that_is_one(started: Callable[..., None], device: str) -> None:
    started()
    with pytest.raises(UsageError, match="can't share the device"):
        join(device)


def test_ranks_share_a_model_by_ddp_or_fsdp() -> None:
    with pytest.raises(UsageError, match="by 'none'"):
        Group(1, 2, torch.device("cpu")).share("none", torch.float32)


# --- What ranks that can't try alone choose


def choices(monkeypatch: pytest.MonkeyPatch, memory: int, **more: Any) -> fit.Choices:
    monkeypatch.setattr(runtime, "memory_bytes", lambda device: memory)
    return fit._planned(fresh(Scenario("")), replace(plan(Scenario("")), **{"micro_batch": None, **more}), 8, Ranks())


def test_ranks_that_can_not_try_go_by_the_plan_on_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choices(monkeypatch, 10**11) == fit.Choices(8, False, False)
    assert choices(monkeypatch, 10**11, micro_batch=3, compile=True) == fit.Choices(3, True, False)
    assert choices(monkeypatch, 10**11, checkpoint_activations=True).checkpoint_activations
    with pytest.raises(ResourceError, match="not even one row"):
        choices(monkeypatch, 10**6)
    assert choices(monkeypatch, 10**6, micro_batch=1).micro_batch == 1
