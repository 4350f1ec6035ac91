"""Rotary positions in a config.json: the base, the part of each head, and how they are stretched to a longer context.

Old files spell ``rope_theta`` and ``rope_scaling``, new ones put both into ``rope_parameters``; what is written is the
old spelling, which every transformers reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.spec.axes import ModelConfig, RopeScaling
from gptcli.spec.keys import Keys

Rope = dict[str, Any]

_TABLES = ("rope_scaling", "rope_parameters")
_HINT = "gptcli reads linear, dynamic, llama3 and yarn; open an issue with the model"
# What else the tables of scalings may hold, and what of it would change the angles.
_MISSING = {
    "longrope": "a factor for each pair of dimensions, one set for short texts and one for long",
    "su": "a factor for each pair of dimensions, one set for short texts and one for long",
    "mrope": "positions of three axes, for images",
    "proportional": "frequencies of which a part is zero",
    "axial": "positions of several axes, for images",
}


def read_rope(
    keys: Keys, context: int, head_dim: int, *, theta: float = 10_000.0, partial: bool = False, scalings: bool = True
) -> Rope:
    """The rotary axes of a family whose keys for them are the common ones.

    ``theta`` is the base where the file gives none. A family that is not ``partial`` rotates all of each head, one
    without ``scalings`` has none that we read. Raises UnsupportedError that names a scaling which is not here and what
    it needs, CorruptError for one that is not whole.
    """
    table = scaling_table(keys)
    base = table.number("rope_theta", keys.number("rope_theta", theta)) if table else keys.number("rope_theta", theta)
    for place in (table, keys) if table and not partial else (keys,) if not partial else ():
        place.refuse_unless("partial_rotary_factor", 1.0)
    part = keys.number("partial_rotary_factor", 1.0)
    part = table.number("partial_rotary_factor", part) if table else part
    return rope_axes(keys, table, context, head_dim, base, part, scalings)


def scaling_table(keys: Keys) -> Keys | None:
    """What the file says of scaling, in its old spelling or its new one."""
    table = next((found for name in _TABLES if (found := keys.table(name)) and found.raw), None)
    if table and any(isinstance(value, Mapping) for value in table.raw.values()):
        message = f"{keys.where}: rotary positions that differ between kinds of layers are not here"
        raise UnsupportedError(message, "open an issue with the model")
    return table


def rope_axes(
    keys: Keys, table: Keys | None, context: int, head_dim: int, base: float, part: float, scalings: bool = True
) -> Rope:
    """The rotary axes, with the ``context`` that they reach; ``part`` of each head is rotated.

    Raises as ``read_rope`` does.
    """
    rotated = int(head_dim * part)
    if not 2 <= rotated <= head_dim or rotated % 2:
        message = f"{keys.where}: {rotated} of the {head_dim} numbers of each head would be rotated"
        raise CorruptError(message, "it has to be an even number of them; check the file")
    if base <= 0:
        raise CorruptError(f"{keys.where}: rope_theta is out of range", "check the file")
    scaling = read_scaling(table, keys, context, scalings) if table else None
    if scaling and ((scaling.kind == "dynamic" and rotated == 2) or (scaling.kind == "yarn" and base <= 1)):
        what = "a rope_theta above 1" if scaling.kind == "yarn" else "more than two numbers of each head to rotate"
        raise CorruptError(f"{keys.where}: a {scaling.kind} scaling of rotary positions takes {what}", "check the file")
    # Only beyond the first context does "dynamic" do anything; files give the first as their context.
    if scaling and scaling.kind == "dynamic":
        context = math.floor(context * scaling.factor)
    return {
        "position": "rope",
        "context": context,
        "rope_theta": base,
        "rope_dim": None if rotated == head_dim else rotated,
        "rope_scaling": scaling,
    }


def read_scaling(table: Keys, keys: Keys, context: int, scalings: bool) -> RopeScaling | None:
    """The scaling of a table; None where it is the plain one. Raises as ``read_rope`` does."""
    kind = table.text("rope_type|type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn") or not scalings:
        # Phi-3 calls long RoPE by three names.
        what = _MISSING.get(kind if scalings else "longrope", "that scaling")
        raise UnsupportedError(f"{keys.where}: rotary positions scaled by {kind!r} need {what}: not here", _HINT)
    if kind == "dynamic":
        table.refuse_unless("alpha", 1.0)  # Hunyuan's
    first = table.integer("original_max_position_embeddings", keys.integer("original_max_position_embeddings", context))
    stated = kind != "yarn" or first < 1 or table.raw.get("factor") is not None
    factor = needed(table, "factor") if stated else context / first
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor,
            first,
            low_frequency_factor=needed(table, "low_freq_factor"),
            high_frequency_factor=needed(table, "high_freq_factor"),
        )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            factor,
            first,
            beta_fast=table.number("beta_fast", 0.0) or 32.0,
            beta_slow=table.number("beta_slow", 0.0) or 1.0,
            attention_factor=_attention_factor(table, factor),
            truncate=table.flag("truncate", True),
        )
    return RopeScaling("linear" if kind == "linear" else "dynamic", factor, context)


def needed(table: Keys, name: str) -> float:
    """A number that has to be there."""
    if table.raw.get(name) is None:
        raise CorruptError(f"{table.where}: {name} is missing", "check the file")
    return table.number(name, 0.0)


def _attention_factor(table: Keys, factor: float) -> float | None:
    """What rotated queries and keys are scaled by, where the file does not leave it to the rule of the paper."""
    if table.raw.get("attention_factor") is not None:
        return table.number("attention_factor", 1.0)
    over, under = table.number("mscale", 0.0), table.number("mscale_all_dim", 0.0)
    if not (over and under):
        return None

    def scaled(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return scaled(over) / scaled(under)


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of the rotary axes and of the context that they reach."""
    scaling = config.rope_scaling
    keys: dict[str, Any] = {
        "max_position_embeddings": first_context(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else write_scaling(scaling),
    }
    if config.rope_dim is not None:
        keys["partial_rotary_factor"] = rotated_part(config)
    return keys


def first_context(config: ModelConfig) -> int:
    """What a file gives as the context."""
    scaling = config.rope_scaling
    return scaling.original_context if scaling and scaling.kind == "dynamic" else config.context


def rotated_part(config: ModelConfig) -> float:
    """The part of each head that is rotated, such that it is read back as so many numbers."""
    if config.rope_dim is None:
        return 1.0
    part = config.rope_dim / config.head_dim
    return part if int(config.head_dim * part) == config.rope_dim else math.nextafter(part, 1.0)


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """The table of a scaling."""
    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        table["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        table["low_freq_factor"] = scaling.low_frequency_factor
        table["high_freq_factor"] = scaling.high_frequency_factor
    if scaling.kind == "yarn":
        table["beta_fast"] = scaling.beta_fast
        table["beta_slow"] = scaling.beta_slow
        table["truncate"] = scaling.truncate
        if scaling.attention_factor is not None:
            table["attention_factor"] = scaling.attention_factor
    return table
