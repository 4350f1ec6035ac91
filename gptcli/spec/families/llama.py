"""Llama and those who took its layout: Mistral, Qwen 2 and 3, SmolLM 3, OLMo 2, Phi-3.

RMS norms, rotary positions, a gated MLP, fewer key-value heads than heads; they differ in biases, norms of queries and
keys, windows, and what is left unrotated. Defaults are those of their classes in transformers.
"""

from __future__ import annotations

from typing import Any

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.spec.axes import ModelConfig
from gptcli.spec.families.rope import read_rope, write_rope
from gptcli.spec.keys import ACTIVATION_NAMES, Keys, divide, read_common, write_common

_WINDOWED, _FULL = "sliding_attention", "full_attention"


def read_llama(keys: Keys) -> ModelConfig:
    """The axes of a Llama (1, 2, 3.x; TinyLlama, SmolLM 1 and 2, Yi, ...). Touvron et al. 2023."""
    return _read(
        keys,
        "llama",
        context=2048,
        ids=(1, 2),
        rope={},
        **_bias(keys),
        mlp_bias=keys.flag("mlp_bias", False),
    )


def read_mistral(keys: Keys) -> ModelConfig:
    """The axes of a Mistral: every layer sees so many tokens back. Jiang et al. 2023."""
    keys.refuse_unless("attention_bias", False)
    window = keys.integer_or_null("sliding_window", 4096, None)
    return _read(
        keys,
        "mistral",
        context=131_072,
        kv_heads=8,
        ids=(1, 2),
        rope={},
        windows=_every_layer(keys, window),
    )


def read_qwen2(keys: Keys) -> ModelConfig:
    """The axes of a Qwen 2 or 2.5: biases of query, key and value alone; layers after some may have a window."""
    return _read(
        keys,
        "qwen2",
        context=32_768,
        kv_heads=32,
        rope={},
        windows=_upper_layers(keys),
        qkv_bias=True,
    )


def read_qwen3(keys: Keys) -> ModelConfig:
    """The axes of a Qwen 3: each head's query and key are normed before they rotate."""
    return _read(
        keys,
        "qwen3",
        context=32_768,
        kv_heads=32,
        head_dim=128,
        rope={},
        windows=_upper_layers(keys),
        qk_norm="head",
        **_bias(keys),
    )


def read_smollm3(keys: Keys) -> ModelConfig:
    """The axes of a SmolLM 3: every fourth layer, or those listed, do not rotate."""
    layers = keys.integer("num_hidden_layers")
    interval = keys.integer("no_rope_layer_interval", 4)
    rotating = keys.items("no_rope_layers")
    if rotating is None:
        if interval < 1:
            raise CorruptError(f"{keys.where}: no_rope_layer_interval is {interval}", "check the file")
        rotating = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(rotating) < layers or any(value not in (0, 1) for value in rotating):
        raise CorruptError(
            f"{keys.where}: no_rope_layers is not a 0 or 1 for each of {layers} layers", "check the file"
        )
    unrotated = tuple(layer for layer in range(layers) if not rotating[layer])
    window = keys.integer("sliding_window", None) if keys.flag("use_sliding_window", False) else None
    return _read(
        keys,
        "smollm3",
        context=32_768,
        kv_heads=4,
        tied=True,
        ids=(128_000, 128_001),
        rope={"theta": 2_000_000.0},
        windows=_windows(keys, window, [_WINDOWED if layer in unrotated else _FULL for layer in range(layers)]),
        unrotated=unrotated,
        **_bias(keys),
        mlp_bias=keys.flag("mlp_bias", False),
    )


def read_olmo2(keys: Keys) -> ModelConfig:
    """The axes of an OLMo 2: norms of what a layer made, and of query and key whole. OLMo et al. 2024."""
    keys.refuse_unless("clip_qkv")
    return _read(
        keys,
        "olmo2",
        context=2048,
        eps=1e-5,
        ids=(None, 50_279),
        rope={},
        norm_output=True,
        qk_norm="whole",
        **_bias(keys),
    )


def read_phi3(keys: Keys) -> ModelConfig:
    """The axes of a Phi-3 or Phi-4 without long RoPE: a window in every layer, a part of each head rotated."""
    keys.refuse_unless("attention_bias", False)
    keys.refuse_unless("mlp_bias", False)
    window = keys.integer("sliding_window", None)
    return _read(
        keys,
        "phi3",
        context=4096,
        eps=1e-5,
        ids=(1, 32_000),
        rope={"partial": True, "scalings": False},
        windows=_every_layer(keys, window),
    )


def _read(
    keys: Keys,
    family: str,
    *,
    context: int,
    rope: dict[str, Any],
    kv_heads: int | None = None,
    head_dim: int | None = None,
    eps: float = 1e-6,
    tied: bool = False,
    ids: tuple[int | None, int | None] = (None, None),
    **axes: Any,
) -> ModelConfig:
    """What all of them share; the arguments are what the family takes where a key is missing, and its own axes."""
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    size = keys.integer_or_null("head_dim", head_dim, None)
    size = divide(width, heads, keys.where) if size is None else size
    reach = keys.integer("max_position_embeddings", context)
    return ModelConfig(
        family=family,
        layers=keys.integer("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=keys.integer_or_null("num_key_value_heads", kv_heads or heads, heads),
        head_dim=size,
        mlp_width=keys.integer("intermediate_size"),
        activation=keys.activation("hidden_act", "silu"),
        gated=True,
        norm="rmsnorm",
        norm_eps=keys.number("rms_norm_eps", eps),
        **{"qkv_bias": False, "output_bias": False, "mlp_bias": False, **axes},
        **read_rope(keys, reach, size, **rope),
        **read_common(keys, tied=tied, bos=ids[0], eos=ids[1]),
    )


def _bias(keys: Keys) -> dict[str, Any]:
    """One key for all four matrices of attention."""
    bias = keys.flag("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _every_layer(keys: Keys, window: int | None) -> tuple[int | None, ...]:
    """The same window in every layer; a file that lists kinds of layers must say the same."""
    layers = keys.integer("num_hidden_layers")
    kind = _FULL if window is None else _WINDOWED
    listed = keys.items("layer_types")
    if listed is not None and listed != [kind] * layers:
        message = f"{keys.where}: layer_types = {listed!r} changes the forward pass and is not here for this family"
        raise UnsupportedError(message, "open an issue with the model")
    return _windows(keys, window, [kind] * layers, listed=False)


def _upper_layers(keys: Keys) -> tuple[int | None, ...]:
    """Qwen's: with use_sliding_window, the layers from max_window_layers on have the window, or those listed."""
    window = keys.integer_or_null("sliding_window", 4096, None) if keys.flag("use_sliding_window", False) else None
    first, layers = keys.integer("max_window_layers", 28), keys.integer("num_hidden_layers")
    kinds = [_WINDOWED if window is not None and layer >= first else _FULL for layer in range(layers)]
    return _windows(keys, window, kinds)


def _windows(keys: Keys, window: int | None, kinds: list[str], *, listed: bool = True) -> tuple[int | None, ...]:
    """A window or none for each layer, from the layers' kinds: those the file lists, else ``kinds``."""
    if window is not None and window < 1:
        raise CorruptError(f"{keys.where}: sliding_window is {window}", "check the file")
    found = keys.items("layer_types") if listed else None
    if found is not None:
        if len(found) != len(kinds) or any(kind not in (_FULL, _WINDOWED) for kind in found):
            message = f"{keys.where}: layer_types = {found!r} changes the forward pass and is not here"
            raise UnsupportedError(message, f"it may name {_FULL} or {_WINDOWED} for each of {len(kinds)} layers")
        if window is None and _WINDOWED in found:
            raise CorruptError(f"{keys.where}: layer_types asks for a window, and there is none", "check the file")
        kinds = found
    if window is None or _WINDOWED not in kinds:
        return ()
    return tuple(window if kind == _WINDOWED else None for kind in kinds)


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Llama."""
    return {**_write(config, "LlamaForCausalLM"), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Mistral."""
    return {**_write(config, "MistralForCausalLM"), "sliding_window": _window(config)}


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Qwen 2."""
    return {**_write(config, "Qwen2ForCausalLM"), **_write_windows(config)}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Qwen 3."""
    return {**_write(config, "Qwen3ForCausalLM"), **_write_windows(config), "attention_bias": config.qkv_bias}


def write_smollm3(config: ModelConfig) -> dict[str, Any]:
    """The keys of a SmolLM 3."""
    windows = _write_windows(config)
    del windows["max_window_layers"]
    return {
        **_write(config, "SmolLM3ForCausalLM"),
        **windows,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(layer not in config.unrotated) for layer in range(config.layers)],
    }


def write_olmo2(config: ModelConfig) -> dict[str, Any]:
    """The keys of an OLMo 2."""
    return {**_write(config, "Olmo2ForCausalLM"), "attention_bias": config.qkv_bias}


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Phi-3."""
    # The padding is stated, for its class would take an id beyond a small vocabulary.
    return {**_write(config, "Phi3ForCausalLM"), "sliding_window": _window(config), "pad_token_id": None}


def _write(config: ModelConfig, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        **write_rope(config),
        **write_common(config, null=True),
    }


def _window(config: ModelConfig) -> int | None:
    return next((window for window in config.windows if window is not None), None)


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    """Both spellings: how many layers below are full, where that says it, and each layer's kind."""
    windows = (config.windows or (None,) * config.layers)[: config.layers]
    return {
        "use_sliding_window": any(windows),
        "sliding_window": _window(config),
        "max_window_layers": next((i for i, window in enumerate(windows) if window), config.layers),
        "layer_types": [_WINDOWED if window else _FULL for window in windows],
    }
