"""On a CUDA device: quantized matrices are those of a CPU, and their products those of the slow twin."""

from __future__ import annotations

import pytest
import torch

from gptcli.core.quantize import KINDS, QuantizedLinear, _unpacked
from tests.core.test_quantize import linear, random, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(7, 5), (33, 70), (2304, 768), (768, 3072), (50257, 768)], ids=str)
def test_the_fast_product_is_the_slow_one(kind: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    layer = QuantizedLinear.of(linear(*size, dtype=dtype).cuda(), kind)
    for rows in (1, 5, 100):
        x = random(rows, size[1]).to("cuda", dtype)
        assert relative(layer(x), layer.slow(x)) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gpt2s_matrices_have_a_fast_product(kind: str) -> None:
    layer = QuantizedLinear.of(linear(2304, 768, dtype=torch.bfloat16).cuda(), kind)
    layer(random(1, 768).to("cuda", torch.bfloat16))
    assert layer._product is not _unpacked


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_as_on_a_cpu(kind: str) -> None:
    here, there = (QuantizedLinear.of(linear(96, 70).to(device), kind) for device in ("cpu", "cuda"))
    assert torch.equal(here.dequantized(), there.dequantized().cpu())
