"""ParamCount: the lecture's table, the published sizes, and configurations counted by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptcli.spec
from gptcli.spec.config import ModelConfig, from_hf, read_config
from gptcli.spec.params import CATEGORIES, OTHER, ParamCount, count_params, tensors

FOLDER = Path(gptcli.spec.__file__).parent / "presets"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.json"))


def _count(name: str) -> ParamCount:
    return count_params(read_config(FOLDER / f"{name}.json"))


# --- the lecture's table --------------------------------------------------------------------------------------------

GPT3 = {
    "Embedding": (1, (12_288, 50_257), 617_558_016),
    "Key": (96 * 96, (128, 12_288), 14_495_514_624),
    "Query": (96 * 96, (128, 12_288), 14_495_514_624),
    "Value": (96 * 96, (128, 12_288), 14_495_514_624),
    "Output": (96, (12_288, 12_288), 14_495_514_624),
    "Up-projection": (96, (49_152, 12_288), 57_982_058_496),
    "Down-projection": (96, (12_288, 49_152), 57_982_058_496),
    "Unembedding": (1, (50_257, 12_288), 617_558_016),
}


def test_gpt3_is_the_lectures_table() -> None:
    report = _count("gpt3")
    assert report.matrices == 27_938
    assert report.matrix_parameters == 175_181_291_520
    assert [row.name for row in report.categories] == list(GPT3)
    for row in report.categories:
        assert (row.matrices, row.shape, row.parameters) == GPT3[row.name]


@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_matrices_of_their_shape(name: str) -> None:
    """The two ways to count, by tensors and by matrices, agree."""
    report = _count(name)
    for row in report.categories:
        assert row.parameters == row.matrices * prod(row.shape)


# --- published sizes ------------------------------------------------------------------------------------------------

STORED = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    # As their makers, or the Hub from the files' headers, give them.
    "pythia-160m": 162_322_944,
    "pythia-1.4b": 1_414_647_808,
    "pythia-6.9b": 6_857_302_016,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "olmo-2-7b": 7_298_617_344,
    "phi-3-mini": 3_821_079_552,
}


@pytest.mark.parametrize(("name", "stored"), STORED.items())
def test_published_sizes(name: str, stored: int) -> None:
    assert _count(name).total_stored == stored


def test_every_preset_has_a_published_size() -> None:
    assert STORED.keys() | PAPER.keys() == set(PRESETS)


# Brown et al. 2020, table 2.1: the size in the name, within the rounding of the paper, and what the paper says of it.
PAPER = {
    "gpt3-small": (125e6, 12, 768, 12),
    "gpt3-medium": (350e6, 24, 1_024, 16),
    "gpt3-large": (760e6, 24, 1_536, 16),
    "gpt3-xl": (1.3e9, 24, 2_048, 16),
    "gpt3-2.7b": (2.7e9, 32, 2_560, 32),
    "gpt3-6.7b": (6.7e9, 32, 4_096, 32),
    "gpt3-13b": (13e9, 40, 5_120, 40),
    "gpt3": (175e9, 96, 12_288, 96),
}


@pytest.mark.parametrize("name", PAPER)
def test_gpt3_family_is_the_papers(name: str) -> None:
    size, layers, width, heads = PAPER[name]
    report = _count(name)
    config = report.config
    assert (config.layers, config.width, config.heads, config.context) == (layers, width, heads, 2_048)
    assert config.heads * config.head_dim == config.width
    assert config.tied
    assert report.total_stored == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_tensors_sum_to_what_is_stored(name: str) -> None:
    config = read_config(FOLDER / f"{name}.json")
    every = list(tensors(config))
    assert sum(tensor.parameters for tensor in every) == count_params(config).total_stored
    assert len({tensor.name for tensor in every}) == len(every)
    assert {tensor.category for tensor in every} <= {*CATEGORIES, *OTHER}


@pytest.mark.parametrize("name", PRESETS)
def test_tied_totals(name: str) -> None:
    """The unembedding is shown once more: in ``total``, and not in what is stored."""
    report = _count(name)
    config = report.config
    tied = [row for row in report.categories if row.tied]
    assert [row.name for row in tied] == ["Unembedding"] * config.tied
    assert report.total - report.total_stored == config.vocab_size * config.width * config.tied
    assert report.total == report.matrix_parameters + sum(count for _, count in report.other)
    untied = count_params(replace(config, tied=False))
    assert untied.total == untied.total_stored == report.total
    assert not any(row.tied for row in untied.categories)
    assert untied.matrices == report.matrices


# --- by hand --------------------------------------------------------------------------------------------------------

TINY = from_hf(
    {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_layer": 2, "n_head": 3, "n_inner": 7}
)


def _rows(config: ModelConfig) -> dict[str, tuple[int, tuple[int, int], int]]:
    return {row.name: (row.matrices, row.shape, row.parameters) for row in count_params(config).categories}


def test_tiny_gpt2_by_hand() -> None:
    assert _rows(TINY) == {
        "Embedding": (1, (6, 11), 66),
        "Key": (6, (2, 6), 72),
        "Query": (6, (2, 6), 72),
        "Value": (6, (2, 6), 72),
        "Output": (2, (6, 6), 72),
        "Up-projection": (2, (7, 6), 84),
        "Down-projection": (2, (6, 7), 84),
        "Unembedding": (1, (11, 6), 66),
    }
    report = count_params(TINY)
    # Biases of q, k, v, output, up, down; norms of weight and bias: two a layer and the last.
    assert dict(report.other) == {"Positions": 30, "Biases": 2 * (4 * 6 + 7 + 6), "Norms": 2 * 6 * (2 * 2 + 1)}
    assert report.total == 588 + 30 + 74 + 60
    assert report.total_stored == report.total - 66


def test_post_norm_has_no_last_norm() -> None:
    assert dict(count_params(replace(TINY, norm_first=False)).other)["Norms"] == 2 * 6 * 2 * 2


LLAMA = ModelConfig(
    family="gpt2",
    vocab_size=100,
    context=64,
    layers=3,
    width=32,
    heads=8,
    kv_heads=2,
    head_dim=4,
    mlp_width=80,
    activation="silu",
    gated=True,
    norm="rmsnorm",
    position="rope",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    tied=False,
)


def test_grouped_gated_untied_by_hand() -> None:
    assert _rows(LLAMA) == {
        "Embedding": (1, (32, 100), 3_200),
        "Key": (6, (4, 32), 768),
        "Query": (24, (4, 32), 3_072),
        "Value": (6, (4, 32), 768),
        "Output": (3, (32, 32), 3_072),
        "Up-projection": (6, (80, 32), 15_360),
        "Down-projection": (3, (32, 80), 7_680),
        "Unembedding": (1, (100, 32), 3_200),
    }
    report = count_params(LLAMA)
    assert dict(report.other) == {"Positions": 0, "Biases": 0, "Norms": 32 * (3 * 2 + 1)}
    assert report.total == report.total_stored == 37_120 + 224


def test_heads_wider_than_the_model_by_hand() -> None:
    """Attention need not be as wide as the model: 8 heads of 16 beside a width of 32."""
    config = replace(LLAMA, head_dim=16, qkv_bias=True)
    rows = _rows(config)
    assert rows["Query"] == (24, (16, 32), 3 * 128 * 32)
    assert rows["Key"] == rows["Value"] == (6, (16, 32), 3 * 32 * 32)
    assert rows["Output"] == (3, (32, 128), 3 * 32 * 128)
    assert dict(count_params(config).other)["Biases"] == 3 * (128 + 32 + 32)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 5),
    groups=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    flags=st.tuples(*[st.booleans()] * 7),
)
def test_tensors_and_table_agree_on_any_model(
    sizes: tuple[int, int, int, int, int], groups: tuple[int, int], flags: tuple[bool, ...]
) -> None:
    config = replace(
        LLAMA,
        vocab_size=sizes[0],
        context=sizes[1],
        width=sizes[2],
        head_dim=sizes[3],
        mlp_width=sizes[4],
        kv_heads=groups[0],
        heads=groups[0] * groups[1],
        gated=flags[0],
        norm="rmsnorm" if flags[1] else "layernorm",
        position="rope" if flags[2] and sizes[3] % 2 == 0 else "learned",
        qkv_bias=flags[3],
        output_bias=flags[4],
        mlp_bias=flags[5],
        tied=flags[6],
    )
    report = count_params(config)
    assert sum(tensor.parameters for tensor in tensors(config)) == report.total_stored
    for row in report.categories:
        assert row.parameters == row.matrices * prod(row.shape)


def test_layers_are_numbered() -> None:
    by_layer = [tensor.layer for tensor in tensors(TINY)]
    assert {layer for layer in by_layer if layer is not None} == {0, 1}
    for tensor in tensors(TINY):
        assert (tensor.layer is None) == (not tensor.name.startswith("blocks."))
        if tensor.layer is not None:
            assert tensor.name.startswith(f"blocks.{tensor.layer}.")
