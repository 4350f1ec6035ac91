"""GPT-NeoX and Pythia. Black et al. 2022; Biderman et al. 2023."""

from __future__ import annotations

from typing import Any

from gptcli.spec.axes import ModelConfig
from gptcli.spec.families.rope import first_context, rope_axes, rotated_part, scaling_table, write_rope
from gptcli.spec.keys import ACTIVATION_NAMES, Keys, divide, read_common, write_common


def read_neox(keys: Keys) -> ModelConfig:
    """The axes of a GPT-NeoX: attention and MLP side by side, a part of each head rotated."""
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    head_dim = divide(width, heads, keys.where)
    table = scaling_table(keys)
    # The base and the part have names of their own; new files keep both in the table.
    base, part = keys.number("rotary_emb_base|rope_theta", 10_000.0), keys.number("rotary_pct", 0.25)
    if table:
        base, part = table.number("rope_theta", base), table.number("partial_rotary_factor", part)
    bias = keys.flag("attention_bias", True)
    return ModelConfig(
        family="gpt_neox",
        layers=keys.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=keys.integer("intermediate_size"),
        activation=keys.activation("hidden_act", "gelu"),
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        parallel=keys.flag("use_parallel_residual", True),
        qkv_bias=bias,
        output_bias=bias,
        **rope_axes(keys, table, keys.integer("max_position_embeddings", 2048), head_dim, base, part),
        **read_common(keys, tied=False, bos=0, eos=2),
    )


def write_neox(config: ModelConfig) -> dict[str, Any]:
    """The keys of a GPT-NeoX."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": first_context(config),
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "attention_bias": config.qkv_bias,
        "rotary_pct": rotated_part(config),
        "rotary_emb_base": config.rope_theta,
        "rope_scaling": write_rope(config)["rope_scaling"],
        "tie_word_embeddings": config.tied,
        **write_common(config, null=True),
    }
