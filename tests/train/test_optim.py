"""The schedule's values, what is decayed, and which optimizer updates what."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from gptcli.train.optim import KINDS, Kind, Optimizers, schedule
from tests.train.small import model, same, weights

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(
    ("progress", "part"),
    [
        (0.0, 0.0),
        (0.01, 0.5),
        (0.02, 1.0),  # the end of the warm-up
        (0.51, 0.5),  # half way down
        (0.755, 0.25),
        (1.0, 0.0),
        (1.2, 0.0),  # a run by the clock may end late
    ],
)
def test_the_rate_goes_up_in_a_line_and_down_in_a_line_to_nothing(progress: float, part: float) -> None:
    assert schedule(progress, 0.02) == pytest.approx(part)


def test_the_rate_has_no_jump_and_one_peak() -> None:
    rates = [schedule(i / 1000, 0.1) for i in range(1001)]
    peak = rates.index(max(rates))
    assert peak == 100
    assert all(before < after for before, after in pairwise(rates[: peak + 1]))
    assert all(before > after for before, after in pairwise(rates[peak:]))
    assert max(abs(before - after) for before, after in pairwise(rates)) <= 0.0101


@pytest.mark.parametrize(("progress", "warmup", "part"), [(0, 0, 1), (1, 0, 0), (0.5, 1, 0.5), (1, 1, 0), (1.5, 1, 0)])
def test_all_of_a_run_or_none_of_it_may_be_warm_up(progress: float, warmup: float, part: float) -> None:
    assert schedule(progress, warmup) == pytest.approx(part)


def with_gradients(one: nn.Module, value: float) -> None:
    for parameter in one.parameters():
        parameter.grad = torch.full_like(parameter, value)


@every_kind
def test_matrices_are_decayed_and_biases_and_norms_are_not(kind: Kind) -> None:
    one = model()
    for parameter in one.parameters():
        parameter.data.fill_(2.0)
    with_gradients(one, 0.0)
    optimizers = Optimizers(kind, one, 0.1, 0.5)
    optimizers.step(0.5)
    # The tied table too is decayed once only.
    for name, parameter in one.named_parameters():
        wanted = 2.0 * (1 - 0.5 * 0.1 * 0.5) if parameter.dim() == 2 else 2.0
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, wanted), msg=name)
        assert parameter.grad is None


def test_one_step_is_adamw_by_hand() -> None:
    one = nn.Module()
    one.matrix, one.bias = (nn.Parameter(torch.full(shape, 2.0)) for shape in ((2, 2), (2,)))
    optimizers = Optimizers("adamw", one, 0.1, 0.5)
    with_gradients(one, 1.0)
    optimizers.step(1.0)
    # Decoupled decay takes lr * 0.5 * 2, then Adam's first step is lr in the gradient's direction.
    assert torch.allclose(one.matrix, torch.full((2, 2), 2.0 - 0.1 * 0.5 * 2.0 - 0.1))
    assert torch.allclose(one.bias, torch.full((2,), 2.0 - 0.1))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_muon_step_is_as_long_in_all_directions(shape: tuple[int, int]) -> None:
    """Newton-Schulz in bfloat16 brings singular values near 1 and no nearer; the scale is 0.2 sqrt(longer side)."""
    one = nn.Module()
    one.blocks = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])
    matrix = one.blocks[0].weight
    before = matrix.detach().clone()
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    matrix.grad = u @ torch.diag(torch.logspace(0, -1, len(s))) @ v
    optimizers = Optimizers("muon", one, 0.1, 0.5)
    optimizers.step(1.0)
    moved = (before * (1 - 0.1 * 0.5) - matrix.detach()) / (0.1 * 0.2 * math.sqrt(max(shape)))
    lengths = torch.linalg.svdvals(moved)
    assert 0.6 < lengths.min() <= lengths.max() < 1.3
    assert torch.trace(moved @ v.t() @ u.t()) > 0.6 * len(s)  # along the gradient's directions, and downhill


def test_muon_is_for_the_matrices_of_the_blocks_and_adamw_for_the_rest() -> None:
    one = model()
    optimizers = Optimizers("muon", one, 0.1, 0.5)
    with_gradients(one, 1.0)
    optimizers.step(1.0)
    kept: dict[str, set[str]] = {}
    for name, kind, tensor in optimizers.tensors():
        kept.setdefault(name, set()).add(kind)
        assert kind == "step" or tensor.shape == one.get_parameter(name).shape
    assert kept.keys() == weights(one).keys()
    for name, names in kept.items():
        matrix = name.startswith("blocks.") and one.get_parameter(name).dim() == 2
        assert names == ({"momentum_buffer"} if matrix else {"step", "exp_avg", "exp_avg_sq"}), name


@every_kind
def test_made_state_is_that_of_a_first_step_and_changes_nothing(kind: Kind) -> None:
    made, plain = model(), model()
    ours, theirs = (Optimizers(kind, one, 0.1, 0.5) for one in (made, plain))
    ours.create_state()
    assert not any(tensor.any() for _, _, tensor in ours.tensors())
    for step in range(3):
        for one, optimizers in ((made, ours), (plain, theirs)):
            with_gradients(one, 1.0 + step)
            optimizers.step(0.5)
    assert same(weights(made), weights(plain))

    def by_name(optimizers: Optimizers) -> dict[str, torch.Tensor]:
        return {f"{name} {what}": tensor for name, what, tensor in optimizers.tensors()}

    assert same(by_name(ours), by_name(theirs))
    assert all(tensor.dtype is torch.float32 for tensor in by_name(ours).values())


@every_kind
@pytest.mark.parametrize("frozen", ["blocks.", "embedding", "norm", "weight", "bias"])
def test_what_needs_no_gradient_is_left_out(kind: Kind, frozen: str) -> None:
    one = model()
    for name, parameter in one.named_parameters():
        parameter.requires_grad_(frozen not in name)
    before = weights(one)
    optimizers = Optimizers(kind, one, 0.1, 0.5)
    with_gradients(one, 1.0)
    optimizers.step(1.0)
    assert {name for name, _, _ in optimizers.tensors()} == {name for name in before if frozen not in name}
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, before[name]) == (frozen in name), name
