"""Per family: our tensor names, the names on disk, and the operation between them; data only.

A rule joins the rows of our tensors (query above key above value) into one tensor on disk, transposed if the family
keeps its matrices as ``[in, out]`` (GPT-2's Conv1D). ``{i}`` runs over the layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    disk: str
    ours: tuple[str, ...]
    transpose: bool = False


@dataclass(frozen=True)
class Family:
    """The name table of one family.

    ``prefix`` stands before every name but the unembedding's in what we write, and may be missing in what we read;
    ``ignored`` matches buffers that old files carry and nobody needs.
    """

    rules: tuple[Rule, ...]
    prefix: str = ""
    ignored: re.Pattern[str] = field(default=re.compile(r"(?!)"))


def _both(disk: str, *ours: str, transpose: bool = False) -> tuple[Rule, Rule]:
    """The weight and the bias of one layer under the same names; only a matrix is transposed."""
    return (
        Rule(f"{disk}.weight", tuple(f"{name}.weight" for name in ours), transpose),
        Rule(f"{disk}.bias", tuple(f"{name}.bias" for name in ours)),
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
}

# The names of an unembedding: outside the prefix, and left out of the file when tied.
HEADS = frozenset({"lm_head.weight"})
