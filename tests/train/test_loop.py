"""The training loop: events in order, gradients whatever the cut of a batch, nothing learned from NaN."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.errors import UsageError
from gptcli.spec.config import from_hf
from gptcli.spec.match import match_folder
from gptcli.train import loop
from gptcli.train.data import Batches, Corpus
from gptcli.train.loop import Plan, corpus_nats, train

CONTEXT, VOCAB = 8, 24


def model(seed: int = 1) -> Transformer:
    raw = {"model_type": "gpt2", "vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return random_model(from_hf(raw), seed)


def corpus(length: int = 200, name: str = "text", seed: int = 0) -> Corpus:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.uint16)
    return Corpus(name, tokens, 1, 3 * length)


def plan(**more: Any) -> Plan:
    return Plan(**{"batch_tokens": 4 * CONTEXT, "lr": 0.01, "steps": 4, "eval_every": 0, "save_every": 0, **more})


def run(out: Path, one: Transformer | None = None, valid: list[Corpus] | None = None, **more: Any) -> Iterator[Any]:
    out.mkdir(parents=True, exist_ok=True)
    return train(one or model(), corpus(), valid or [], plan(**more), out, {"extra.txt": b"x"})


def weights(one: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.named_parameters()}


# --- Events


@pytest.mark.parametrize(
    ("more", "kinds"),
    [
        ({}, "start step step step step eval save done"),
        ({"eval_every": 2}, "start step step eval step step eval save done"),
        ({"save_every": 3}, "start step step step save step eval save done"),
        ({"eval_every": 1, "save_every": 1, "steps": 2}, "start step eval save step eval save done"),
        ({"steps": 1}, "start step eval save done"),
    ],
)
def test_events_come_in_order(tmp_path: Path, more: dict[str, int], kinds: str) -> None:
    told = list(run(tmp_path, valid=[corpus(50)], **more))
    assert [event["event"] for event in told] == kinds.split()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == told


def test_without_held_out_text_there_is_no_evaluation(tmp_path: Path) -> None:
    told = list(run(tmp_path))
    assert [event["event"] for event in told] == ["start", *["step"] * 4, "save", "done"]
    assert told[-1]["bits_per_byte"] is None


def test_what_events_say(tmp_path: Path) -> None:
    one = model()
    told = list(run(tmp_path, one, valid=[corpus(50, "a", 1), corpus(70, "b", 2)], seed=5))
    start, *steps, evaluation, save, done = told
    assert start["parameters"] == sum(parameter.numel() for parameter in one.parameters())
    assert start["config"] == one.config.to_dict()
    assert (start["train_tokens"], start["train_bytes"], start["batch_tokens"]) == (200, 600, 4 * CONTEXT)
    assert [step["tokens"] for step in steps] == [32, 64, 96, 128]
    assert [step["progress"] for step in steps] == [0.25, 0.5, 0.75, 1.0]
    assert steps[0]["loss"] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert [step["lr"] for step in steps[1:]] == sorted((step["lr"] for step in steps[1:]), reverse=True)
    assert max(step["lr"] for step in steps) <= 0.01
    assert (save["step"], save["path"]) == (4, str(tmp_path))
    assert (done["step"], done["tokens"], done["skipped"]) == (4, 128, 0)
    # The last evaluation is of the weights that were left.
    bits = {}
    for part in (corpus(50, "a", 1), corpus(70, "b", 2)):
        nats, _ = corpus_nats(loss_of(one), part, CONTEXT, 3, torch.device("cpu"))
        bits[part.name] = nats / math.log(2) / part.text_bytes
    assert evaluation["valid"] == pytest.approx(bits, rel=1e-5)
    assert evaluation["bits_per_byte"] == pytest.approx((bits["a"] * 150 + bits["b"] * 210) / 360)
    assert evaluation["bits_per_byte"] == done["bits_per_byte"]


def test_the_best_evaluation_is_remembered(tmp_path: Path) -> None:
    told = list(run(tmp_path, valid=[corpus(50)], eval_every=1, lr=0.5, steps=6))
    bits = [event["bits_per_byte"] for event in told if event["event"] == "eval"]
    assert told[-1]["bits_per_byte"] == min(bits) < bits[-1]


def test_the_folder_holds_the_model_and_its_files(tmp_path: Path) -> None:
    one = model()
    list(run(tmp_path, one))
    assert (tmp_path / "extra.txt").read_bytes() == b"x"
    assert len(match_folder(tmp_path, one.config)) == 2 + 2 * 12 + 2


def test_closing_the_iterator_leaves_the_last_save(tmp_path: Path) -> None:
    events = run(tmp_path, save_every=1)
    for event in events:
        if event["event"] == "save":
            break
    events.close()  # type: ignore[attr-defined]
    assert match_folder(tmp_path, model().config)
    assert [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1] == "save"


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
    assert [event["event"] for event in told[-4:]] == ["step", "eval", "save", "done"]


def test_a_time_that_is_over_at_once_is_one_step(tmp_path: Path) -> None:
    told = list(run(tmp_path, steps=None, minutes=1e-12))
    assert [event["event"] for event in told] == ["start", "step", "save", "done"]


# --- Gradients


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain gradient descent, since Adam blows up the rounding of gradients that should be nothing."""
    monkeypatch.setattr(loop, "make_adamw", lambda one, lr, _: torch.optim.SGD(one.parameters(), lr=lr))
    results = []
    calls = []
    real = F.cross_entropy

    def counting(*args: Any, **more: Any) -> torch.Tensor:
        calls.append(len(args[0]) // CONTEXT)
        return real(*args, **more)

    monkeypatch.setattr(F, "cross_entropy", counting)
    for rows, cut in ((100, [7]), (3, [3, 3, 1]), (1, [1] * 7)):
        monkeypatch.setattr(loop, "_LOGIT_BYTES", rows * 4 * CONTEXT * VOCAB)
        calls.clear()
        one = model()
        told = list(run(tmp_path / str(rows), one, batch_tokens=7 * CONTEXT, steps=3, lr=1.0))
        assert calls[: len(cut)] == cut
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
    batch = loop.Batches(corpus(), 4, CONTEXT, 5).at(0)
    ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
    expected = F.cross_entropy(one(ids).flatten(0, 1), targets.flatten())
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in one.parameters() if p.grad is not None))
    step = next(event for event in run(tmp_path, seed=5) if event["event"] == "step")
    assert step["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_gradients_are_clipped_to_their_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_adamw", lambda one, lr, _: torch.optim.SGD(one.parameters(), lr=lr))
    one = model()
    before = weights(one)
    told = list(run(tmp_path, one, steps=1, clip=0.01))
    step = told[1]
    assert step["grad_norm"] > 0.01
    moved = math.sqrt(sum(float((weight - before[name]).square().sum()) for name, weight in weights(one).items()))
    assert moved == pytest.approx(0.01 * step["lr"], rel=1e-2)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, bad: float) -> None:
    one = model()
    passes = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return gradient * bad if len(passes) == 2 else gradient

    one.norm.weight.register_hook(spoil)
    before, kept = {}, []
    told = []
    for event in run(tmp_path, one, valid=[corpus(50)]):
        told.append(event)
        if event["event"] in ("start", "step"):
            after = weights(one)
            kept.append(bool(before) and all(torch.equal(before[name], after[name]) for name in after))
            before = after
    assert kept == [False, False, True, False, False]
    steps = [event for event in told if event["event"] == "step"]
    assert [step["grad_norm"] is None for step in steps] == [False, True, False, False]
    assert all(step["loss"] is not None for step in steps)
    assert told[-1]["skipped"] == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(one).values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_same_seed_gives_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        one = model()
        list(run(tmp_path / name, one, seed=seed))
        made.append(weights(one))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_evaluation_and_saving_change_nothing(tmp_path: Path) -> None:
    made = []
    for name, more in (("a", {}), ("b", {"valid": [corpus(50)], "eval_every": 1, "save_every": 1})):
        one = model()
        list(run(tmp_path / name, one, **more))
        made.append(weights(one))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# --- Evaluation


def loss_of(one: Transformer) -> Any:
    return lambda ids, targets: F.cross_entropy(one(ids).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("length", [2, 3, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT, 3 * CONTEXT + 1, 50])
@pytest.mark.parametrize("rows", [1, 2, 100])
@torch.no_grad()
def test_corpus_nats_is_the_sum_over_all_tokens_but_the_first(length: int, rows: int) -> None:
    one = model()
    for parameter in one.parameters():
        parameter.mul_(5)  # far from even, so that a token left out or counted twice shows
    text = corpus(length)
    tokens = text.tokens.tolist()
    total = 0.0
    for place in range(1, length):
        first = (place - 1) // CONTEXT * CONTEXT  # of its window
        logits = one(torch.tensor([tokens[first:place]]))[0, -1]
        total -= logits.log_softmax(-1)[tokens[place]].item()
    nats, count = corpus_nats(loss_of(one), text, CONTEXT, rows, torch.device("cpu"))
    assert count == length - 1
    assert nats == pytest.approx(total, rel=1e-5)


def test_ctrl_c_between_steps_saves_what_was_learnt(tmp_path: Path) -> None:
    one = model()
    events = run(tmp_path, one, steps=50)
    while next(events)["event"] != "step":
        pass
    assert events.throw(KeyboardInterrupt())["event"] == "save"
    with pytest.raises(KeyboardInterrupt):
        next(events)
    assert (tmp_path / "model.safetensors").is_file()
    assert [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").open()] == ["start", "step", "save"]


def test_ctrl_c_within_a_step_saves_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Batches, step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return real(self, step)

    real = Batches.at
    monkeypatch.setattr(Batches, "at", interrupted)
    kinds = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for event in run(tmp_path, steps=50):
            kinds.append(event["event"])
    assert kinds == ["start", "step", "step", "save"]
    assert (tmp_path / "model.safetensors").is_file()
