"""OPT, but for the 350M one. Zhang et al. 2022."""

from __future__ import annotations

from typing import Any

from gptcli.errors import UnsupportedError
from gptcli.spec.axes import ModelConfig
from gptcli.spec.keys import ACTIVATION_NAMES, Keys, divide, read_common, write_common

# The first rows of its position table belong to the padding that it was trained with.
_OFFSET = 2


def read_opt(keys: Keys) -> ModelConfig:
    """The axes of an OPT: GPT-2's, a ReLU, and a position table that begins later.

    Raises UnsupportedError for OPT-350M, which norms after each layer and projects its embeddings.
    """
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    needs = {
        "do_layer_norm_before = false needs norms of the sum after each layer": not keys.flag(
            "do_layer_norm_before", True
        ),
        "word_embed_proj_dim needs embeddings projected to the model's width": width
        != keys.integer("word_embed_proj_dim", width),
        "_remove_final_layer_norm needs a model without a last norm": keys.flag("_remove_final_layer_norm", False),
        "layer_norm_elementwise_affine = false needs norms without weights": not keys.flag(
            "layer_norm_elementwise_affine", True
        ),
    }
    for what, asked in needs.items():
        if asked:
            raise UnsupportedError(f"{keys.where}: {what}: not here", "the other sizes of OPT are read")
    bias = keys.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        context=keys.integer("max_position_embeddings", 2048),
        layers=keys.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=divide(width, heads, keys.where),
        mlp_width=keys.integer("ffn_dim"),
        activation=keys.activation("activation_function", "relu"),
        position_offset=_OFFSET,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        **read_common(keys, tied=True, bos=2, eos=2),
    )


def write_opt(config: ModelConfig) -> dict[str, Any]:
    """The keys of an OPT."""
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "word_embed_proj_dim": config.width,
        "ffn_dim": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.context,
        "do_layer_norm_before": True,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tied,
        # Trained without dropout; stated, or transformers fine-tunes with its default of 0.1.
        "dropout": 0.0,
        **write_common(config, null=True),
    }
