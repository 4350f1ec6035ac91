"""Rotary positions against a twin of complex numbers, and what makes them useful: only distances count."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from gptcli.core.rope import frequencies, magnitude, rotate, rotation
from gptcli.spec.config import RopeScaling
from tests.core.test_model import turns_twin


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


SCALINGS = {
    "linear": RopeScaling("linear", 3.0, 512),
    "llama3": RopeScaling("llama3", 8.0, 1024, low_frequency_factor=1.0, high_frequency_factor=4.0),
    "llama3, a wider ramp": RopeScaling("llama3", 32.0, 8192, low_frequency_factor=0.5, high_frequency_factor=20.0),
    "yarn": RopeScaling("yarn", 4.0, 512),
    "yarn, not truncated": RopeScaling("yarn", 2.5, 4096, beta_fast=20.0, beta_slow=2.0, truncate=False),
    "yarn, its own size": RopeScaling("yarn", 16.0, 64, attention_factor=1.25),
    "yarn, no ramp": RopeScaling("yarn", 4.0, 6),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize(("dim", "theta"), [(8, 10_000.0), (64, 500_000.0)])
def test_scaled_frequencies_are_those_of_the_twin(scaling: RopeScaling, dim: int, theta: float) -> None:
    wanted, size = turns_twin(dim, theta, scaling, 7)
    plain, _ = turns_twin(dim, theta, None, 7)
    found = frequencies(dim, theta, torch.device("cpu"), scaling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(wanted), atol=0, rtol=2e-6)
    assert magnitude(scaling) == pytest.approx(size)
    assert all(slow <= fast * 1.000001 for slow, fast in zip(wanted, plain, strict=True))
    assert wanted != plain
    turn = rotation(torch.tensor([[0, 5]]), dim, theta, torch.float32, scaling)
    assert turn[0][0, 0, :, 0].tolist() == pytest.approx([size, size * math.cos(5 * wanted[0])], abs=1e-5)


def test_dynamic_scaling_raises_the_base_beyond_the_original_context() -> None:
    scaling = RopeScaling("dynamic", 4.0, 16)
    for length in (5, 16, 17, 40):
        wanted, _ = turns_twin(8, 10_000.0, scaling, length)
        cos, sin = rotation(torch.arange(length)[None], 8, 10_000.0, torch.float32, scaling)
        for place in range(length):
            angles = [place * turn for turn in wanted] * 2
            assert cos[0, 0, place].tolist() == pytest.approx([math.cos(a) for a in angles], abs=2e-5)
            assert sin[0, 0, place].tolist() == pytest.approx([math.sin(a) for a in angles], abs=2e-5)
        assert (wanted == turns_twin(8, 10_000.0, None, length)[0]) == (length <= 16)


def test_dynamic_scaling_is_of_each_row_by_its_own_length() -> None:
    scaling, rows = RopeScaling("dynamic", 4.0, 16), torch.tensor([[3], [30], [16]])
    together = rotation(rows, 8, 10_000.0, torch.float32, scaling)
    for row in range(3):
        alone = rotation(rows[row : row + 1], 8, 10_000.0, torch.float32, scaling)
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[1][row], alone[1][0])


def test_what_is_behind_the_rotated_numbers_stays() -> None:
    x = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    turn = rotation(torch.arange(5)[None], 8, 10_000.0, torch.float32)
    turned = rotate(x, turn)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8].contiguous(), turn))


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
