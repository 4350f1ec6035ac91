"""A model as llama.cpp keeps it: per family its architecture, the tensors of a GGUF and their place in our model.

What llama.cpp computes is fixed by the architecture's name, so a configuration that asks for anything else is refused,
axis by axis. Tensor names are those of the ``gguf`` package's tables (``BASES``), spelt out by whoever writes the file.

Sources: the GGUF specification and llama.cpp's model definitions (ggml-org/llama.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.spec.params import tensors


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes under one name.

    Attributes:
        name: as ``general.architecture`` has it.
        axes: the values (one, or several in a tuple) that it takes of a ModelConfig's fields.
        joined: our tensors that are one there, their rows in this order, and that one's base name.
        permuted: rotated pairs stand side by side in a head (as in Meta's files), not half a head apart.
        own_head: a tied unembedding has to be written once more.
        any_head_dim: the heads need not make up the width.
        partial_rope: the first numbers of a head may be rotated alone.
        rope_freqs: it takes the frequencies of Llama 3's scaling as a tensor.
        unrotated_step: every so manieth layer does not rotate.
    """

    name: str
    axes: Mapping[str, Any]
    joined: tuple[tuple[tuple[str, ...], str], ...] = ()
    permuted: bool = False
    own_head: bool = False
    any_head_dim: bool = False
    partial_rope: bool = False
    rope_freqs: bool = False
    unrotated_step: int | None = None


_PLAIN: dict[str, Any] = {
    "norm_first": True,
    "parallel": False,
    "norm_output": False,
    "qk_norm": "none",
    "position_offset": 0,
}
_BIASED = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
_BARE = dict.fromkeys(_BIASED, False)
# llama.cpp's GELU is the tanh form, looked up in half precision; it is what it computes for the exact one, too.
_GELU = {"norm": "layernorm", "gated": False, "activation": ("gelu_tanh", "gelu")}
_SWIGLU = {"position": "rope", "norm": "rmsnorm", "gated": True, "activation": "silu"}

_QKV = (("attention.query", "attention.key", "attention.value"), "ATTN_QKV")
_LLAMA = Architecture("llama", _PLAIN | _SWIGLU, permuted=True, any_head_dim=True, rope_freqs=True)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("gpt2", _PLAIN | _GELU | _BIASED | {"position": "learned"}, (_QKV,)),
    "gpt_neox": Architecture(
        "gptneox",
        _PLAIN | _GELU | _BIASED | {"position": "rope", "parallel": (True, False)},
        (_QKV,),
        own_head=True,
        partial_rope=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _PLAIN | _SWIGLU | _BARE | {"qkv_bias": (True, False)}, any_head_dim=True),
    "qwen3": Architecture("qwen3", _PLAIN | _SWIGLU | _BARE | {"qk_norm": "head"}, any_head_dim=True),
    "smollm3": Architecture("smollm3", _PLAIN | _SWIGLU, permuted=True, unrotated_step=4),
    "olmo2": Architecture("olmo2", _PLAIN | _SWIGLU | _BARE | {"norm_output": True, "qk_norm": "whole"}, own_head=True),
    "phi3": Architecture(
        "phi3",
        _PLAIN | _SWIGLU | _BARE,
        (_QKV, (("mlp.gate", "mlp.up"), "FFN_UP")),
        partial_rope=True,
    ),
}

# Our modules and their base names in the gguf package's tables (MODEL_TENSOR).
_BASES = {
    "embedding": "TOKEN_EMBD",
    "positions": "POS_EMBD",
    "norm": "OUTPUT_NORM",
    "unembedding": "OUTPUT",
    "attention_norm": "ATTN_NORM",
    "attention.query": "ATTN_Q",
    "attention.key": "ATTN_K",
    "attention.value": "ATTN_V",
    "attention.output": "ATTN_OUT",
    "attention.query_norm": "ATTN_Q_NORM",
    "attention.key_norm": "ATTN_K_NORM",
    "mlp_norm": "FFN_NORM",
    "mlp.gate": "FFN_GATE",
    "mlp.up": "FFN_UP",
    "mlp.down": "FFN_DOWN",
}
_BASES_NORM_OUTPUT = {"attention_norm": "ATTN_POST_NORM", "mlp_norm": "FFN_POST_NORM"}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        base: its base name in the gguf package's tables; ``layer`` and ``kind`` (weight, bias) complete it.
        parts: our tensors, whose rows follow one another in it.
        shape: as torch has it, ``[out, in]``.
        permuted_heads: in how many heads its rows are to be permuted, None for none.
        exact: kept in float32 whatever the file's type is: what is not multiplied with, a matrix of no block included.
    """

    base: str
    layer: int | None
    kind: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    permuted_heads: int | None = None
    exact: bool = False


@dataclass(frozen=True)
class GgufPlan:
    """What becomes of a configuration in a GGUF.

    Attributes:
        architecture: llama.cpp's.
        context: tokens; where a scaling is unknown there, only as many as need none.
        tensors: in the order of the file.
        rope_factors: what each rotated pair's frequency is divided by, as a tensor; () for none.
        scaling: of the positions, by llama.cpp's keys behind ``rope.scaling.``.
        notes: where llama.cpp computes something a little different, or less.
    """

    architecture: Architecture
    context: int
    tensors: tuple[GgufTensor, ...]
    rope_factors: tuple[float, ...] = ()
    scaling: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_gguf(config: ModelConfig) -> GgufPlan:
    """The file that llama.cpp reads as this model. Raises UnsupportedError that names what llama.cpp lacks."""
    architecture = ARCHITECTURES.get(config.family)
    if architecture is None:
        raise UnsupportedError(
            f"llama.cpp does not know the family {config.family}",
            f"export it with --to hf; to GGUF go {', '.join(ARCHITECTURES)}",
        )
    if lacking := list(_lacking(config, architecture)):
        raise UnsupportedError(
            f"llama.cpp's {architecture.name} does not compute what this model asks for: {'; '.join(lacking)}",
            "export it with --to hf",
        )
    context, factors, scaling, notes = _stretch(config)
    return GgufPlan(
        architecture,
        context,
        tuple(_tensors(config, architecture)),
        factors,
        scaling,
        (*notes, *_differences(config, context)),
    )


def _lacking(config: ModelConfig, architecture: Architecture) -> Iterator[str]:
    """What the configuration asks for and the architecture does not have, in words."""
    for axis, taken in architecture.axes.items():
        value = getattr(config, axis)
        if value not in (taken if isinstance(taken, tuple) else (taken,)):
            yield f"{axis} = {value!r}"
    if not architecture.any_head_dim and config.heads * config.head_dim != config.width:
        yield f"{config.heads} heads of {config.head_dim} in a width of {config.width}"
    if config.position == "rope":
        if config.rope_dim not in (None, config.head_dim) and not architecture.partial_rope:
            yield f"rotation of {config.rope_dim} of {config.head_dim} numbers a head"
        step = architecture.unrotated_step
        if config.unrotated != tuple(i for i in range(config.layers) if step and (i + 1) % step == 0):
            yield f"layers without rotation ({', '.join(map(str, config.unrotated)) or 'none'})"
    scaling = config.rope_scaling
    if scaling and scaling.kind == "llama3" and not architecture.rope_freqs:
        yield "scaling of positions as in Llama 3"
    if scaling and scaling.kind == "yarn" and not scaling.truncate:
        yield "YaRN scaling with ends that are no whole numbers"


def _differences(config: ModelConfig, context: int) -> Iterator[str]:
    if config.activation == "gelu":
        yield "llama.cpp computes the GELU in its tanh form, and the model has the exact one: logits differ a little"
    window = min((window for window in config.windows if window is not None), default=context)
    if window < context:
        yield f"llama.cpp has no sliding window here: behind more than {window:,} tokens it computes something else"


def _tensors(config: ModelConfig, architecture: Architecture) -> Iterator[GgufTensor]:
    shapes = {tensor.name: tensor.shape for tensor in tensors(config)}
    bases = _BASES | (_BASES_NORM_OUTPUT if config.norm_output else {})
    first = {names[0]: (names, base) for names, base in architecture.joined}
    later = {name for names, _ in architecture.joined for name in names[1:]}
    heads = {"attention.query": config.heads, "attention.key": config.kv_heads} if architecture.permuted else {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        layer = None
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            layer = int(number)
        if module in later:
            continue
        names, base = first.get(module) or ((module,), bases[module])
        owner = "" if layer is None else f"blocks.{layer}."
        parts = tuple(f"{owner}{each}.{kind}" for each in names)
        rows = sum(shapes[part][0] for part in parts)
        exact = len(shape) < 2 or module == "positions"
        yield GgufTensor(base, layer, kind, parts, (rows, *shape[1:]), heads.get(module), exact)
    if config.tied and architecture.own_head:
        yield GgufTensor("OUTPUT", None, "weight", ("embedding.weight",), shapes["embedding.weight"])


def _stretch(config: ModelConfig) -> tuple[int, tuple[float, ...], dict[str, Any], tuple[str, ...]]:
    """Context, rope factors, scaling keys and notes of a configuration."""
    scaling = config.rope_scaling
    if scaling is None or config.position != "rope":
        return config.context, (), {}, ()
    if scaling.kind == "dynamic":
        least = min(config.context, scaling.original_context)
        note = f"llama.cpp has no dynamic scaling of positions: the file's context is the {least:,} tokens without it"
        return least, (), {}, (note,)
    if scaling.kind == "llama3":
        return config.context, tuple(_llama3_factors(config, scaling)), {}, ()
    keys: dict[str, Any] = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        keys |= {
            "original_context_length": scaling.original_context,
            "yarn_beta_fast": scaling.beta_fast,
            "yarn_beta_slow": scaling.beta_slow,
        }
        usual = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0  # what llama.cpp scales by anyway
        if scaling.attention_factor is not None:
            keys["attn_factor"] = scaling.attention_factor / usual
    return config.context, (), keys, ()


def _llama3_factors(config: ModelConfig, scaling: RopeScaling) -> Iterator[float]:
    """What divides the frequency of each pair. Source: Meta's Llama 3.1, ``apply_scaling`` of its released code."""
    low = scaling.original_context / scaling.low_frequency_factor
    high = scaling.original_context / scaling.high_frequency_factor
    for pair in range(config.head_dim // 2):
        wavelength = 2 * math.pi * config.rope_theta ** (2 * pair / config.head_dim)
        if wavelength < high:
            yield 1.0
        elif wavelength > low:
            yield scaling.factor
        else:
            smooth = (scaling.original_context / wavelength - scaling.low_frequency_factor) / (
                scaling.high_frequency_factor - scaling.low_frequency_factor
            )
            yield 1 / ((1 - smooth) / scaling.factor + smooth)
