"""Published models on paper: one Hugging Face ``config.json`` each.

GPT-1: Radford et al. 2018. GPT-2: Radford et al. 2019 and the released files. GPT-3: Brown et al. 2020, table 2.1, with
attention as wide as the model (XL: 16 heads of 128; 13B: width 5,120), context 2,048, tied embeddings. The others are
the files that their makers put on the Hub: EleutherAI (Pythia), Meta (OPT, Llama), TinyLlama, Mistral AI (v0.1), Qwen,
Hugging Face (SmolLM), AI2 (OLMo), Microsoft (Phi-3, 4k).
"""

from __future__ import annotations

from pathlib import Path

from gptcli.errors import NotFoundError
from gptcli.spec.config import ModelConfig, read_config

_FOLDER = Path(__file__).parent

# Each series from small to large, as lists show them.
NAMES = (
    "gpt1",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "gpt3-small",
    "gpt3-medium",
    "gpt3-large",
    "gpt3-xl",
    "gpt3-2.7b",
    "gpt3-6.7b",
    "gpt3-13b",
    "gpt3",
    "pythia-160m",
    "pythia-1.4b",
    "pythia-6.9b",
    "opt-125m",
    "opt-1.3b",
    "tinyllama-1.1b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-8b",
    "smollm2-135m",
    "smollm2-1.7b",
    "olmo-2-7b",
    "phi-3-mini",
)


def read_preset(name: str) -> ModelConfig:
    """The configuration of a preset. Raises NotFoundError that lists the names."""
    if name not in NAMES:
        raise NotFoundError(f"there is no preset {name!r}", f"use {', '.join(NAMES)}")
    return read_config(_FOLDER / f"{name}.json")
