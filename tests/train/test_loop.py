"""The training loop: events in order, gradients whatever the cut of a batch, nothing lost by Ctrl-C."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from gptcli.core.model import Transformer
from gptcli.errors import OutputError, UsageError
from gptcli.spec.match import match_folder
from gptcli.train import loop, state
from gptcli.train.data import Batches
from gptcli.train.evaluate import corpus_nats
from gptcli.train.loss import Objective
from tests.train.small import CONTEXT, VOCAB, corpus, kinds, model, newest, run, same, stored_weights, weights


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- Events


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({}, "start step step step step eval save done"),
        ({"eval_every": 2}, "start step step eval step step eval save done"),
        ({"save_every": 3}, "start step step step save step eval save done"),
        ({"eval_every": 1, "save_every": 1, "steps": 2}, "start step eval save step eval save done"),
        ({"steps": 1}, "start step eval save done"),
    ],
)
def test_events_come_in_order(tmp_path: Path, more: dict[str, int], wanted: str) -> None:
    told = list(run(tmp_path, valid=[corpus(50)], **more))
    assert kinds(told) == wanted.split()
    assert log(tmp_path) == told


def test_without_held_out_text_there_is_no_evaluation(tmp_path: Path) -> None:
    told = list(run(tmp_path))
    assert kinds(told) == ["start", *["step"] * 4, "save", "done"]
    assert told[-1]["bits_per_byte"] is None


def test_what_events_say(tmp_path: Path) -> None:
    one = model()
    told = list(run(tmp_path, one, valid=[corpus(50, "a", 1), corpus(70, "b", 2)], seed=5))
    start, *steps, evaluation, save, done = told
    assert start["parameters"] == sum(parameter.numel() for parameter in one.parameters())
    assert start["config"] == one.config.to_dict()
    assert (start["train_tokens"], start["train_bytes"], start["batch_tokens"]) == (200, 600, 4 * CONTEXT)
    assert (start["step"], start["tokens"], start["resumed"]) == (0, 0, False)
    assert (start["micro_batch"], start["accumulate"], start["steps"], start["minutes"]) == (4, 1, 4, None)
    assert (start["device"], start["dtype"], start["optimizer"], start["compile"]) == ("cpu", "float32", "muon", False)
    assert (start["ranks"], start["parallel"], start["seed"]) == (1, "none", 5)
    assert start["peak_flops_per_second"] == 1e12
    assert [step["tokens"] for step in steps] == [32, 64, 96, 128]
    assert [step["progress"] for step in steps] == [0.25, 0.5, 0.75, 1.0]
    assert steps[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert [step["lr"] for step in steps[1:]] == sorted((step["lr"] for step in steps[1:]), reverse=True)
    assert max(step["lr"] for step in steps) <= 0.01
    assert not any(step["skipped"] for step in steps)
    for step in steps:
        flops = step["tokens_per_second"] * start["flops_per_token"]
        assert step["utilization"] == pytest.approx(flops / start["peak_flops_per_second"])
    assert [step["seconds"] for step in steps] == sorted(step["seconds"] for step in steps)
    assert (save["step"], save["path"]) == (4, str(tmp_path))
    assert save["checkpoint"] == str(tmp_path / "checkpoints" / "step-000000004")
    assert (done["step"], done["tokens"], done["skipped"]) == (4, 128, 0)
    assert done["tokens_per_second"] == pytest.approx(128 / done["seconds"])
    # The last evaluation is of the weights that were left.
    bits = {}
    for part in (corpus(50, "a", 1), corpus(70, "b", 2)):
        nats, _ = corpus_nats(loss_of(one), part, CONTEXT, 3, torch.device("cpu"))
        bits[part.name] = nats / math.log(2) / part.text_bytes
    assert evaluation["valid"] == pytest.approx(bits, rel=1e-5)
    assert evaluation["bits_per_byte"] == pytest.approx((bits["a"] * 150 + bits["b"] * 210) / 360)
    assert evaluation["bits_per_byte"] == evaluation["best"] == done["bits_per_byte"]
    scored = sum(int((part.tokens[1:] != part.start_id).sum()) for part in (corpus(50, "a", 1), corpus(70, "b", 2)))
    assert evaluation["loss"] == pytest.approx(evaluation["bits_per_byte"] * 360 * math.log(2) / scored)


def test_the_best_evaluation_is_remembered(tmp_path: Path) -> None:
    told = list(run(tmp_path, valid=[corpus(50)], eval_every=1, lr=0.5, steps=6))
    bits = [event["bits_per_byte"] for event in told if event["event"] == "eval"]
    assert told[-1]["bits_per_byte"] == min(bits) < bits[-1]
    assert [event["best"] for event in told if event["event"] == "eval"] == list(itertools.accumulate(bits, min))


@pytest.mark.parametrize(("every", "at"), [(None, [2, 4]), (3, [3, 4]), (0, [4])])
def test_samples_are_taken_at_evaluations_or_every_so_many_steps(
    tmp_path: Path, every: int | None, at: list[int]
) -> None:
    def sampler(one: Transformer, step: int) -> dict[str, Any]:
        return {"prompt": "a", "text": str(step), "seed": 1}

    told = list(run(tmp_path, sampler=sampler, sample_every=every, eval_every=2))
    samples = [event for event in told if event["event"] == "sample"]
    assert [(event["step"], event["text"]) for event in samples] == [(step, str(step)) for step in at]
    assert samples[0] == {
        **{"event": "sample", "step": at[0], "tokens": 32 * at[0]},
        **{"prompt": "a", "text": str(at[0]), "seed": 1},
    }


def test_the_folder_holds_the_model_and_its_files(tmp_path: Path) -> None:
    one = model()
    list(run(tmp_path / "new" / "folder", one))
    folder = tmp_path / "new" / "folder"
    assert (folder / "extra.txt").read_bytes() == b"x"
    assert len(match_folder(folder, one.config)) == 2 + 2 * 12 + 2


def test_a_run_leaves_tensors_and_text_and_nothing_else(tmp_path: Path) -> None:
    """No pickle, which runs what it holds: each file is opened as what its name says."""
    list(run(tmp_path, valid=[corpus(50)], save_every=1))
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.name for file in files if file.parent == tmp_path} == {
        *("config.json", "model.safetensors", "metrics.jsonl", "extra.txt")
    }
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np") as stream:
                assert list(stream.keys())
        elif file.suffix in (".json", ".jsonl"):
            for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
                json.loads(line)
        else:
            assert file.name == "extra.txt"


def test_a_folder_that_can_not_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        list(run(tmp_path / "file" / "folder"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write finds the disk full")
def test_a_disk_that_is_full_under_the_log_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"metrics\.jsonl could not be written: No space left"):
        list(run(tmp_path))


def test_what_an_earlier_run_left_is_not_kept_among_the_last(tmp_path: Path) -> None:
    list(run(tmp_path, save_every=1, steps=3, keep=9))
    list(run(tmp_path, save_every=2, steps=4, keep=3))
    assert [checkpoint.step for checkpoint in state.checkpoints(tmp_path)] == [4, 2]


def test_closing_the_iterator_leaves_the_last_save(tmp_path: Path) -> None:
    events = run(tmp_path, save_every=1)
    for event in events:
        if event["event"] == "save":
            break
    events.close()  # type: ignore[attr-defined]
    assert match_folder(tmp_path, model().config)
    assert kinds(log(tmp_path)) == ["start", "step", "save"]
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize("more", [{"steps": None}, {"minutes": 1.0}])
def test_the_length_is_given_once(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="length"):
        list(run(tmp_path, **more))


def clock(monkeypatch: pytest.MonkeyPatch, tick: float) -> None:
    """Time goes on by ``tick`` seconds whenever somebody looks."""
    now = itertools.count()
    monkeypatch.setattr("gptcli.train.loop.time.perf_counter", lambda: tick * next(now))


def test_the_clock_ends_a_run_and_steers_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 0.5)
    told = list(run(tmp_path, steps=None, minutes=1.0))
    steps = [event for event in told if event["event"] == "step"]
    assert 10 < len(steps) < 60
    assert steps[-1]["progress"] > 0.9
    assert max(step["lr"] for step in steps) > 0.009
    assert steps[-1]["lr"] < 0.002


@pytest.mark.parametrize("tick", [1 + 0.17 * i for i in range(12)])
def test_what_the_clock_ended_is_evaluated_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tick: float
) -> None:
    """At whatever moment the time is over: while a step runs, or between two looks at the clock."""
    clock(monkeypatch, tick)
    told = list(run(tmp_path, steps=None, minutes=1.0, valid=[corpus(20)]))
    assert kinds(told[-4:]) == ["step", "eval", "save", "done"]


def test_a_time_that_is_over_at_once_is_one_step(tmp_path: Path) -> None:
    told = list(run(tmp_path, steps=None, minutes=1e-12))
    assert kinds(told) == ["start", "step", "save", "done"]


# --- Gradients


class Descent:
    """Plain gradient descent in the place of the optimizers, since Adam blows up the rounding of what should be 0."""

    def __init__(self, kind: str, one: Transformer, lr: float, *args: Any) -> None:
        self.each = torch.optim.SGD(one.parameters(), lr=lr)
        self.lr = lr

    def step(self, scale: float) -> None:
        self.each.param_groups[0]["lr"] = self.lr * scale
        self.each.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.each.zero_grad()

    def tensors(self) -> Iterator[Any]:
        return iter(())

    def create_state(self) -> None:
        pass


def rows_put_through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    real = Objective.forward

    def counting(self: Objective, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(ids))
        return real(self, ids, *more)

    monkeypatch.setattr(Objective, "forward", counting)
    return rows


@pytest.mark.parametrize("ignoring", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignoring: bool
) -> None:
    """Also where the parts of a batch have not as many tokens to learn, down to none at all."""
    monkeypatch.setattr(loop, "Optimizers", Descent)
    real = Batches.at

    def some_ignored(*args: Any) -> Any:
        batch = real(*args)
        targets = batch.targets.copy()
        targets[0, 2:] = targets[3:5] = targets[6] = -100
        return type(batch)(batch.ids, targets)

    if ignoring:
        monkeypatch.setattr(Batches, "at", some_ignored)
    rows = rows_put_through(monkeypatch)
    results = []
    for micro, cut in ((7, [7]), (4, [4, 3]), (3, [3, 3, 1]), (1, [1] * 7)):
        rows.clear()
        one = model()
        told = list(run(tmp_path / str(micro), one, batch_tokens=7 * CONTEXT, steps=3, lr=1.0, micro_batch=micro))
        assert rows == 3 * cut
        assert (told[0]["micro_batch"], told[0]["accumulate"]) == (micro, len(cut))
        steps = [(event["loss"], event["grad_norm"]) for event in told if event["event"] == "step"]
        results.append((steps, weights(one)))
    before = weights(model())
    for steps, made in results[1:]:
        assert np.allclose(steps, results[0][0], rtol=1e-5)
        for name, weight in made.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=1e-5, atol=1e-6, msg=name)
            assert not torch.equal(weight, before[name]) or name.endswith("key.bias"), name


def test_the_loss_is_the_mean_over_the_batch_before_the_update(tmp_path: Path) -> None:
    one = model()
    batch = Batches(corpus(), 4, CONTEXT, 5).at(0)
    ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
    expected = F.cross_entropy(one(ids).flatten(0, 1), targets.flatten())
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in one.parameters() if p.grad is not None))
    step = next(event for event in run(tmp_path, seed=5) if event["event"] == "step")
    assert step["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Optimizers", Descent)
    one = model()
    before = weights(one)
    told = list(run(tmp_path, one, steps=1, clip=0.01))
    step = told[1]
    assert step["grad_norm"] > 0.01
    moved = math.sqrt(sum(float((weight - before[name]).square().sum()) for name, weight in weights(one).items()))
    assert moved == pytest.approx(0.01 * step["lr"], rel=1e-2)


def test_the_same_seed_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        one = model()
        list(run(tmp_path / name, one, seed=seed))
        made.append(weights(one))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


def test_evaluation_sampling_and_saving_change_nothing(tmp_path: Path) -> None:
    def sampler(one: Transformer, step: int) -> dict[str, Any]:
        np.random.default_rng().random()
        return {"text": str(one.eval()(torch.randint(VOCAB, (1, 3))).sum().item()), "n": float(torch.rand(()))}

    made, losses = [], []
    often = {"valid": [corpus(50)], "eval_every": 1, "save_every": 1, "sampler": sampler}
    for name, more in (("a", {}), ("b", often)):
        one = model()
        told = list(run(tmp_path / name, one, **more))
        made.append(weights(one))
        losses.append([(event["loss"], event["lr"], event["grad_norm"]) for event in told if event["event"] == "step"])
    assert same(made[0], made[1])
    assert losses[0] == losses[1]


def loss_of(one: Transformer) -> Any:
    return lambda ids, targets: F.cross_entropy(one(ids).flatten(0, 1), targets.flatten(), reduction="sum")


# --- Ctrl-C


def test_ctrl_c_between_steps_saves_what_was_learnt(tmp_path: Path) -> None:
    one = model()
    events = run(tmp_path, one, steps=50)
    while next(events)["event"] != "step":
        pass
    assert events.throw(KeyboardInterrupt())["event"] == "save"  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert (tmp_path / "model.safetensors").is_file()
    assert kinds(log(tmp_path)) == ["start", "step", "save"]
    assert same(stored_weights(newest(tmp_path)), weights(one))


def until_interrupted(events: Iterator[Any]) -> list[str]:
    told = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for event in events:
            told.append(event["event"])
    return told


def test_ctrl_c_before_the_first_step_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batches, "at", lambda *args: signal.raise_signal(signal.SIGINT))
    assert until_interrupted(run(tmp_path)) == ["start"]
    assert not (tmp_path / "model.safetensors").exists()


def test_ctrl_c_within_a_step_saves_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Batches, step: int, *ranks: int) -> Any:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, *ranks)

    real = Batches.at
    monkeypatch.setattr(Batches, "at", interrupted)
    # The batch of the third step is made while the second is at work.
    assert until_interrupted(run(tmp_path, steps=50)) == ["start", "step", "save"]
    assert (tmp_path / "model.safetensors").is_file()
    assert newest(tmp_path).step == 1


@pytest.mark.parametrize("at", ["Muon", "AdamW"])
def test_ctrl_c_within_an_update_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """What is saved is two whole steps, and going on from there is as if nothing had happened."""
    whole = model()
    list(run(tmp_path / "whole", whole))
    calls = itertools.count(1)
    optimizer = getattr(torch.optim, at)
    real = optimizer.step

    def interrupted(self: Any, closure: Any = None) -> Any:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", interrupted)
        assert until_interrupted(run(tmp_path / "cut"))[-1] == "save"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert newest(tmp_path / "cut").step == 2
    one = model()
    list(run(tmp_path / "cut", one, resume=newest(tmp_path / "cut")))
    assert same(weights(one), weights(whole))


def test_ctrl_c_within_a_save_saves_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count(1)
    real = state.save_file

    def interrupted(*args: Any, **more: Any) -> None:
        real(*args, **more)
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(state, "save_file", interrupted)
    one = model()
    assert until_interrupted(run(tmp_path, one, save_every=1)) == ["start", "step", "save", "step", "save"]
    assert [checkpoint.step for checkpoint in state.checkpoints(tmp_path)] == [2, 1]
    assert same(stored_weights(newest(tmp_path)), weights(one))
    assert not list(tmp_path.rglob(".writing-*"))
