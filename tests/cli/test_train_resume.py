"""``gptcli train --resume``: a run goes on as if it had never stopped, or says why it can't."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import SIZE, Run
from tests.cli.training import TEXT, checkpoint_names, course, events, lines, metrics, of_kind, refused, weights
from tests.conftest import ROOT

SHORT = ("--steps", "8", "--seed", "5", "--eval-every", "2")
Interrupt = Callable[[int | None], None]


def test_a_killed_run_goes_on_to_the_bit(train: Run, text: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """The process is killed when it tells of its first save; its pipe is too small for it to be far ahead by then."""
    args = [str(text), "--steps", "60", "--save-every", "4", "--eval-every", "6", "--seed", "5", "--threads", "1"]
    out = tmp_path / "killed"
    fixed = ["--tokenizer", str(tiny_folder), *SIZE, "--dtype", "float32", "--json", "-q"]
    command = [sys.executable, "-m", "gptcli", "train", *args, "-o", str(out), *fixed]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pipesize=4096, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "save":
                break
        process.kill()
    assert process.returncode < 0
    assert not [event for event in metrics(out) if event["event"] == "done"]
    told = events(train(*args, "-o", out, "--resume"))
    assert (told[0]["event"], told[0]["resumed"]) == ("start", True)
    assert 4 <= told[0]["step"] < 60
    assert told[0]["step"] % 4 == 0
    events(train(*args, "-o", tmp_path / "whole"))
    assert weights(out) == weights(tmp_path / "whole")
    assert course(out) == course(tmp_path / "whole")
    assert told[-1]["bits_per_byte"] == metrics(tmp_path / "whole")[-1]["bits_per_byte"]
    seconds = [event["seconds"] for event in of_kind("step", metrics(out))]
    assert seconds == sorted(seconds)


@pytest.fixture
def stopped(train: Run, text: Path, tmp_path: Path, interrupt_at: Interrupt) -> Path:
    """A run of 8 steps that was stopped behind the third, in ``tmp_path/out``."""
    interrupt_at(3)
    done = train(text, *SHORT, "--keep", "3", "--valid", text)
    interrupt_at(None)
    assert done.code == 130
    return tmp_path / "out"


def test_the_folder_alone_is_enough_to_go_on(train: Run, run: Run, stopped: Path, text: Path, tmp_path: Path) -> None:
    done = run("train", "-o", stopped, "--resume")
    assert (done.code, done.out) == (0, f"{stopped}\n".encode())
    assert b"note: on from step 3: " in done.err
    assert b"note: seed" not in done.err
    events(train(text, *SHORT, "--valid", text, "-o", tmp_path / "whole"))
    assert weights(stopped) == weights(tmp_path / "whole")
    assert course(stopped) == course(tmp_path / "whole")
    assert [event["step"] for event in of_kind("eval", metrics(stopped))] == [2, 4, 6, 8]


def test_the_same_command_goes_on_too(train: Run, stopped: Path, text: Path) -> None:
    told = events(train(text, *SHORT, "--valid", text, "--resume"))
    assert [event["step"] for event in of_kind("step", told)] == [4, 5, 6, 7, 8]


def test_another_torch_or_number_of_threads_is_said(run: Run, stopped: Path) -> None:
    state = stopped / "checkpoints" / "step-000000003" / "state.json"
    told = json.loads(state.read_text())
    state.write_text(json.dumps({**told, "torch": "1.0", "threads": 77}))
    done = run("train", "-o", stopped, "--resume")
    assert done.code == 0
    assert b"note: not to the bit as without a stop: the run began with torch 1.0 (now " in done.err
    assert b", threads 77 (now " in done.err


def test_a_tokenizer_is_trained_once(
    train: Run, text: Path, tmp_path: Path, interrupt_at: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(2)
    done = train(text, "--vocab-size", "280", "--steps", "4", quiet=False)
    assert done.code == 130
    assert b"note: training a tokenizer of 280" in done.err
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    interrupt_at(None)
    with monkeypatch.context() as context:
        context.setattr("gptcli.train.data.train_tokenizer", lambda *_: pytest.fail("the tokenizer is there"))
        done = train("--resume", bare=True, quiet=False)
    assert events(done)[-1]["step"] == 4
    assert b"training a tokenizer" not in done.err
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before


def test_a_tokenizer_that_is_not_there_yet_is_trained_again(train: Run, text: Path, tmp_path: Path) -> None:
    """As when the process is killed between its first checkpoint and its first model."""
    args = (text, "--vocab-size", "280", "--steps", "4", "--save-every", "2", "--seed", "1")
    events(train(*args))
    whole = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000000004")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "train.toml"):
        (tmp_path / "out" / name).unlink()
    told = events(train("--resume", bare=True))
    assert told[0]["step"] == 2
    assert weights(tmp_path / "out") == whole


def test_without_a_checkpoint_it_starts_and_says_so(train: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = train(text, "--steps", "2", "--resume", quiet=False)
    assert events(done)[0] | {"step": 0, "resumed": False} == events(done)[0]
    assert f"note: there is no checkpoint in {out}: training starts at step 0".encode() in done.err
    shutil.rmtree(out / "checkpoints")
    (out / "config.json").unlink()  # as if it was killed before its first save
    assert events(train(text, "--steps", "3", "--resume"))[0]["step"] == 0
    assert [event["step"] for event in of_kind("step", metrics(out))] == [1, 2, 3]
    said = refused(train("--resume", "-o", tmp_path / "nothing", bare=True))
    assert "nothing to train on" in said


def test_a_model_is_not_replaced_because_its_checkpoints_are_gone(train: Run, text: Path, tmp_path: Path) -> None:
    events(train(text, "--steps", "1"))
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = weights(tmp_path / "out")
    assert "no checkpoint" in refused(train(text, "--steps", "1", "--resume"))
    assert weights(tmp_path / "out") == before


CHANGED = {
    "--steps 9": "--steps (was 8)",
    "--lr 0.02": "--lr (was not given)",
    "--layers 2": "--layers (was 1)",
    "--seed 6": "--seed (was 5)",
    "--optimizer adamw": "--optimizer (was muon)",
    "--mask-documents": "--mask-documents",
    "--micro-batch 2": "--micro-batch (was not given)",
    "--dtype bfloat16 --weight-decay 0.2": "--weight-decay (was 0.1), --dtype (was float32)",
    "--epochs 3": "--epochs (was not given)",
    "--vocab-size 270": "--vocab-size (was not given)",
    "--init-from fable": "--init-from (was not given)",
    "--freeze embedding.weight": "--freeze (was not given)",
    "{out}": "DATA",
}


def test_options_that_changed_are_named(train: Run, stopped: Path) -> None:
    before = {file: file.read_bytes() for file in sorted(stopped.rglob("*")) if file.is_file()}
    for options, names in CHANGED.items():
        said = refused(train(*options.format(out=stopped).split(), "--resume", bare=True))
        assert said == f"changed since the run in {stopped} began: {names}"
    assert {file: file.read_bytes() for file in sorted(stopped.rglob("*")) if file.is_file()} == before


def test_what_may_change_changes_and_is_remembered(train: Run, stopped: Path, interrupt_at: Interrupt) -> None:
    interrupt_at(6)
    more = [
        "--eval-every",
        "1",
        "--sample-every",
        "0",
        "--save-every",
        "1",
        "--threads",
        "1",
        "--save-dtype",
        "bfloat16",
    ]
    done = train("--resume", *more, bare=True)
    assert done.code == 130
    kinds = [event["event"] for event in lines(done.out)]
    assert kinds == ["start", *["step", "eval", "save"] * 3, "save"]
    assert checkpoint_names(stopped) == ["step-000000004", "step-000000005", "step-000000006"]  # --keep 3 of the first
    interrupt_at(None)
    told = events(train("--resume", bare=True))
    assert [event["event"] for event in told] == ["start", *["step", "eval", "save"] * 2, "done"]


def test_a_text_that_changed_is_refused(train: Run, stopped: Path, text: Path) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    text.write_text(TEXT.replace("king", "queen"))
    assert "the text is not what it was" in refused(train("--resume", bare=True))
    assert (stopped / "metrics.jsonl").read_bytes() == before


def test_a_tokenizer_that_changed_is_refused(
    train: Run, text: Path, tmp_path: Path, tiny_folder: Path, interrupt_at: Interrupt
) -> None:
    own = shutil.copytree(tiny_folder, tmp_path / "own")
    interrupt_at(2)
    train(text, "--tokenizer", own, "--steps", "4")
    interrupt_at(None)
    for folder in (own, tmp_path / "out"):
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["model"]["merges"] = raw["model"]["merges"][:-1]
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    assert "the tokenizer is not what it was" in refused(train("--resume", bare=True))


def test_a_complete_run_is_left_as_it_is(train: Run, run: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    last = events(train(text, "--steps", "2"))[-1]
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert events(train("--resume", bare=True)) == [last]
    done = run("train", text, "-o", out, "--resume")
    assert (done.code, done.out) == (0, f"{out}\n".encode())
    assert done.err.startswith(f"note: the run in {out} is complete: 2 steps; ".encode())
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    assert "--steps (was 2)" in refused(train("--steps", "3", "--resume", bare=True))


def test_a_run_that_was_killed_behind_its_last_save_is_done(train: Run, text: Path, tmp_path: Path) -> None:
    events(train(text, "--steps", "2"))
    file = tmp_path / "out" / "metrics.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-1]) + whole[-1][:20])
    assert [event["event"] for event in events(train("--resume", bare=True))] == ["start", "done"]
    assert [event["event"] for event in metrics(tmp_path / "out")][-1] == "done"


def test_relative_paths_go_on_from_elsewhere(
    train: Run, tmp_path: Path, tiny_folder: Path, interrupt_at: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "text.txt").write_text(TEXT)
    shutil.copytree(tiny_folder, tmp_path / "here" / "tiny")
    monkeypatch.chdir(tmp_path / "here")
    interrupt_at(2)
    train("text.txt", "--tokenizer", "tiny", "--valid", "text.txt", "--steps", "4")
    monkeypatch.chdir(tmp_path / "there")
    interrupt_at(3)
    assert train("../here/text.txt", "--resume", bare=True).code == 130
    assert 'data = ["../here/text.txt"]' in (tmp_path / "out" / "train.toml").read_text()
    (tmp_path / "there" / "text.txt").write_text("Another.")
    interrupt_at(None)
    assert events(train("--resume", bare=True))[-1]["step"] == 4


def test_standard_input_is_given_again(train: Run, interrupt_at: Interrupt) -> None:
    interrupt_at(2)
    train("--steps", "4", stdin=TEXT.encode())
    interrupt_at(None)
    refused(train("--resume", bare=True))
    refused(train("--resume", bare=True, stdin=b"Another text, of enough words to be a text to train on. " * 9))
    assert events(train("--resume", bare=True, stdin=TEXT.encode()))[-1]["step"] == 4


# --- Beginning anew


def test_a_run_is_replaced_only_by_force_and_then_whole(train: Run, stopped: Path, text: Path) -> None:
    assert "already holds" in refused(train(text, "--steps", "2"))
    told = events(train(text, "--steps", "2", "--force"))
    assert (told[0]["step"], told[0]["resumed"]) == (0, False)
    assert checkpoint_names(stopped) == ["step-000000002"]
    assert [event["step"] for event in of_kind("step", metrics(stopped))] == [1, 2]
    assert "give one of them" in json.loads(train("--resume", "--force", bare=True).err)["error"]["hint"]


def test_a_forced_run_that_can_not_begin_leaves_the_old_one(train: Run, stopped: Path, tmp_path: Path) -> None:
    before: dict[Path, Any] = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    (tmp_path / "short").write_text("One.")
    refused(train(tmp_path / "none", "--steps", "2", "--force"), 3)
    refused(train(tmp_path / "short", "--steps", "2", "--force"))
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


# --- Ctrl-C


def test_ctrl_c_saves_the_model_and_leaves_130(
    run: Run, text: Path, tmp_path: Path, tiny_folder: Path, interrupt_at: Interrupt
) -> None:
    out = tmp_path / "out"
    interrupt_at(3)
    args = (text, "-o", out, "--tokenizer", tiny_folder, *SIZE, "--steps", "8")
    done = run("train", *args)
    assert (done.code, done.out) == (130, b"")
    assert done.err.decode().splitlines()[-2:] == [
        "note: step 3: saved",
        f"note: stopped; what was learnt so far is in {out}: --resume goes on",
    ]
    assert checkpoint_names(out) == ["step-000000003"]
    assert run("models", "verify", out).code == 0
    interrupt_at(0)
    done = run("train", *args[:1], "-o", tmp_path / "other", *args[3:])
    assert done.code == 130
    assert done.err.decode().splitlines()[-1] == "note: stopped before the first step"
    assert not (tmp_path / "other" / "checkpoints").exists()


def test_ctrl_c_while_something_is_shown_saves_too(
    train: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptcli.cli.train_view import TrainView

    show = TrainView.show

    def interrupted(self: TrainView, event: dict[str, Any]) -> None:
        show(self, event)
        if event["event"] == "step" and event["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainView, "show", interrupted)
    done = train(text, "--steps", "8")
    assert done.code == 130
    assert [event["event"] for event in lines(done.out)] == ["start", "step", "step", "step", "save"]
    assert checkpoint_names(tmp_path / "out") == ["step-000000003"]


def test_ctrl_c_within_an_update_loses_no_step(
    train: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptcli.train.optim import Optimizers

    step, steps = Optimizers.step, []

    def interrupted(self: Optimizers, lr_scale: float) -> None:
        steps.append(lr_scale)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        step(self, lr_scale)

    monkeypatch.setattr(Optimizers, "step", interrupted)
    done = train(text, "--steps", "8")
    assert done.code == 130
    assert [event["event"] for event in lines(done.out)] == ["start", "step", "step", "step", "save"]
    assert lines(done.out) == metrics(tmp_path / "out")
    assert checkpoint_names(tmp_path / "out") == ["step-000000003"]
