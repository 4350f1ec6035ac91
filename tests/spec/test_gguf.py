"""What becomes of a configuration in a GGUF: tensors, their parts, scalings, and what llama.cpp lacks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.spec.gguf import ARCHITECTURES, GgufTensor, plan_gguf
from gptcli.spec.params import tensors

GPT2 = ModelConfig(
    "gpt2", vocab_size=300, context=64, layers=2, width=32, heads=4, kv_heads=4, head_dim=8, mlp_width=64
)
_NO_BIAS: dict[str, Any] = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
LLAMA = replace(
    GPT2,
    family="llama",
    kv_heads=2,
    activation="silu",
    gated=True,
    norm="rmsnorm",
    position="rope",
    tied=False,
    **_NO_BIAS,
)
CONFIGS: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "gpt_neox": replace(GPT2, family="gpt_neox", position="rope", rope_dim=2, parallel=True, tied=False),
    "llama": LLAMA,
    "mistral": replace(LLAMA, family="mistral"),
    "qwen2": replace(LLAMA, family="qwen2", qkv_bias=True),
    "qwen3": replace(LLAMA, family="qwen3", head_dim=16, tied=True, qk_norm="head"),
    "smollm3": replace(LLAMA, family="smollm3", layers=5, unrotated=(3,)),
    "olmo2": replace(LLAMA, family="olmo2", norm_output=True, qk_norm="whole"),
    "phi3": replace(LLAMA, family="phi3", rope_dim=4),
}


def named(config: ModelConfig) -> dict[tuple[str, int | None, str], GgufTensor]:
    return {(tensor.base, tensor.layer, tensor.kind): tensor for tensor in plan_gguf(config).tensors}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_has_its_place_once(family: str) -> None:
    config = CONFIGS[family]
    planned = [part for tensor in plan_gguf(config).tensors for part in tensor.parts]
    assert sorted(planned) == sorted(tensor.name for tensor in tensors(config))
    sizes = {tensor.name: tensor.parameters for tensor in tensors(config)}
    for tensor in plan_gguf(config).tensors:
        assert math.prod(tensor.shape) == sum(sizes[part] for part in tensor.parts)


def test_gpt2_joins_query_key_and_value_and_keeps_small_things_exact() -> None:
    found = named(GPT2)
    joined = found["ATTN_QKV", 1, "weight"]
    assert joined.parts == tuple(f"blocks.1.attention.{name}.weight" for name in ("query", "key", "value"))
    assert joined.shape == (96, 32)
    assert not joined.exact
    assert found["ATTN_QKV", 0, "bias"].shape == (96,)
    assert {base for (base, _, kind), tensor in found.items() if tensor.exact and kind == "weight"} == {
        "POS_EMBD",
        "ATTN_NORM",
        "FFN_NORM",
        "OUTPUT_NORM",
    }
    assert all(tensor.exact for (_, _, kind), tensor in found.items() if kind == "bias")
    assert ("OUTPUT", None, "weight") not in found  # tied
    assert ("OUTPUT", None, "weight") in named(replace(GPT2, tied=False))


def test_a_tied_head_is_repeated_where_llama_cpp_wants_one() -> None:
    head = named(replace(CONFIGS["gpt_neox"], tied=True))["OUTPUT", None, "weight"]
    assert head.parts == ("embedding.weight",)
    assert head.shape == (300, 32)


def test_only_metas_layout_is_permuted_by_its_heads() -> None:
    for family, config in CONFIGS.items():
        permuted = {tensor.base: tensor.permuted_heads for tensor in plan_gguf(config).tensors if tensor.permuted_heads}
        assert permuted == ({"ATTN_Q": 4, "ATTN_K": 2} if family in ("llama", "mistral", "smollm3") else {})


def test_phi3_joins_the_gate_above_the_up_projection() -> None:
    joined = named(CONFIGS["phi3"])["FFN_UP", 0, "weight"]
    assert joined.parts == ("blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight")
    assert joined.shape == (128, 32)


def test_norms_of_outputs_have_names_of_their_own() -> None:
    bases = {tensor.base for tensor in plan_gguf(CONFIGS["olmo2"]).tensors}
    assert {"ATTN_POST_NORM", "FFN_POST_NORM"} <= bases
    assert not {"ATTN_NORM", "FFN_NORM"} & bases


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        (replace(GPT2, activation="relu"), "gpt2 does not compute what this model asks for: activation = 'relu'"),
        (replace(LLAMA, qk_norm="head"), "qk_norm = 'head'"),
        (replace(LLAMA, rope_dim=4), "rotation of 4 of 8 numbers a head"),
        (replace(CONFIGS["qwen2"], output_bias=True), "output_bias = True"),
        (replace(CONFIGS["phi3"], head_dim=16), "4 heads of 16 in a width of 32"),
        (replace(CONFIGS["smollm3"], unrotated=(1,)), "layers without rotation (1)"),
        (replace(LLAMA, unrotated=(0,)), "layers without rotation (0)"),
        (replace(CONFIGS["qwen2"], rope_scaling=RopeScaling("llama3", 8.0, 32)), "scaling of positions as in Llama 3"),
        (replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 32, truncate=False)), "YaRN scaling with ends"),
    ],
)
def test_what_llama_cpp_lacks_is_named(config: ModelConfig, lacking: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_gguf(config)
    assert lacking in caught.value.message
    assert "--to hf" in caught.value.hint


@pytest.mark.parametrize("family", ["opt", "openai-gpt"])
def test_a_family_that_llama_cpp_does_not_know_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=f"does not know the family {family}"):
        plan_gguf(replace(GPT2, family=family, norm_first=family == "opt"))
    assert family not in ARCHITECTURES


def test_scalings_become_keys() -> None:
    linear = plan_gguf(replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0, 32)))
    assert linear.scaling == {"type": "linear", "factor": 4.0}
    yarn = plan_gguf(replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 32, beta_fast=16.0)))
    assert yarn.scaling == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 32,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 1.0,
    }
    # llama.cpp scales what is rotated by 0.1 ln(factor) + 1 anyway.
    told = plan_gguf(replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.5)))
    assert told.scaling["attn_factor"] * (0.1 * math.log(4) + 1) == pytest.approx(1.5)


def test_dynamic_scaling_leaves_the_context_that_needs_none() -> None:
    plan = plan_gguf(replace(LLAMA, rope_scaling=RopeScaling("dynamic", 2.0, 32)))
    assert plan.context == 32
    assert plan.scaling == {}
    assert "no dynamic scaling" in plan.notes[0]


def test_the_factors_of_llama_3_leave_fast_turns_and_slow_the_others() -> None:
    config = replace(LLAMA, head_dim=64, rope_scaling=RopeScaling("llama3", 8.0, 8192))
    factors = plan_gguf(config).rope_factors
    assert len(factors) == 32
    assert factors[0] == 1.0
    assert factors == tuple(sorted(factors))
    long = plan_gguf(replace(config, rope_theta=500_000.0)).rope_factors
    assert long[-1] == 8.0
    between = [factor for factor in long if 1 < factor < 8]
    assert between  # the ramp


def test_differences_are_told() -> None:
    assert "sliding window" in plan_gguf(replace(LLAMA, windows=(16, 16))).notes[0]
    assert plan_gguf(replace(LLAMA, windows=(64, None))).notes == ()  # as long as the context
    assert "tanh form" in plan_gguf(replace(GPT2, activation="gelu")).notes[0]
