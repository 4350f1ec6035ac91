"""What spec says on paper beside what torch really allocates and computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptcli.core.build import random_model
from gptcli.core.cache import KVCache
from gptcli.core.quantize import KINDS, quantize_
from gptcli.spec.config import ModelConfig
from gptcli.spec.flops import count_flops, flops_per_token
from gptcli.spec.memory import inference_memory, training_memory
from gptcli.train.optim import Optimizers

ROWS, CONTEXT = 3, 24
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied_wide": {"tied": False, "mlp_width": 100, "head_dim": 12},
    "grouped_gated_rope": {"kv_heads": 2, "gated": True, "activation": "silu", "position": "rope", "norm": "rmsnorm"},
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    sizes = {"vocab_size": 50, "context": CONTEXT, "layers": 2, "width": 32, "heads": 4, "kv_heads": 4, "head_dim": 8}
    return ModelConfig(**{"family": "gpt2", "mlp_width": 128, **sizes, **CONFIGS[request.param]})


def operations(run: Callable[[], Any]) -> int:
    """Counted by torch: matrix products and attention; plain attention, for its counter does not know a CPU's fused."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_as_large_as_memory_says(config: ModelConfig, dtype: str) -> None:
    cache = KVCache(config, ROWS, CONTEXT, device="cpu", dtype=getattr(torch, dtype))
    held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    memory = inference_memory(config, dtype, CONTEXT, ROWS)
    assert memory.kv_cache == held
    assert memory.kv_cache_per_token * ROWS * CONTEXT == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_as_large_as_memory_says(config: ModelConfig, dtype: str) -> None:
    model = random_model(config, 0).to(getattr(torch, dtype))
    assert inference_memory(config, dtype, CONTEXT).weights == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_are_as_large_as_memory_says(config: ModelConfig, kind: Any, odd: bool) -> None:
    if odd:  # no width is a whole number of groups
        config = replace(config, width=40, head_dim=10, mlp_width=101, vocab_size=53)
    model = quantize_(random_model(config, 0).bfloat16(), kind)
    model.tie()
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert inference_memory(config, kind, CONTEXT).weights == held


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_keeps_what_memory_says(config: ModelConfig, optimizer: str) -> None:
    model = random_model(config, 0)
    optimizers = Optimizers(optimizer, model, 1e-3, 0.1)
    model(torch.zeros(1, CONTEXT, dtype=torch.long)).sum().backward()
    memory = training_memory(config, optimizer, "float32")
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    optimizers.step(1.0)
    assert memory.optimizer == sum(tensor.nbytes for _, _, tensor in optimizers.tensors() if tensor.dim())


@torch.no_grad()
def test_a_forward_pass_computes_what_flops_says(config: ModelConfig) -> None:
    """Torch multiplies whole patterns and masks half of them: every token as if it saw all, to the operation."""
    model, ids = random_model(config, 0), torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    flops = count_flops(config)
    assert operations(lambda: model(ids)) == ROWS * CONTEXT * flops.forward


@torch.no_grad()
def test_a_prompt_computes_what_flops_says_and_the_masked_half(config: ModelConfig) -> None:
    model, ids = random_model(config, 0), torch.zeros(1, CONTEXT, dtype=torch.long)
    cache = KVCache(config, 1, CONTEXT, device="cpu", dtype=torch.float32)
    flops = count_flops(config)
    masked = flops.attention(CONTEXT * (CONTEXT - 1) / 2)
    assert operations(lambda: model(ids, cache, last=torch.tensor([CONTEXT - 1]))) == flops.prefill + masked


@torch.no_grad()
def test_decoding_at_the_end_of_the_context_computes_what_flops_says(config: ModelConfig) -> None:
    model, ids = random_model(config, 0), torch.zeros(1, CONTEXT, dtype=torch.long)
    cache = KVCache(config, 1, CONTEXT, device="cpu", dtype=torch.float32)
    model(ids[:, :-1], cache)
    assert operations(lambda: model(ids[:, -1:], cache)) == count_flops(config).forward


def test_a_training_step_computes_three_times_as_much(config: ModelConfig) -> None:
    model, ids = random_model(config, 0), torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    assert operations(lambda: model(ids).sum().backward()) == ROWS * CONTEXT * flops_per_token(config)
