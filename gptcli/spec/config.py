"""ModelConfig: the axes on which models differ, and Hugging Face's ``config.json`` read and written, both ways.

A family (GPT-2, ...) is a reader and a writer between its key names and the axes. A key that changes the forward pass
and has no axis here is refused by name; every other key is left alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gptcli.errors import CorruptError, NotFoundError, UnsupportedError

Activation = Literal["gelu_tanh", "gelu", "relu", "silu"]
DTYPES = ("float32", "bfloat16", "float16")

# Above these a configuration is a typing error or an attack, not a model.
_MOST_LAYERS = 10_000
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched to a context longer than the one they were first trained on.

    ``linear`` divides every position by ``factor``; ``dynamic`` raises the base as the text outgrows
    ``original_context``; ``llama3`` slows the slow frequencies by ``factor`` and leaves the fast ones, with a ramp
    between; ``yarn`` (Peng et al. 2023) does so by the number of turns, and scales what is rotated.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_context: int
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original_context over this are slowed
    high_frequency_factor: float = 4.0  # llama3: those below original_context over this are left
    beta_fast: float = 32.0  # yarn: turns within original_context from which a frequency is left
    beta_slow: float = 1.0  # yarn: turns up to which it is slowed
    attention_factor: float | None = None  # yarn: what rotated queries and keys are scaled by; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the ends of the ramp are whole numbers


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer on paper. Sizes are counts; see the shape legend in ``core/model.py``."""

    family: str
    vocab_size: int  # V
    context: int  # most positions the model was made for
    layers: int  # L
    width: int  # C
    heads: int  # H
    kv_heads: int  # K; fewer than heads is grouped-query attention
    head_dim: int  # D
    mlp_width: int  # F
    activation: Activation = "gelu_tanh"
    gated: bool = False  # SwiGLU-like: a gate beside the up-projection
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    norm_first: bool = True  # pre-norm with a final norm (GPT-2); False is GPT-1's post-norm without one
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    rope_dim: int | None = None  # numbers of each head that are rotated, the first; None: all
    rope_scaling: RopeScaling | None = None
    unrotated: tuple[int, ...] = ()  # layers that do not rotate (SmolLM3)
    position_offset: int = 0  # rows of the position table before the first position (OPT)
    parallel: bool = False  # attention and MLP read the stream side by side (GPT-NeoX)
    norm_output: bool = False  # norms of what a layer made, before it is added, instead of what it reads (OLMo 2)
    qk_norm: Literal["none", "head", "whole"] = "none"  # RMS norm of query and key: each head, or all heads as one
    windows: tuple[int | None, ...] = ()  # a layer: how many tokens a query sees, itself the last; (): all
    qkv_bias: bool = True
    output_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True  # the unembedding is the embedding, transposed
    dtype: str | None = None  # as the file declares it
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "width", "heads", "kv_heads", "head_dim", "mlp_width"):
            value = getattr(self, name)
            if not 1 <= value <= (_MOST_LAYERS if name == "layers" else _LARGEST_SIZE):
                raise CorruptError(f"the configuration's {name} is {value}", "check config.json")
        if self.heads % self.kv_heads:
            message = f"{self.heads} heads can't share {self.kv_heads} key-value heads evenly"
            raise CorruptError(message, "check config.json")

    def to_dict(self) -> dict[str, Any]:
        """The axes by our names, for JSON output."""
        return {**asdict(self), "eos_ids": list(self.eos_ids)}


def read_config(path: Path) -> ModelConfig:
    """The configuration in ``path``, a ``config.json`` or a folder that holds one.

    Raises NotFoundError without a file, CorruptError when it can't be read, UnsupportedError when it asks for
    something that changes the forward pass and is not here.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}", "a model folder holds config.json and model.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{file} can't be read as JSON: {error}", "download or save the model again") from None
    if not isinstance(raw, dict):
        raise CorruptError(f"{file} holds {type(raw).__name__}, not an object", "download or save the model again")
    config = from_hf(raw, str(file))
    return _with_ends(config, path / "generation_config.json") if path.is_dir() else config


def _with_ends(config: ModelConfig, file: Path) -> ModelConfig:
    """The configuration with the end tokens that ``generation_config.json`` names, which count before its own.

    What talks ends its answer with another token than a text's, and only this file knows it of some models.
    """
    try:
        raw = json.loads(file.read_bytes())
        named = raw.get("eos_token_id")
    except FileNotFoundError:
        return config
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise CorruptError(f"{file} can't be read: {error}", "download or save the model again") from None
    ends = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(id_) is int and id_ >= 0 for id_ in ends):
        raise CorruptError(f"{file} has eos_token_id = {named!r}", "it should be a token's id, or a list of them")
    return replace(config, eos_ids=tuple(ends)) if ends else config


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """A ModelConfig from the keys of a Hugging Face ``config.json``; ``where`` names the file in errors."""
    keys = _Keys(raw, where)
    family = keys.text("model_type", "")
    if family not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        what = f"is of the family {family!r}" if family else "names no model_type"
        raise UnsupportedError(f"{where} {what}, which gptcli does not read", f"it reads: {known}")
    return _FAMILIES[family][0](keys)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of a ``config.json`` that ``transformers`` reads back as the same model."""
    return _FAMILIES[config.family][1](config)


class _Keys:
    """Typed look-ups in a config.json whose errors name the key and the file."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def _typed(self, names: str, kinds: tuple[type, ...], default: Any) -> Any:
        """The first of the names (old and new spellings, separated by ``|``) that is there and not null."""
        for name in names.split("|"):
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
                return value
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CorruptError(f"{self.where}: {name} is {value!r}, not {wanted}", "check the file")
        if default is ...:
            raise CorruptError(f"{self.where}: {names.split('|')[0]} is missing", "check the file")
        return default

    def integer(self, names: str, default: Any = ...) -> Any:
        return self._typed(names, (int,), default)

    def number(self, names: str, default: float) -> float:
        value = self._typed(names, (int, float), default)
        if not 0 <= value < math.inf or value > sys.float_info.max:
            raise CorruptError(f"{self.where}: {names.split('|')[0]} is out of range", "check the file")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._typed(name, (bool,), default))

    def text(self, names: str, default: str | None) -> Any:
        return self._typed(names, (str,), default)

    def ids(self, name: str) -> tuple[int, ...]:
        value = self._typed(name, (int, list), None)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(type(id_) is not int for id_ in ids):
            raise CorruptError(f"{self.where}: {name} is {value!r}, not a list of ids", "check the file")
        return ids

    def activation(self, names: str, default: str) -> Activation:
        name = self.text(names, default)
        if name not in _ACTIVATIONS:
            raise UnsupportedError(f"{self.where}: the activation {name!r} is not here", "open an issue with the model")
        return _ACTIVATIONS[name]

    def refuse_unless(self, name: str, value: Any) -> None:
        """Refuse a key that changes the forward pass when it has any value but the one we compute with."""
        if name in self.raw and self.raw[name] not in (value, None):
            message = f"{self.where}: {name} = {self.raw[name]!r} changes the forward pass and is not here"
            raise UnsupportedError(message, "open an issue with the model")


_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def _read_gpt2(keys: _Keys) -> ModelConfig:
    keys.refuse_unless("scale_attn_weights", True)
    keys.refuse_unless("scale_attn_by_inverse_layer_idx", False)
    keys.refuse_unless("add_cross_attention", False)
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    return ModelConfig(
        family="gpt2",
        vocab_size=keys.integer("vocab_size"),
        context=keys.integer("n_positions|n_ctx"),
        layers=keys.integer("n_layer"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=_divide(width, heads, keys.where),
        mlp_width=keys.integer("n_inner", 4 * width),
        activation=keys.activation("activation_function", "gelu_new"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        tied=keys.flag("tie_word_embeddings", True),
        dtype=_dtype(keys),
        bos_id=keys.integer("bos_token_id", None),
        eos_ids=keys.ids("eos_token_id"),
    )


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None if config.mlp_width == 4 * config.width else config.mlp_width,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        # Trained without dropout; stated, or transformers fine-tunes with its default of 0.1.
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **_write_common(config),
    }


def _read_gpt1(keys: _Keys) -> ModelConfig:
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
        head_dim=_divide(width, heads, keys.where),
        mlp_width=4 * width,
        # What the openai-gpt files call "gelu" is the tanh form.
        activation="gelu_tanh" if keys.text("afn", "gelu") == "gelu" else keys.activation("afn", "gelu"),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        norm_first=False,
        tied=True,
        dtype=_dtype(keys),
    )


def _write_gpt1(config: ModelConfig) -> dict[str, Any]:
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
        **_write_common(config),
    }


def _write_common(config: ModelConfig) -> dict[str, Any]:
    common: dict[str, Any] = {}
    if config.bos_id is not None:
        common["bos_token_id"] = config.bos_id
    if config.eos_ids:
        common["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)
    if config.dtype:
        # Older transformers read torch_dtype, newer ones both.
        common["torch_dtype"] = config.dtype
    return common


def _dtype(keys: _Keys) -> str | None:
    name = keys.text("dtype|torch_dtype", None)
    return None if name is None else name.removeprefix("torch.")


def _divide(width: int, heads: int, where: str) -> int:
    if heads < 1 or width % heads:
        raise CorruptError(f"{where}: a width of {width} does not divide into {heads} heads", "check the file")
    return width // heads


_FAMILIES: dict[str, tuple[Callable[[_Keys], ModelConfig], Callable[[ModelConfig], dict[str, Any]]]] = {
    "gpt2": (_read_gpt2, _write_gpt2),
    "openai-gpt": (_read_gpt1, _write_gpt1),
}
