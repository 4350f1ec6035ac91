"""Rotary positions against a twin of complex numbers, and what makes them useful: only distances count."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor

from gptcli.core.rope import rotate, rotation


def complex_twin(x: list[float], position: int, theta: float) -> list[float]:
    """One vector: dimensions i and i + D/2 are a complex number, turned by position * theta ** (-2i / D)."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-2 * i / len(x))) for i in range(half)]
    return [z.real for z in turned] + [z.imag for z in turned]


@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (8, 10_000.0), (64, 500_000.0)])
def test_rotation_equals_complex_numbers(dim: int, theta: float) -> None:
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(2, 3, 5, dim, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 100], [7, 8, 9, 500, 1000]])
    turned = rotate(x, rotation(positions, dim, theta, torch.float32))
    for row in range(2):
        for head in range(3):
            for t in range(5):
                wanted = complex_twin(x[row, head, t].tolist(), int(positions[row, t]), theta)
                # An angle of 1000 has float32 steps of 6e-5.
                torch.testing.assert_close(turned[row, head, t], torch.tensor(wanted), atol=4e-4, rtol=0)
                if positions[row, t] < 10:
                    torch.testing.assert_close(turned[row, head, t], torch.tensor(wanted), atol=4e-6, rtol=0)


def test_position_zero_turns_nothing_and_lengths_stay() -> None:
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotation(torch.tensor([[0, 3, 50, 2000]]), 16, 10_000.0, torch.float32))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert not torch.allclose(turned[:, :, 1], x[:, :, 1])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_only_the_distance_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        turned = [
            rotate(x, rotation(torch.tensor([[at]]), 32, 10_000.0, torch.float64))
            for x, at in ((query, query_at), (key, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=0)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_shapes_and_dtype() -> None:
    cos, sin = rotation(torch.arange(6).view(2, 3), 8, 10_000.0, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 1, 3, 8)
    assert cos.dtype == sin.dtype == torch.bfloat16
