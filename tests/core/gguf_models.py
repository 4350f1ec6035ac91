"""Tiny random models in the shapes that llama.cpp knows, every parameter of a size that shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.spec.config import ModelConfig

_BARE: dict[str, Any] = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
GPT2 = ModelConfig(
    "gpt2", vocab_size=300, context=64, layers=2, width=64, heads=4, kv_heads=4, head_dim=16, mlp_width=96
)
LLAMA = replace(
    GPT2,
    family="llama",
    kv_heads=2,
    activation="silu",
    gated=True,
    norm="rmsnorm",
    position="rope",
    tied=False,
    **_BARE,
)
# A model of every family that llama.cpp knows, in a shape of its own.
FAMILIES: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "gpt_neox": replace(GPT2, family="gpt_neox", position="rope", rope_dim=4, parallel=True, tied=False),
    "llama": LLAMA,
    "mistral": replace(LLAMA, family="mistral", head_dim=32, windows=(64, 64)),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True, tied=True),
    "qwen3": replace(LLAMA, family="qwen3", head_dim=32, qk_norm="head"),
    "smollm3": replace(LLAMA, family="smollm3", layers=5, unrotated=(3,), tied=True),
    "olmo2": replace(LLAMA, family="olmo2", norm_output=True, qk_norm="whole"),
    "phi3": replace(LLAMA, family="phi3", rope_dim=8),
}


def random_weights(config: ModelConfig, seed: int = 0) -> Transformer:
    model = random_model(config, seed).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(spread * 0.15 + float("norm.weight" in name))
    return model
