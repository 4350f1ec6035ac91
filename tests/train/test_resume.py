"""A run that was killed goes on as if it had not been, from whatever moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CorruptError
from tests.conftest import ROOT
from tests.train.killed import KILLED, SAVED, STEPS
from tests.train.small import kinds, model, newest, run, same, stored, weights

KILLS = 24

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def told(*args: str) -> Any:
    """What ``killed.py`` says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return told("resume", str(tmp_path_factory.mktemp("resume")))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_killed_and_resumed_is_the_same_to_the_bit(resumed: Any, optimizer: str) -> None:
    """Weights, optimizer state, and every step's loss, rate and gradient; in parts, with documents kept apart."""
    whole, killed = resumed[optimizer]["whole"], resumed[optimizer]["killed"]
    assert whole["ends"] == [0]
    assert killed["ends"] == [signal.SIGKILL, 0]
    assert killed["resumed_at"] == [SAVED]
    assert SAVED < KILLED < whole["step"] == killed["step"] == STEPS
    assert killed["tensors"] == whole["tensors"]
    assert killed["losses"] == whole["losses"]
    assert [step for step, *_ in whole["losses"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_evaluating_and_sampling_change_no_bit(resumed: Any, optimizer: str) -> None:
    whole, busy, killed = (resumed[optimizer][name] for name in ("whole", "busy", "killed"))
    assert busy["tensors"] == whole["tensors"]
    assert busy["losses"] == whole["losses"]
    assert killed["evaluations"] == busy["evaluations"]
    assert len(busy["evaluations"]) == STEPS


def test_optimizers_differ(resumed: Any) -> None:
    assert resumed["muon"]["whole"]["tensors"] != resumed["adamw"]["whole"]["tensors"]


def test_killed_at_any_moment_of_saving_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    """Each run goes on from what the one before left, so that in the end they are one run, to the bit."""
    made = told("saves", str(tmp_path), "5", str(KILLS))
    truth = {int(step): digests for step, digests in made["truth"].items()}
    assert len(made["kills"]) >= KILLS
    for kill in made["kills"]:
        assert kill["found"], "no checkpoint is left"
        newest_step = kill["found"][0][0]
        # What was told to be saved is not lost; one more may have been saved and not told.
        assert newest_step in (kill["told"], kill["told"] + 1)
        for step, tensors in kill["found"]:
            assert tensors == truth[step][0], f"step {step} is not what was trained"
        # The model folder is replaced file by file behind the checkpoint, and is whole at any moment.
        assert kill["folder"] in {truth[step][1] for step in (newest_step, newest_step - 1) if step in truth}
        assert kill["left"] <= 3
    assert [kill["told"] for kill in made["kills"]] == sorted({kill["told"] for kill in made["kills"]})
    assert any(kill["left"] for kill in made["kills"]), "none was struck while it saved"
    assert made["log"] == sorted(set(made["log"]))


# --- Without a kill


def test_a_run_that_is_over_is_not_gone_on_with(tmp_path: Path) -> None:
    one = model()
    list(run(tmp_path, one))
    other = model(2)
    told = list(run(tmp_path, other, resume=newest(tmp_path)))
    assert kinds(told) == ["start", "done"]
    assert (told[0]["step"], told[1]["step"], told[0]["resumed"]) == (4, 4, True)
    assert same(weights(other), weights(one))


@pytest.mark.parametrize("end", [{"steps": 8}, {"steps": None, "minutes": 1e9}])
def test_going_on_adds_to_the_log_and_to_the_time(tmp_path: Path, end: dict[str, Any]) -> None:
    first = list(run(tmp_path, steps=8, save_every=4))
    again = run(tmp_path, resume=newest(tmp_path), **end)
    start = next(again)
    assert (start["event"], start["step"], start["tokens"]) == ("start", 8, 8 * 32)
    event = next(again)
    again.close()  # type: ignore[attr-defined]
    assert event["seconds"] > first[-3]["seconds"]
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert kinds(log)[-2:] == ["start", "done" if end["steps"] else "step"]


def test_a_checkpoint_of_another_model_is_refused_and_the_log_untouched(tmp_path: Path) -> None:
    list(run(tmp_path))
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for other in (model(n_embd=32), model(n_layer=1), model(vocab_size=30), model(tie_word_embeddings=False)):
        with pytest.raises(CorruptError, match="step-000000004"):
            list(run(tmp_path, other, resume=newest(tmp_path)))
    with pytest.raises(CorruptError, match="momentum_buffer"):
        list(run(tmp_path, optimizer="adamw", resume=newest(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_first_step_that_was_skipped_can_be_gone_on_from(tmp_path: Path) -> None:
    """Ctrl-C saves it; the optimizer has seen nothing yet."""
    one = model()
    hook = one.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    events = run(tmp_path, one)
    assert next(events)["event"] == "start"
    assert next(events)["skipped"]
    assert events.throw(KeyboardInterrupt())["event"] == "save"  # type: ignore[attr-defined]
    hook.remove()
    assert kinds(list(run(tmp_path, resume=newest(tmp_path))))[-2:] == ["save", "done"]
    assert all(tensor.isfinite().all() for tensor in stored(newest(tmp_path)).values())
