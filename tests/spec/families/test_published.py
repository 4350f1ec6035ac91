"""Configurations as their makers published them: the axes they mean, written and read back, old and new spellings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.spec.axes import ModelConfig, RopeScaling
from gptcli.spec.config import from_hf, to_hf
from gptcli.spec.params import count_params
from tests.spec.families import published
from tests.spec.families.published import ALL, LLAMA1, LLAMA3, MISTRAL, NEOX, OLMO2, OPT, PHI3, QWEN2, QWEN3, SMOLLM3

BARE = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}


def llama_like(family: str, **axes: Any) -> ModelConfig:
    common = {"activation": "silu", "gated": True, "norm": "rmsnorm", "position": "rope", "tied": False}
    return ModelConfig(family=family, **{**common, **BARE, **axes})


def back(config: ModelConfig) -> ModelConfig:
    """Written to JSON, and read again."""
    return from_hf(json.loads(json.dumps(to_hf(config))))


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL)
def test_written_and_read_again_is_the_same(raw: dict[str, Any]) -> None:
    config = from_hf(raw)
    assert back(config) == config
    written = to_hf(config)
    assert from_hf({**raw, **written}) == config
    # What is written is what was published, where both say something that counts.
    for key in written.keys() & raw.keys() - {
        "n_inner",
        "sliding_window",
        "max_window_layers",
        "dropout",
        "pad_token_id",
    }:
        if not key.endswith("pdrop"):
            assert written[key] == raw[key] or (key == "hidden_act" and config.activation == "gelu_tanh"), key


@pytest.mark.parametrize(
    ("raw", "axes"),
    [
        (LLAMA3, {"qk_norm": "head"}),
        (LLAMA3, {"windows": (64,) * 16}),
        (LLAMA3, {"output_bias": True}),
        (MISTRAL, {"windows": (4096, None) * 16}),
        (QWEN2, {"qkv_bias": False}),
        (QWEN3, {"unrotated": (3,)}),
        (NEOX, {"mlp_bias": False}),
        (OPT, {"mlp_width": 24, "position_offset": 0}),
        (published.DISTILGPT2, {"kv_heads": 1, "head_dim": 8}),
    ],
)
def test_axes_that_a_family_has_no_keys_for_are_not_left_out(raw: dict[str, Any], axes: dict[str, Any]) -> None:
    """Written without them it would open as another model, with no word of it."""
    config = replace(from_hf(raw), **axes)
    with pytest.raises(UnsupportedError, match=f"a {config.family} has no words for") as raised:
        to_hf(config)
    own = {name for name in axes if name != "mlp_width"}
    assert {word.strip() for word in re.findall(r"(\w+) = ", str(raised.value))} == own


@pytest.mark.parametrize(
    ("raw", "axes", "what"),
    [
        (PHI3, {"rope_scaling": RopeScaling("linear", 2.0, 4096)}, "'linear'"),
        (LLAMA3, {"rope_dim": 32}, "partial_rotary_factor = 0.5"),
    ],
)
def test_what_a_family_refuses_to_read_is_not_written(raw: dict[str, Any], axes: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"a {raw['model_type']} can't be written so: .*{what}"):
        to_hf(replace(from_hf(raw), **axes))


def test_axes_that_say_the_same_are_written() -> None:
    """All of a head is what None says, windows beyond the layers no layer has, no rotation needs no base."""
    assert back(replace(from_hf(LLAMA3), rope_dim=64)) == from_hf(LLAMA3)
    assert back(replace(from_hf(MISTRAL), windows=(4096,) * 40)) == from_hf(MISTRAL)
    assert back(replace(from_hf(QWEN2), windows=(None,) * 24)) == from_hf(QWEN2)
    assert back(replace(from_hf(OPT), rope_theta=5.0)) == from_hf(OPT)


@pytest.mark.parametrize("axes", [{"windows": (8,)}, {"windows": (0,) * 16}, {"rope_dim": 5}, {"rope_dim": 66}])
def test_axes_that_can_not_be_are_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"windows|in pairs"):
        replace(from_hf(LLAMA3), **axes)


@pytest.mark.parametrize("id_", [-1, 128_256, 999_999])
def test_a_start_token_beyond_the_vocabulary_is_none(id_: int) -> None:
    assert from_hf({**LLAMA3, "bos_token_id": id_}).bos_id is None


def test_axes_of_pythia() -> None:
    assert from_hf(NEOX) == ModelConfig(
        family="gpt_neox",
        vocab_size=50304,
        context=2048,
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        mlp_width=3072,
        activation="gelu",
        position="rope",
        rope_dim=16,
        parallel=True,
        tied=False,
        dtype="float16",
        bos_id=0,
        eos_ids=(0,),
    )


def test_axes_of_opt() -> None:
    config = from_hf(OPT)
    assert (config.position, config.position_offset, config.activation) == ("learned", 2, "relu")
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.tied) == (True, True, True, True)
    assert dict(count_params(config).other)["Positions"] == (2048 + 2) * 768


def test_axes_of_llama() -> None:
    scaling = RopeScaling("llama3", 32.0, 8192, low_frequency_factor=1.0, high_frequency_factor=4.0)
    sizes = {"vocab_size": 128256, "context": 131072, "layers": 16, "width": 2048, "mlp_width": 8192}
    assert from_hf(LLAMA3) == llama_like(
        "llama",
        **sizes,
        heads=32,
        kv_heads=8,
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling=scaling,
        tied=True,
        dtype="bfloat16",
        bos_id=128000,
        eos_ids=(128001,),
    )
    first = from_hf(LLAMA1)
    assert (first.context, first.kv_heads, first.head_dim, first.rope_theta) == (2048, 32, 128, 10_000.0)
    assert (first.tied, first.norm_eps, first.rope_scaling) == (False, 1e-6, None)


def test_axes_of_mistral_qwen_smollm_olmo_and_phi() -> None:
    assert from_hf(MISTRAL).windows == (4096,) * 32
    qwen2 = from_hf(QWEN2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.windows, qwen2.qk_norm) == (True, False, (), "none")
    qwen3 = from_hf(QWEN3)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.qkv_bias, qwen3.windows) == ("head", 128, False, ())
    smollm3 = from_hf(SMOLLM3)
    assert (smollm3.unrotated, smollm3.tied) == (tuple(range(3, 36, 4)), True)
    olmo2 = from_hf(OLMO2)
    assert (olmo2.qk_norm, olmo2.norm_output, olmo2.bos_id) == ("whole", True, None)
    phi3 = from_hf(PHI3)
    assert (phi3.windows, phi3.rope_dim, phi3.eos_ids) == ((2047,) * 32, None, (32000,))


def test_gpt2s_kin() -> None:
    assert from_hf(published.CEREBRAS).activation == "gelu"
    assert count_params(from_hf(published.CEREBRAS)).total_stored == 111_050_496  # "111M"
    assert count_params(from_hf(published.DISTILGPT2)).total_stored == 81_912_576  # "82M"


# --- keys, one by one -------------------------------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (NEOX, {"use_parallel_residual": False}, {"parallel": False}),
    (NEOX, {"attention_bias": False}, {"qkv_bias": False, "output_bias": False}),
    (NEOX, {"rotary_pct": 1.0}, {"rope_dim": None}),
    (NEOX, {"rotary_pct": 0.375, "rotary_emb_base": 5000}, {"rope_dim": 24, "rope_theta": 5000.0}),
    (NEOX, {"hidden_act": "gelu_fast"}, {"activation": "gelu_tanh"}),
    (NEOX, {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": RopeScaling("linear", 2.0, 2048)}),
    (NEOX, {"tie_word_embeddings": True}, {"tied": True}),
    (OPT, {"enable_bias": False}, BARE),
    (OPT, {"word_embed_proj_dim": None, "activation_function": "gelu"}, {"activation": "gelu"}),
    (LLAMA1, {"num_key_value_heads": None, "head_dim": None}, {}),
    (LLAMA1, {"head_dim": 96}, {"head_dim": 96}),
    (LLAMA1, {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    (LLAMA1, {"mlp_bias": True}, {"mlp_bias": True}),
    (LLAMA1, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, {"rope_theta": 7e5}),
    (LLAMA1, {"rope_scaling": {"rope_type": "default", "factor": 9.0}, "rope_theta": 3}, {"rope_theta": 3.0}),
    (LLAMA1, {"rope_scaling": {}, "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
    (LLAMA1, {"dtype": "float32"}, {"dtype": "float32"}),
    (LLAMA1, {"eos_token_id": [2, 7]}, {"eos_ids": (2, 7)}),
    (LLAMA1, {"eos_token_id": None, "bos_token_id": None}, {"eos_ids": (), "bos_id": None}),
    (MISTRAL, {"sliding_window": None}, {"windows": ()}),
    (MISTRAL, {"sliding_window": 5}, {"windows": (5,) * 32}),
    (MISTRAL, {"num_key_value_heads": None}, {"kv_heads": 32}),
    (MISTRAL, {"layer_types": ["sliding_attention"] * 32}, {}),
    (QWEN2, {"use_sliding_window": True, "sliding_window": 9}, {"windows": (None,) * 21 + (9,) * 3}),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": 24}, {"windows": ()}),
    (QWEN2, {"use_sliding_window": True, "sliding_window": None}, {"windows": ()}),
    (
        QWEN2,
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 12},
        {"windows": (9, None) * 12},
    ),
    (QWEN3, {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    (QWEN3, {"head_dim": None}, {"head_dim": 64}),
    (SMOLLM3, {"no_rope_layers": [1] * 36}, {"unrotated": ()}),
    (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 18}, {"unrotated": (17, 35)}),
    (SMOLLM3, {"use_sliding_window": True, "sliding_window": 9, "layer_types": None}, {"windows": (None,) * 3 + (9,)}),
    (OLMO2, {"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    (PHI3, {"partial_rotary_factor": 0.5}, {"rope_dim": 48}),
    (PHI3, {"sliding_window": None}, {"windows": ()}),
    (PHI3, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}, {"rope_dim": 72}),
]


@pytest.mark.parametrize(("raw", "keys", "axes"), CASES)
def test_keys_become_axes_and_come_back(raw: dict[str, Any], keys: dict[str, Any], axes: dict[str, Any]) -> None:
    if raw is SMOLLM3 and "windows" in axes:
        axes = {"windows": axes["windows"] * 9}
    config = from_hf({**raw, **keys})
    assert config == replace(from_hf(raw), **axes)
    assert back(config) == config


# Class, keys that are left out, and what the class in transformers takes for them.
DEFAULTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (NEOX, {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False}),
    (
        NEOX,
        {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 2},
    ),
    (OPT, {"activation_function": "relu", "enable_bias": True, "max_position_embeddings": 2048, "eos_token_id": 2}),
    (LLAMA1, {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}),
    (MISTRAL, {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}),
    (MISTRAL, {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}),
    (QWEN2, {"num_key_value_heads": 32, "num_attention_heads": 32}),
    (QWEN2, {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "rope_theta": 10000.0}),
    (QWEN3, {"head_dim": 128, "num_key_value_heads": 32, "num_attention_heads": 32, "tie_word_embeddings": False}),
    (SMOLLM3, {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "eos_token_id": 128001}),
    (SMOLLM3, {"no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36}),
    (OLMO2, {"rms_norm_eps": 1e-5, "eos_token_id": 50279, "max_position_embeddings": 2048, "bos_token_id": None}),
    (PHI3, {"rms_norm_eps": 1e-5, "sliding_window": None, "eos_token_id": 32000, "bos_token_id": 1}),
]


@pytest.mark.parametrize(("raw", "keys"), DEFAULTS)
def test_what_is_left_out_is_what_the_class_takes(raw: dict[str, Any], keys: dict[str, Any]) -> None:
    without = {name: value for name, value in raw.items() if name not in keys or name == "num_attention_heads"}
    without |= {name: value for name, value in keys.items() if name == "num_attention_heads"}
    if raw is QWEN2 and "num_attention_heads" in keys:
        without["hidden_size"] = keys["hidden_size"] = 1024
    assert from_hf(without) == from_hf({**raw, **keys})


def test_an_end_beyond_the_vocabulary_is_none() -> None:
    small = {name: value for name, value in PHI3.items() if name not in ("eos_token_id", "pad_token_id")}
    assert from_hf({**small, "vocab_size": 300}).eos_ids == ()


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (OPT, {"do_layer_norm_before": False}, "do_layer_norm_before"),
    (OPT, {"word_embed_proj_dim": 512}, "word_embed_proj_dim"),
    (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    (OPT, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    (
        PHI3,
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "'longrope' need a fac",
    ),
    (PHI3, {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "'su' need a factor"),
    (PHI3, {"rope_scaling": {"type": "yarn", "short_factor": [1.0], "long_factor": [1.0]}}, "'yarn' need a factor"),
    (LLAMA1, {"rope_scaling": {"rope_type": "longrope"}}, "'longrope'"),
    (LLAMA1, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "'mrope' need positions of three"),
    (LLAMA1, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, "alpha"),
    (LLAMA1, {"rope_scaling": {"type": "hyper", "factor": 2.0}}, "'hyper'"),
    (LLAMA1, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (QWEN2, {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between kinds of layers"),
    (QWEN2, {"layer_types": ["chunked_attention"] * 24}, "layer_types"),
    (QWEN2, {"layer_types": ["full_attention"] * 23}, "layer_types"),
    (MISTRAL, {"layer_types": ["sliding_attention", "full_attention"] * 16}, "layer_types"),
    (MISTRAL, {"attention_bias": True}, "attention_bias"),
    (PHI3, {"attention_bias": True}, "attention_bias"),
    (OLMO2, {"clip_qkv": 8.0}, "clip_qkv"),
    (LLAMA1, {"hidden_act": "relu2"}, "relu2"),
    (LLAMA1, {"num_local_experts": 8}, "num_local_experts"),
    (LLAMA1, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (LLAMA1, {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    (LLAMA1, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
]


@pytest.mark.parametrize(("raw", "keys", "what"), REFUSED)
def test_what_is_not_here_is_refused_by_name(raw: dict[str, Any], keys: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what) as caught:
        from_hf({**raw, **keys}, "the/config.json")
    assert "the/config.json" in caught.value.message
    assert caught.value.hint


BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA1, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, "dynamic scaling .* more than two"),
    (LLAMA1, {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "yarn scaling .* above 1"),
    (NEOX, {"rotary_pct": 0.3}, "19 of the 64 numbers"),
    (NEOX, {"rotary_pct": 0.0}, "0 of the 64"),
    (NEOX, {"rotary_pct": 2.0}, "128 of the 64"),
    (LLAMA1, {"rope_theta": 0}, "rope_theta"),
    (LLAMA1, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
    (LLAMA1, {"rope_scaling": {"type": "linear", "factor": 0}}, "out of range"),
    (LLAMA1, {"rope_scaling": "linear"}, "rope_scaling"),
    (LLAMA3, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, "low_freq_factor"),
    (
        LLAMA3,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "from 4.0 to 4.0",
    ),
    (LLAMA1, {"num_key_value_heads": 5}, "5 key-value heads"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "layer_types asks for a window"),
    (SMOLLM3, {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    (SMOLLM3, {"no_rope_layers": ["x"] * 36}, "no_rope_layers"),
    (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval"),
]


@pytest.mark.parametrize(("raw", "keys", "what"), BROKEN)
def test_what_is_not_whole_is_named(raw: dict[str, Any], keys: dict[str, Any], what: str) -> None:
    with pytest.raises(CorruptError, match=what):
        from_hf({**raw, **keys})


@pytest.mark.parametrize(
    ("family", "needs"),
    [
        ("mixtral", "experts"),
        ("qwen2_moe", "experts"),
        ("gpt_oss", "experts"),
        ("deepseek_v3", "compressed keys"),
        ("gemma", "1 \\+ weight"),
        ("gemma2", "soft-capped"),
        ("bloom", "ALiBi"),
        ("falcon", "ALiBi"),
        ("mamba", "state-space"),
        ("llava", "images"),
        ("qwen2_vl", "images"),
        ("t5", "encoder"),
        ("bert", "both directions"),
        ("phi", "one norm"),
        ("gptj", "neighbouring pairs"),
        ("granite", "multipliers"),
    ],
)
def test_well_known_families_that_are_not_read_say_what_they_need(family: str, needs: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'{family}', which gptcli does not read: it needs .*{needs}") as caught:
        from_hf({"model_type": family})
    assert "llama, mistral" in caught.value.hint


# --- scalings ---------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SCALINGS: list[tuple[dict[str, Any], RopeScaling]] = [
    ({"type": "linear", "factor": 4}, RopeScaling("linear", 4.0, 2048)),
    ({"type": "dynamic", "factor": 2.5}, RopeScaling("dynamic", 2.5, 2048)),
    (YARN, RopeScaling("yarn", 4.0, 32768)),
    ({**YARN, "beta_fast": 16, "beta_slow": 2}, RopeScaling("yarn", 4.0, 32768, beta_fast=16.0, beta_slow=2.0)),
    ({**YARN, "beta_fast": None, "truncate": False}, RopeScaling("yarn", 4.0, 32768, truncate=False)),
    ({**YARN, "attention_factor": 1.5}, RopeScaling("yarn", 4.0, 32768, attention_factor=1.5)),
    ({**YARN, "mscale": 1.0}, RopeScaling("yarn", 4.0, 32768)),
    ({"type": "yarn", "factor": None, "original_max_position_embeddings": 512}, RopeScaling("yarn", 4.0, 512)),
    ({"type": "yarn", "factor": 3.0}, RopeScaling("yarn", 3.0, 2048)),
]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("table", "scaling"), SCALINGS)
def test_scalings_in_both_spellings(table: dict[str, Any], scaling: RopeScaling, spelling: str) -> None:
    config = from_hf({**LLAMA1, spelling: table})
    assert config.rope_scaling == scaling
    assert config.context == (5120 if scaling.kind == "dynamic" else 2048)
    assert back(config) == config
    assert to_hf(config)["max_position_embeddings"] == 2048


def test_yarns_two_scales_make_one() -> None:
    config = from_hf({**LLAMA1, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}})
    assert config.rope_scaling is not None
    assert config.rope_scaling.attention_factor == pytest.approx(1.1386294 / 1.0693147)
    assert back(config) == config


def test_any_part_that_is_rotated_comes_back() -> None:
    """A part is a float, and is cut off to a whole number of numbers."""
    for heads, size in ((1, 98), (3, 80), (2, 64), (7, 2 * 49)):
        for rotated in range(2, size + 1, 2):
            raw = {**NEOX, "hidden_size": heads * size, "num_attention_heads": heads}
            config = replace(from_hf(raw | {"rotary_pct": 1.0}), rope_dim=None if rotated == size else rotated)
            assert back(config) == config
