"""Losses and gradients that are not finite: skipped, counted, gone back from, and in the end given up."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import DivergedError
from gptcli.train import loop
from gptcli.train.loss import Objective
from gptcli.train.optim import Optimizers
from gptcli.train.state import checkpoints
from tests.train.small import corpus, kinds, model, newest, run, same, stored, stored_weights, weights


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss of the n-th step, from 1 and however often a step is taken, what is no number."""

    real = Objective.forward

    def poisoned(bad: Callable[[int], bool], value: float = math.nan) -> None:
        calls = itertools.count(1)

        def forward(self: Objective, *args: Any) -> torch.Tensor:
            loss = real(self, *args)
            return loss * value if self.training and bad(next(calls)) else loss

        monkeypatch.setattr(Objective, "forward", forward)

    return poisoned


def until_diverged(events: Iterator[Any]) -> tuple[list[Any], DivergedError]:
    told = []
    with pytest.raises(DivergedError) as caught:  # noqa: PT012
        for event in events:
            told.append(event)
    return told, caught.value


def of(told: list[Any], kind: str) -> list[Any]:
    return [event for event in told if event["event"] == kind]


def short(told: list[Any]) -> str:
    """Events in a word: a letter each, steps that were skipped as a dash."""
    return "".join("-" if event.get("skipped") is True else event["event"][0] for event in told)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Callable[..., None], bad: float, where: str
) -> None:
    made: list[Optimizers] = []

    class Kept(Optimizers):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(loop, "Optimizers", Kept)
    one = model()
    if where == "loss":
        poison(lambda n: n == 2, bad)
    else:
        passes = itertools.count(1)
        one.norm.weight.register_hook(lambda gradient: gradient * bad if next(passes) == 2 else gradient)

    def snapshot() -> dict[str, torch.Tensor]:
        return {**weights(one), **{f"{name} {kind}": tensor.clone() for name, kind, tensor in made[0].tensors()}}

    before, kept, told = {}, [], []
    for event in run(tmp_path, one, valid=[corpus(50)]):
        told.append(event)
        if event["event"] in ("start", "step"):
            after = snapshot()
            kept.append(same(before, after))
            before = after
    assert kept == [False, False, True, False, False]
    steps = of(told, "step")
    assert [step["skipped"] for step in steps] == [False, True, False, False]
    assert [step["grad_norm"] is None for step in steps] == [False, True, False, False]
    assert [step["loss"] is None for step in steps] == [False, where == "loss", False, False]
    assert told[-1]["skipped"] == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(one).values())
    assert newest(tmp_path).state["skipped"] == 1
    for text in ((tmp_path / "metrics.jsonl").read_text(), (newest(tmp_path).folder / "state.json").read_text()):
        assert "NaN" not in text
        assert "Infinity" not in text


def test_a_few_in_a_row_are_skipped_and_no_more(tmp_path: Path, poison: Callable[..., None]) -> None:
    few = loop._PATIENCE - 1
    poison(lambda n: n % (few + 1) != 0)
    told = list(run(tmp_path, steps=2 * (few + 1)))
    assert short(told) == "s" + 2 * ("-" * few + "s") + "sd"
    assert told[-1]["skipped"] == 2 * few


def test_nothing_is_saved_while_steps_are_skipped(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(lambda n: n in (2, 3))
    told = list(run(tmp_path, save_every=1, steps=5))
    assert [event["step"] for event in of(told, "save")] == [1, 4, 5]


def test_the_end_is_saved_even_if_its_step_was_skipped(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(lambda n: n == 4)
    one = model()
    assert short(list(run(tmp_path, one))) == "ssss-sd"
    assert newest(tmp_path).step == 4
    assert same(stored_weights(newest(tmp_path)), weights(one))


def test_broken_weights_are_not_the_end(tmp_path: Path) -> None:
    """The last update broke them, which only the steps behind it would show: too few of them to go back for."""
    one = model()
    told = []
    for event in run(tmp_path, one, save_every=2, steps=5):
        told.append(event)
        if event["event"] == "step" and event["step"] == 3 and not of(told, "rollback"):
            one.norm.bias.data.add_(math.nan)
    assert short(told) == "ssss" + "s--r" + "sssssd"
    assert same(stored_weights(newest(tmp_path)), weights(one))
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(one).values())


def test_a_run_of_nothing_but_skipped_steps_has_diverged(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(lambda n: True)
    told, error = until_diverged(run(tmp_path, steps=2))
    assert short(told) == "s--"
    assert error.hint


def test_too_many_in_a_row_go_back_to_the_last_checkpoint_and_on_more_slowly(
    tmp_path: Path, poison: Callable[..., None]
) -> None:
    assert loop._PATIENCE == 4
    one = model()
    plain = [event["lr"] for event in run(tmp_path / "plain", steps=10) if event["event"] == "step"]
    poison(lambda n: 6 <= n <= 9)
    told, at_save, at_rollback = [], {}, {}
    for event in run(tmp_path, one, steps=10, save_every=2, valid=[corpus(50)], eval_every=5):
        told.append(event)
        if event["event"] == "save" and event["step"] == 4:
            at_save = {**weights(one)}
        if event["event"] == "rollback":
            at_rollback = {**weights(one)}
    (rollback,) = of(told, "rollback")
    assert rollback == {"event": "rollback", "step": 9, "tokens": 32 * 9, "to_step": 4, "lr_scale": 0.5}
    assert same(at_save, at_rollback)
    steps = of(told, "step")
    assert [step["step"] for step in steps] == [*range(1, 10), *range(5, 11)]
    assert [step["skipped"] for step in steps] == [False] * 5 + [True] * 4 + [False] * 6
    assert [step["lr"] for step in steps[:9]] == pytest.approx(plain[:9])
    assert [step["lr"] for step in steps[9:]] == pytest.approx([0.5 * lr for lr in plain[4:]])
    assert [step["tokens"] for step in steps] == [32 * step["step"] for step in steps]
    # The same batch with the same weights: the loss is that of the first time, to the bit.
    assert steps[9]["loss"] == steps[4]["loss"]
    assert (told[-1]["step"], told[-1]["skipped"]) == (10, 4)
    assert kinds(told)[-2:] == ["save", "done"]
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [10, 8]
    assert newest(tmp_path).state["lr_scale"] == 0.5
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == told


def test_the_optimizers_state_goes_back_too(tmp_path: Path, poison: Callable[..., None]) -> None:
    """Twice from the same place with the same rate is the same: what follows a rollback knows nothing of before it."""
    poison(lambda n: 5 <= n <= 8)
    list(run(tmp_path / "a", steps=8, save_every=4))
    going_back = newest(tmp_path / "a")
    one = run(tmp_path / "b", steps=8, save_every=4)
    while next(one)["event"] != "save":
        pass
    one.close()  # type: ignore[attr-defined]
    # By hand: the checkpoint of step 4 with half the rate.
    file = newest(tmp_path / "b").folder / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lr_scale": 0.5}))
    list(run(tmp_path / "b", steps=8, save_every=4, resume=newest(tmp_path / "b")))
    assert same(stored(going_back), stored(newest(tmp_path / "b")))


def test_going_on_after_a_rollback_is_exact_when_resumed(tmp_path: Path, poison: Callable[..., None]) -> None:
    def bad(n: int) -> bool:
        return 5 <= n <= 8

    poison(bad)
    told = list(run(tmp_path / "whole", steps=8, save_every=2))
    wanted = stored(newest(tmp_path / "whole"))
    poison(bad)
    events = run(tmp_path / "cut", steps=8, save_every=2)
    while not (tmp_path / "cut" / "checkpoints" / "step-000000006").exists():
        next(events)
    events.close()  # type: ignore[attr-defined]
    resumed = list(run(tmp_path / "cut", steps=8, save_every=2, resume=newest(tmp_path / "cut")))
    assert kinds(resumed) == ["start", "step", "step", "save", "done"]
    assert [(e["loss"], e["lr"]) for e in of(resumed, "step")] == [(e["loss"], e["lr"]) for e in of(told, "step")[-2:]]
    assert same(stored(newest(tmp_path / "cut")), wanted)
    assert resumed[-1]["skipped"] == told[-1]["skipped"] == 4
    # And the log tells all that happened, once.
    log = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert [(e["step"], e["skipped"]) for e in of(log, "step")] == [(e["step"], e["skipped"]) for e in of(told, "step")]
    assert len(of(log, "rollback")) == 1


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(
    tmp_path: Path, poison: Callable[..., None]
) -> None:
    poison(lambda n: n > 2)
    told, error = until_diverged(run(tmp_path, steps=20, save_every=10))
    assert short(told) == "sss----"
    assert "before the first checkpoint (step 6)" in error.message
    assert "--lr" in error.hint
    assert not (tmp_path / "model.safetensors").exists()


def test_another_runs_checkpoint_is_nothing_to_go_back_to(tmp_path: Path, poison: Callable[..., None]) -> None:
    list(run(tmp_path, steps=3, save_every=1))
    poison(lambda n: True)
    told, error = until_diverged(run(tmp_path, steps=20, save_every=10))
    assert short(told) == "s----"
    assert "before the first checkpoint" in error.message


def test_going_back_again_and_again_is_given_up(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(lambda n: n > 2)
    told, error = until_diverged(run(tmp_path, steps=20, save_every=2))
    assert short(told) == "ssss" + loop._MOST_ROLLBACKS * "----r" + "----"
    assert [event["lr_scale"] for event in of(told, "rollback")] == [0.5**n for n in range(1, loop._MOST_ROLLBACKS + 1)]
    assert "again and again (step 6)" in error.message
    assert error.hint
    assert newest(tmp_path).step == 2


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(lambda n: 5 <= n <= 8)
    told = []
    for event in run(tmp_path, steps=8, save_every=2):
        told.append(event)
        if event["event"] == "save" and event["step"] == 4:
            (file,) = newest(tmp_path).folder.glob("*.safetensors")
            file.write_bytes(file.read_bytes()[:-8])
    assert [event["to_step"] for event in of(told, "rollback")] == [2]
    assert kinds(told)[-1] == "done"
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [8, 6]


def test_an_evaluation_that_is_not_finite_is_not_known_and_not_the_best(tmp_path: Path) -> None:
    one = model()
    told = []
    for event in run(tmp_path, one, valid=[corpus(50)], eval_every=1, steps=3):
        told.append(event)
        if event["event"] == "eval" and event["step"] == 1:
            one.norm.bias.data.add_(math.nan)
        if event["event"] == "eval" and event["step"] == 2:
            one.norm.bias.data.zero_()
    first, second, third = of(told, "eval")
    assert first["best"] == first["bits_per_byte"]
    assert (second["loss"], second["bits_per_byte"], second["valid"]) == (None, None, {"text": None})
    assert second["best"] == first["best"]
    assert third["best"] == min(first["bits_per_byte"], third["bits_per_byte"]) == told[-1]["bits_per_byte"]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
