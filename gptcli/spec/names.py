"""Per family: our tensor names, the names on disk, and the operation between them; data only.

A rule joins the rows of our tensors (query above key above value) into one tensor on disk: all of the first above all
of the second, or by turns, so many rows of each (GPT-NeoX); transposed if the family keeps its matrices as
``[in, out]`` (GPT-2's Conv1D). ``{i}`` runs over the layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    disk: str
    ours: tuple[str, ...]
    transpose: bool = False
    by_head: bool = False  # by turns: a head's rows of the first, of the second, ..., then the next head's


@dataclass(frozen=True)
class Family:
    """The name table of one family.

    ``prefix`` stands before every name but the unembedding's in what we write, and may be missing in what we read;
    ``ignored`` matches buffers that old files carry and nobody needs.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: re.Pattern[str] = field(default=re.compile(r"(?!)"))


def _both(disk: str, *ours: str, transpose: bool = False, by_head: bool = False) -> tuple[Rule, Rule]:
    """The weight and the bias of one layer under the same names; only a matrix is transposed."""
    return (
        Rule(f"{disk}.weight", tuple(f"{name}.weight" for name in ours), transpose, by_head),
        Rule(f"{disk}.bias", tuple(f"{name}.bias" for name in ours), by_head=by_head),
    )


_ATTENTION = tuple(f"blocks.{{i}}.attention.{name}" for name in ("query", "key", "value"))

_GPT_BLOCK = (
    *_both("h.{i}.ln_1", "blocks.{i}.attention_norm"),
    *_both("h.{i}.attn.c_attn", *_ATTENTION, transpose=True),
    *_both("h.{i}.attn.c_proj", "blocks.{i}.attention.output", transpose=True),
    *_both("h.{i}.ln_2", "blocks.{i}.mlp_norm"),
    *_both("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up", transpose=True),
    *_both("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down", transpose=True),
)

# A rule whose tensors a model does not have (biases, norms of query and key) is left out.
_LLAMA_ATTENTION = (
    *_both("layers.{i}.self_attn.q_proj", "blocks.{i}.attention.query"),
    *_both("layers.{i}.self_attn.k_proj", "blocks.{i}.attention.key"),
    *_both("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.value"),
    *_both("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.output"),
    Rule("layers.{i}.self_attn.q_norm.weight", ("blocks.{i}.attention.query_norm.weight",)),
    Rule("layers.{i}.self_attn.k_norm.weight", ("blocks.{i}.attention.key_norm.weight",)),
)
_LLAMA_MLP = (
    *_both("layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate"),
    *_both("layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up"),
    *_both("layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down"),
)


def _llama(attention_norm: str, mlp_norm: str, attention: tuple[Rule, ...], mlp: tuple[Rule, ...]) -> Family:
    return Family(
        rules=(
            Rule("embed_tokens.weight", ("embedding.weight",)),
            Rule(f"layers.{{i}}.{attention_norm}.weight", ("blocks.{i}.attention_norm.weight",)),
            *attention,
            Rule(f"layers.{{i}}.{mlp_norm}.weight", ("blocks.{i}.mlp_norm.weight",)),
            *mlp,
            Rule("norm.weight", ("norm.weight",)),
            Rule("lm_head.weight", ("unembedding.weight",)),
        ),
        prefix="model.",
        ignored=re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    )


_LLAMA = _llama("input_layernorm", "post_attention_layernorm", _LLAMA_ATTENTION, _LLAMA_MLP)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        rules=(
            Rule("wte.weight", ("embedding.weight",)),
            Rule("wpe.weight", ("positions.weight",)),
            *_GPT_BLOCK,
            *_both("ln_f", "norm"),
            Rule("lm_head.weight", ("unembedding.weight",)),
        ),
        prefix="transformer.",
        ignored=re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),
    ),
    "openai-gpt": Family(
        rules=(
            Rule("tokens_embed.weight", ("embedding.weight",)),
            Rule("positions_embed.weight", ("positions.weight",)),
            *_GPT_BLOCK,
        ),
        prefix="transformer.",
        ignored=re.compile(r"h\.\d+\.attn\.bias|position_ids"),
    ),
    "gpt_neox": Family(
        rules=(
            Rule("embed_in.weight", ("embedding.weight",)),
            *_both("layers.{i}.input_layernorm", "blocks.{i}.attention_norm"),
            *_both("layers.{i}.attention.query_key_value", *_ATTENTION, by_head=True),
            *_both("layers.{i}.attention.dense", "blocks.{i}.attention.output"),
            *_both("layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm"),
            *_both("layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.mlp.up"),
            *_both("layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.mlp.down"),
            *_both("final_layer_norm", "norm"),
            Rule("embed_out.weight", ("unembedding.weight",)),
        ),
        prefix="gpt_neox.",
        ignored=re.compile(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
    ),
    "opt": Family(
        rules=(
            Rule("decoder.embed_tokens.weight", ("embedding.weight",)),
            Rule("decoder.embed_positions.weight", ("positions.weight",)),
            *_both("decoder.layers.{i}.self_attn_layer_norm", "blocks.{i}.attention_norm"),
            *_both("decoder.layers.{i}.self_attn.q_proj", "blocks.{i}.attention.query"),
            *_both("decoder.layers.{i}.self_attn.k_proj", "blocks.{i}.attention.key"),
            *_both("decoder.layers.{i}.self_attn.v_proj", "blocks.{i}.attention.value"),
            *_both("decoder.layers.{i}.self_attn.out_proj", "blocks.{i}.attention.output"),
            *_both("decoder.layers.{i}.final_layer_norm", "blocks.{i}.mlp_norm"),
            *_both("decoder.layers.{i}.fc1", "blocks.{i}.mlp.up"),
            *_both("decoder.layers.{i}.fc2", "blocks.{i}.mlp.down"),
            *_both("decoder.final_layer_norm", "norm"),
            Rule("lm_head.weight", ("unembedding.weight",)),
        ),
        prefix="model.",
        ignored=re.compile(r"decoder\.version"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": _llama("post_attention_layernorm", "post_feedforward_layernorm", _LLAMA_ATTENTION, _LLAMA_MLP),
    "phi3": _llama(
        "input_layernorm",
        "post_attention_layernorm",
        (
            Rule("layers.{i}.self_attn.qkv_proj.weight", tuple(f"{name}.weight" for name in _ATTENTION)),
            Rule("layers.{i}.self_attn.o_proj.weight", ("blocks.{i}.attention.output.weight",)),
        ),
        (
            Rule("layers.{i}.mlp.gate_up_proj.weight", ("blocks.{i}.mlp.gate.weight", "blocks.{i}.mlp.up.weight")),
            Rule("layers.{i}.mlp.down_proj.weight", ("blocks.{i}.mlp.down.weight",)),
        ),
    ),
}

# The names of an unembedding: outside the prefix, and left out of the file when tied.
HEADS = frozenset({"lm_head.weight", "embed_out.weight"})
