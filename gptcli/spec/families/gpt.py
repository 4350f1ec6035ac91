"""GPT-2 (and DistilGPT-2, Cerebras-GPT, any width) and GPT-1. Radford et al. 2018 and 2019; Dey et al. 2023."""

from __future__ import annotations

from typing import Any

from gptcli.spec.axes import ModelConfig
from gptcli.spec.keys import ACTIVATION_NAMES, Keys, divide, read_common, read_dtype, write_common


def read_gpt2(keys: Keys) -> ModelConfig:
    """The axes of a GPT-2."""
    keys.refuse_unless("scale_attn_weights", True)
    keys.refuse_unless("scale_attn_by_inverse_layer_idx", False)
    keys.refuse_unless("add_cross_attention", False)
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    return ModelConfig(
        family="gpt2",
        context=keys.integer("n_positions|n_ctx"),
        layers=keys.integer("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(width, heads, keys.where),
        mlp_width=keys.integer("n_inner", 4 * width),
        activation=keys.activation("activation_function", "gelu_new"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        **read_common(keys, tied=True),
    )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """The keys of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None if config.mlp_width == 4 * config.width else config.mlp_width,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # Trained without dropout; stated, or transformers fine-tunes with its default of 0.1.
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **write_common(config),
    }


def read_gpt1(keys: Keys) -> ModelConfig:
    """The axes of a GPT-1."""
    keys.refuse_unless("tie_word_embeddings", True)
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    return ModelConfig(
        family="openai-gpt",
        vocab_size=keys.integer("vocab_size"),
        context=keys.integer("n_positions|n_ctx"),
        layers=keys.integer("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(width, heads, keys.where),
        mlp_width=4 * width,
        # What the openai-gpt files call "gelu" is the tanh form.
        activation="gelu_tanh" if keys.text("afn", "gelu") == "gelu" else keys.activation("afn", "gelu"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        norm_first=False,
        tied=True,
        dtype=read_dtype(keys),
    )


def write_gpt1(config: ModelConfig) -> dict[str, Any]:
    """The keys of a GPT-1."""
    return {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "model_type": "openai-gpt",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "afn": "gelu" if config.activation == "gelu_tanh" else config.activation,
        "layer_norm_epsilon": config.norm_eps,
        **write_common(config),
    }
