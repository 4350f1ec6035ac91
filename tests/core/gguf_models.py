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


def random_weights(config: ModelConfig, seed: int = 0) -> Transformer:
    model = random_model(config, seed).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(spread * 0.15 + float("norm.weight" in name))
    return model
