"""The schedule's values and what is decayed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from gptcli.core.build import random_model
from gptcli.spec.config import from_hf
from gptcli.train.optim import learning_rate, make_adamw


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 0.0),
        (0.01, 0.5),
        (0.02, 1.0),  # the end of the warm-up
        (0.51, 0.55),  # half way down the cosine
        (0.265, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        (1.0, 0.1),
        (1.2, 0.1),  # a run by the clock may end late
    ],
)
def test_the_rate_goes_up_in_a_line_and_down_in_a_cosine(progress: float, rate: float) -> None:
    assert learning_rate(3.0, progress, 0.02) == pytest.approx(3.0 * rate)


def test_the_rate_has_no_jump_and_one_peak() -> None:
    rates = [learning_rate(1.0, i / 1000, 0.1) for i in range(1001)]
    peak = rates.index(max(rates))
    assert peak == 100
    assert all(before < after for before, after in pairwise(rates[: peak + 1]))
    assert all(before > after for before, after in pairwise(rates[peak:]))
    assert max(abs(before - after) for before, after in pairwise(rates)) <= 0.0101


def test_no_warm_up_begins_at_the_peak_and_the_end_can_be_chosen() -> None:
    assert learning_rate(2.0, 0.0, 0.0) == pytest.approx(2.0)
    assert learning_rate(2.0, 1.0, 0.0, final=0.0) == pytest.approx(0.0)
    assert learning_rate(2.0, 1.0, 0.0, final=1.0) == pytest.approx(2.0)
    assert learning_rate(2.0, 0.5, 1.0) == pytest.approx(1.0)


def test_matrices_are_decayed_and_biases_and_norms_are_not() -> None:
    raw = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = random_model(from_hf(raw), seed=1)
    optimizer = make_adamw(model, 0.01, 0.3)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in plain["params"])
    # Each parameter once: the tied table is not updated twice.
    given = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(given) == sorted(names)


def test_one_step_is_adamw_by_hand() -> None:
    matrix, bias = (torch.nn.Parameter(torch.full(shape, 2.0)) for shape in ((2, 2), (2,)))
    model = torch.nn.Module()
    model.register_parameter("matrix", matrix)
    model.register_parameter("bias", bias)
    optimizer = make_adamw(model, 0.1, 0.5)
    (matrix.sum() + bias.sum()).backward()
    optimizer.step()
    # Decoupled decay takes lr * 0.5 * 2, then Adam's first step is lr in the gradient's direction.
    assert torch.allclose(matrix, torch.full((2, 2), 2.0 - 0.1 * 0.5 * 2.0 - 0.1))
    assert torch.allclose(bias, torch.full((2,), 2.0 - 0.1))


def test_what_needs_no_gradient_is_left_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    groups = make_adamw(model, 0.1, 0.5).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]
