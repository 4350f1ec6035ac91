"""On a CUDA device: every axis is what it is on a CPU, whole, in chunks, step by step and in captured graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptcli.core import graphs
from gptcli.core.cache import KVCache
from gptcli.core.decode import Decoder
from gptcli.core.graphs import DeviceLoop
from gptcli.core.settings import Sampling
from gptcli.spec.config import ModelConfig, RopeScaling
from tests.core.test_model import CONFIGS, LLAMA_LIKE, some_ids, visible_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
ALL = {
    **CONFIGS,
    "dynamic": ModelConfig(**{**LLAMA_LIKE, "rope_scaling": RopeScaling("dynamic", 4.0, 12)}),
    # Heads as wide as the fast kernels want them.
    "wide window": ModelConfig(**{**LLAMA_LIKE, "head_dim": 64, "qk_norm": "head", "windows": (5, None)}),
}
every_config = pytest.mark.parametrize("config", ALL.values(), ids=ALL.keys())


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(graphs, "_LEAST_SEEN", 4)
    monkeypatch.setattr(graphs, "_LEAST_CAPACITY", 8)
    with torch.no_grad():
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@every_config
def test_logits_are_those_of_a_cpu(config: ModelConfig) -> None:
    """Whole, then after a prefill in a chunk and a token; dynamic scaling depends on the parts, which are the same."""
    model = visible_model(config)
    ids = some_ids(config, count=20)
    made = []
    for device in ("cpu", DEVICE):
        there = model.to(device)
        there.tie()
        cache = KVCache(config, 2, 24, device=device, dtype=torch.float32)
        parts = [there(ids[:, a:b].to(device), cache) for a, b in ((0, 7), (7, 19), (19, 20))]
        made.append([there(ids.to(device)).cpu(), *(part.cpu() for part in parts)])
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@every_config
def test_bfloat16_is_near_float32(config: ModelConfig) -> None:
    model = visible_model(config).to(DEVICE)
    model.tie()
    ids = some_ids(config, count=20).to(DEVICE)
    exact = model(ids)
    rounded = model.bfloat16()
    rounded.tie()
    assert (rounded(ids).float() - exact).abs().max() < 0.1 * exact.abs().max()


@every_config
def test_captured_steps_are_the_eager_ones(config: ModelConfig) -> None:
    """Rows of different length, past every window and through several graphs."""
    transformer = visible_model(config).to(DEVICE)
    transformer.tie()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 7, 3]]
    eager = Decoder(transformer)
    tokens = [eager.prefill(prompts, 32).argmax(-1)]
    for _ in range(19):
        tokens.append(eager.step(tokens[-1]).argmax(-1))
    loop = DeviceLoop(transformer, Sampling(temperature=0), 3, 8)
    decoder = Decoder(transformer)
    logits = decoder.prefill(prompts, 12)
    assert decoder.cache is not None
    loop.start(decoder.cache, logits, [0, 1, 2], [len(prompt) for prompt in prompts], None)
    assert [loop.next() for _ in range(20)] == [token.tolist() for token in tokens]
    assert loop.failed is None
    assert DEVICE == "cpu" or loop.graphs >= 2
