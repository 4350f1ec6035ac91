"""What a run finds out by trying: found within what fits, kept in the checkpoint, and used again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptcli.core.model import Block, Transformer
from gptcli.train import fit
from gptcli.train.fit import Choices
from gptcli.train.loss import Objective
from gptcli.train.ranks import Ranks
from tests.train.small import CONTEXT, VOCAB, model, newest, plan, run


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 31])
@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 100])
def test_a_batch_is_parted_evenly_into_as_few_parts_as_fit(rows: int, most: int) -> None:
    part = fit._even(rows, most)
    count = -(-rows // part)
    assert 1 <= part <= min(rows, most)
    assert count == -(-rows // min(rows, most))
    assert part == 1 or (part - 1) * count < rows  # none could be smaller


def chosen(rows: int, one: Transformer | None = None, **more: Any) -> Choices:
    return fit.choose(Objective(one or model(), torch.float32), plan(**more), rows, Ranks())


def test_on_a_cpu_parts_are_what_its_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_CPU_TOKENS", 5 * CONTEXT)
    assert chosen(4) == Choices(4, False, False)
    assert chosen(12) == Choices(4, False, False)
    monkeypatch.setattr(fit, "_CPU_TOKENS", 1)
    assert chosen(12).micro_batch == 1


def test_what_the_plan_says_is_chosen() -> None:
    assert chosen(12, micro_batch=3, compile=True, checkpoint_activations=True) == Choices(3, True, True)
    assert chosen(12, micro_batch=5) == Choices(4, False, False)
    assert chosen(2, micro_batch=5) == Choices(2, False, False)


def gradients(one: Transformer, saving: bool) -> dict[str, Tensor]:
    fit.apply(one, Choices(4, False, saving))
    ids = torch.arange(4 * CONTEXT).view(4, CONTEXT) * 5 % VOCAB
    one.zero_grad()
    Objective(one, torch.float32)(ids, ids.roll(1)).backward()
    return {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}


def test_checkpointing_makes_activations_again_and_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    passes: list[int] = []
    for block in one.blocks:
        block.mlp.register_forward_pre_hook(lambda *args: passes.append(1))
    results, counts = [], []
    for saving in (False, True, False):
        passes.clear()
        results.append(gradients(one, saving))
        counts.append(len(passes))
    assert counts == [2, 4, 2]
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name
        assert torch.equal(gradient, results[2][name]), name


@pytest.mark.parametrize("saving", [False, True])
def test_blocks_are_compiled_once_for_all_of_them_and_left_alone_by_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: bool
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def sample(one: Transformer, step: int) -> dict[str, Any]:
        with torch.inference_mode():
            for length in range(1, CONTEXT):
                one(torch.zeros((1, length), dtype=torch.int64))
        return {}

    options = {"steps": 2, "sampler": sample, "sample_every": 1, "checkpoint_activations": saving}
    plain = list(run(tmp_path, model(n_layer=3), compile=False, **options))
    torch._dynamo.reset()
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))
    compiled = list(run(tmp_path, model(n_layer=3), compile=True, **options))
    assert len(graphs) == 1
    for one, other in zip(plain, compiled, strict=True):
        assert one.get("loss") == pytest.approx(other.get("loss"), abs=1e-6)


# --- Recorded and used again


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a block was told to compile, without that taking place."""
    times: list[int] = []
    monkeypatch.setattr(Block, "compile", lambda self: times.append(1), raising=False)
    return times


def test_what_was_chosen_is_kept_and_used_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[int]
) -> None:
    chosen = {"micro_batch": 2, "compile": True, "checkpoint_activations": True}
    told = list(run(tmp_path, steps=2, save_every=1, options={"lr": 1}, **chosen))
    assert {name: told[0][name] for name in chosen} == chosen
    assert len(compiled) == 2
    checkpoint = newest(tmp_path)
    assert checkpoint.state["options"] == {"lr": 1, "choices": chosen}

    def never(*args: Any) -> Choices:
        raise AssertionError

    monkeypatch.setattr(fit, "choose", never)
    told = list(run(tmp_path, steps=4, options={"lr": 1}, resume=checkpoint))
    assert {name: told[0][name] for name in chosen} == chosen
    assert told[0]["resumed"] is True
    assert len(compiled) == 4
    assert newest(tmp_path).state["options"] == {"lr": 1, "choices": chosen}


@pytest.mark.parametrize("other", [{"ranks": 2}, {"device": "NVIDIA H100 80GB HBM3"}])
def test_on_other_devices_or_another_number_of_them_it_is_chosen_anew(tmp_path: Path, other: dict[str, Any]) -> None:
    list(run(tmp_path, steps=2, micro_batch=1))
    file = newest(tmp_path).folder / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other}))
    told = list(run(tmp_path, steps=4, resume=newest(tmp_path)))
    assert told[0]["micro_batch"] == 4


# --- As on CUDA, whose memory is here a number


def pretend(monkeypatch: pytest.MonkeyPatch, fits: Callable[[int, bool], bool]) -> list[int]:
    """Passes that need no device: ``fits`` says whether so many rows do, with gradients there already or not."""
    tried: list[int] = []

    def one_pass(objective: nn.Module, rows: int, apart: bool, context: int | None) -> None:
        tried.append(rows)
        there = all(parameter.grad is not None for parameter in objective.parameters())
        for parameter in objective.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if not fits(rows, there):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(fit, "_pass", one_pass)
    return tried


@pytest.mark.parametrize(
    ("rows", "room", "found", "wanted"),
    [
        (8, 8, 8, [8]),
        (8, 100, 8, [8]),
        (16, 9, 8, [16, 8, 8]),
        (16, 7, 4, [16, 8, 4, 4]),
        (7, 6, 4, [7, 4, 4]),
        (5, 1, 1, [5, 3, 2, 1, 1]),
        (1, 1, 1, [1]),
    ],
)
def test_halves_are_tried_until_one_fits(
    monkeypatch: pytest.MonkeyPatch, rows: int, room: int, found: int, wanted: list[int]
) -> None:
    tried = pretend(monkeypatch, lambda count, there: count <= room)
    objective = Objective(model(), torch.float32)
    assert fit._largest(objective, rows, False) == found
    assert tried == wanted
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_a_part_has_to_fit_beside_the_gradients_of_the_part_before(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = pretend(monkeypatch, lambda count, there: count + 3 * there <= 8)
    objective = Objective(model(), torch.float32)
    assert fit._largest(objective, 8, False) == 8  # all at once: there is no part before
    assert fit._largest(objective, 16, False) == 4
    assert tried == [8, 16, 8, 8, 4, 4]


@pytest.mark.parametrize("rows", [1, 6])
def test_where_not_one_row_fits_none_is_found(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    pretend(monkeypatch, lambda count, there: False)
    assert not fit._largest(Objective(model(), torch.float32), rows, False)


def test_trying_is_done_with_the_checkpointing_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    for saving in (True, False):
        pretend(monkeypatch, lambda count, there: True)
        fit._largest(Objective(one, torch.float32), 2, saving)
        assert all((block.forward.__func__ is not Block.forward) == saving for block in one.blocks)


@pytest.mark.parametrize(("faster", "pays"), [(0.5, True), (0.94, True), (0.96, False), (2.0, False)])
def test_compiling_pays_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, faster: float, pays: bool) -> None:
    one = model()
    now = [0.0]

    def marked(self: Block) -> None:
        self._compiled_call_impl = self._call_impl

    def one_pass(objective: nn.Module, rows: int, apart: bool, context: int | None) -> None:
        now[0] += faster if one.blocks[0]._compiled_call_impl else 1.0

    monkeypatch.setattr(Block, "compile", marked, raising=False)
    monkeypatch.setattr(fit, "_pass", one_pass)
    monkeypatch.setattr(fit.time, "perf_counter", lambda: now[0])
    assert fit._compiling_pays(Objective(one, torch.float32), 2, False) is pays
    assert all(block._compiled_call_impl is None for block in one.blocks)


def test_a_compiler_that_fails_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Block) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Block, "compile", broken, raising=False)
    monkeypatch.setattr(fit, "_pass", lambda objective, rows, apart, context: None)
    assert fit._compiling_pays(Objective(model(), torch.float32), 2, False) is False
