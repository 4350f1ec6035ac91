"""Two models side by side."""

from __future__ import annotations

from dataclasses import replace

from gptcli.spec.diff import category_changes, config_changes, layer_changes, tensor_changes, total_changes
from gptcli.spec.params import count_layers, count_params, tensors
from gptcli.spec.presets import NAMES, read_preset

GPT2, MEDIUM = read_preset("gpt2"), read_preset("gpt2-medium")


def test_a_model_does_not_differ_from_itself() -> None:
    count = count_params(GPT2)
    assert config_changes(GPT2, GPT2) == []
    assert tensor_changes(GPT2, GPT2, {}, {}) == []
    assert all(c.difference == 0 and c.percent in (0, None) for c in category_changes(count, count))


def test_configurations_differ_on_their_axes() -> None:
    assert config_changes(GPT2, MEDIUM) == [
        ("layers", 12, 24),
        ("width", 768, 1024),
        ("heads", 12, 16),
        ("kv_heads", 12, 16),
        ("mlp_width", 3072, 4096),
    ]


def test_categories_and_totals() -> None:
    ours, theirs = count_params(GPT2), count_params(MEDIUM)
    changes = {change.name: change for change in category_changes(ours, theirs)}
    assert len(changes) == 11
    assert (changes["Embedding"].a, changes["Embedding"].b) == (50_257 * 768, 50_257 * 1024)
    assert changes["Embedding"].percent == 100 / 3
    total, stored = total_changes(ours, theirs)
    assert total.difference == sum(change.difference for change in changes.values())
    assert stored.difference == 354_823_168 - 124_439_808


def test_layers_stand_in_the_order_of_the_forward_pass() -> None:
    names = [change.name for change in layer_changes(GPT2, replace(MEDIUM, tied=False))]
    assert names == ["Embedding", "Positions", *(f"Block {i}" for i in range(24)), "Final norm", "Unembedding"]
    changes = layer_changes(GPT2, MEDIUM)
    assert sum(c.difference for c in changes) == count_params(MEDIUM).total - count_params(GPT2).total
    (only,) = [change for change in changes if change.name == "Block 12"]
    assert (only.a, only.percent) == (0, None)


def test_tensors_that_one_lacks_that_changed_shape_that_changed_type() -> None:
    config = replace(GPT2, layers=1, qkv_bias=False, mlp_width=100)
    types = {"embedding.weight": "float32", "positions.weight": "float32", "norm.bias": "float32"}
    other = {"embedding.weight": "bfloat16", "positions.weight": "float32"}
    changes = {c.name: c for c in tensor_changes(replace(GPT2, layers=1), config, types, other)}
    assert set(changes) == {
        "embedding.weight",
        *(f"blocks.0.attention.{name}.bias" for name in ("query", "key", "value")),
        *("blocks.0.mlp.up.weight", "blocks.0.mlp.up.bias", "blocks.0.mlp.down.weight"),
    }
    assert changes["blocks.0.attention.key.bias"].b is None
    assert changes["blocks.0.attention.key.bias"].change.difference == -768
    assert (changes["blocks.0.mlp.up.weight"].a, changes["blocks.0.mlp.up.weight"].b) == ((3072, 768), (100, 768))
    assert (changes["embedding.weight"].a_dtype, changes["embedding.weight"].b_dtype) == ("float32", "bfloat16")
    assert changes["embedding.weight"].change.difference == 0


def test_layers_sum_to_the_total() -> None:
    """The oracle: the tensors, summed by where they stand."""
    for name in NAMES:
        config = read_preset(name)
        layers = count_layers(config)
        assert sum(layer.parameters for layer in layers) == count_params(config).total
        for layer in layers:
            if layer.layer is not None:
                mine = [tensor for tensor in tensors(config) if tensor.layer == layer.layer]
                assert layer.parameters == sum(tensor.parameters for tensor in mine)
                assert layer.parameters == layer.attention + layer.mlp + layer.norms + layer.biases
                assert layer.biases == sum(tensor.parameters for tensor in mine if tensor.category == "Biases")
        assert [layer.name for layer in layers if layer.tied] == ["Unembedding"] * config.tied
        assert layers[-1].name == "Unembedding"
        assert ("Final norm" in [layer.name for layer in layers]) == config.norm_first
