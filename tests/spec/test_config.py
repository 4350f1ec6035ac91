"""ModelConfig and Hugging Face's config.json: both ways, strict about what changes the forward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptcli.spec
from gptcli.errors import CorruptError, GptcliError, NotFoundError, UnsupportedError
from gptcli.spec.config import ModelConfig, from_hf, read_config, to_hf
from gptcli.spec.presets import NAMES

PRESETS = sorted((Path(gptcli.spec.__file__).parent / "presets").glob("*.json"))

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}
GPT1: dict[str, Any] = {**GPT2, "model_type": "openai-gpt", "vocab_size": 40478, "n_positions": 512}


def _without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_every_preset_of_the_contract_is_there() -> None:
    gpt2 = ["gpt2", "gpt2-large", "gpt2-medium", "gpt2-xl"]
    gpt3 = [f"gpt3-{size}" for size in ("13b", "2.7b", "6.7b", "large", "medium", "small", "xl")]
    assert {path.stem for path in PRESETS} >= {"gpt1", *gpt2, *gpt3, "gpt3"}
    assert sorted(NAMES) == sorted(path.stem for path in PRESETS)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_round_trip_of_every_preset(path: Path) -> None:
    config = read_config(path)
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written) == config
    assert to_hf(from_hf(written)) == written
    for key, value in json.loads(path.read_text()).items():
        if key in written:
            assert written[key] == value


def test_axes_of_gpt2() -> None:
    config = from_hf(GPT2)
    assert config == ModelConfig(
        family="gpt2",
        vocab_size=50257,
        context=1024,
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        mlp_width=3072,
        activation="gelu_tanh",
        gated=False,
        norm="layernorm",
        norm_eps=1e-5,
        norm_first=True,
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=True,
    )


def test_axes_of_gpt1() -> None:
    config = from_hf(GPT1)
    assert not config.norm_first
    assert config.tied
    assert config.activation == "gelu_tanh"
    assert config.mlp_width == 3072


ROUND_TRIPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n_inner": 1000}, {"mlp_width": 1000}),
    ({"n_inner": None}, {"mlp_width": 3072}),
    ({"activation_function": "gelu"}, {"activation": "gelu"}),
    ({"activation_function": "relu"}, {"activation": "relu"}),
    ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    ({"activation_function": "swish"}, {"activation": "silu"}),
    ({"activation_function": "silu"}, {"activation": "silu"}),
    ({"layer_norm_epsilon": 1e-6}, {"norm_eps": 1e-6}),
    ({"tie_word_embeddings": False}, {"tied": False}),
    ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"dtype": "float16"}, {"dtype": "float16"}),
    ({"torch_dtype": "torch.float32"}, {"dtype": "float32"}),
    ({"torch_dtype": None, "dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"bos_token_id": 5}, {"bos_id": 5}),
    ({"bos_token_id": 0, "eos_token_id": 0}, {"bos_id": 0, "eos_ids": (0,)}),
    ({"eos_token_id": [7, 9]}, {"eos_ids": (7, 9)}),
    ({"eos_token_id": None}, {"eos_ids": ()}),
]


@pytest.mark.parametrize(("keys", "axes"), ROUND_TRIPS)
def test_keys_become_axes_and_come_back(keys: dict[str, Any], axes: dict[str, Any]) -> None:
    config = from_hf({**GPT2, **keys})
    assert config == replace(from_hf(GPT2), **axes)
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@settings(max_examples=100, deadline=None)
@given(
    head_dim=st.integers(1, 300),
    heads=st.integers(1, 100),
    sizes=st.tuples(*[st.integers(1, 2**20)] * 3),
    layers=st.integers(1, 200),
    tied=st.booleans(),
    epsilon=st.floats(1e-12, 1e-2),
    eos=st.lists(st.integers(0, 2**17), max_size=3),
    dtype=st.sampled_from([None, "float32", "bfloat16", "float16"]),
)
def test_round_trip_of_any_gpt2(
    head_dim: int,
    heads: int,
    sizes: tuple[int, int, int],
    layers: int,
    tied: bool,
    epsilon: float,
    eos: list[int],
    dtype: str | None,
) -> None:
    config = ModelConfig(
        family="gpt2",
        vocab_size=sizes[0],
        context=sizes[1],
        layers=layers,
        width=head_dim * heads,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        mlp_width=sizes[2],
        norm_eps=epsilon,
        tied=tied,
        dtype=dtype,
        eos_ids=tuple(eos),
    )
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize("name", ["gelu", "relu", "silu", "swish", None])
def test_activations_of_gpt1(name: str | None) -> None:
    """Its "gelu" is the tanh form (transformers' openai-gpt), null too; what is written is the same model."""
    config = from_hf({**GPT1, "afn": name})
    assert config.activation == {"relu": "relu", "silu": "silu", "swish": "silu"}.get(name or "gelu", "gelu_tanh")
    assert from_hf(to_hf(config)) == config


def test_old_spelling_of_the_context() -> None:
    old = {**_without(GPT2, "n_positions"), "n_ctx": 77}
    assert from_hf(old).context == 77
    assert from_hf({**GPT2, "n_ctx": 77}).context == 1024


def test_keys_that_change_nothing_are_left_alone() -> None:
    more = {
        "_name_or_path": "x",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "use_cache": False,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"max_length": 50}},
        "reorder_and_upcast_attn": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": None,
    }
    assert from_hf({**GPT2, **more}) == from_hf(GPT2)


def test_to_dict_is_json_by_our_names() -> None:
    config = from_hf({**GPT2, "eos_token_id": [1, 2]})
    shown = json.loads(json.dumps(config.to_dict()))
    assert shown["width"] == 768
    assert shown["eos_ids"] == [1, 2]
    assert "n_embd" not in shown


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("activation_function", "quick_gelu"),
        ("activation_function", ""),
        ("model_type", "mamba"),
        ("model_type", "GPT2"),
    ],
)
def test_what_changes_the_forward_pass_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        from_hf({**GPT2, key: value}, "the/config.json")
    assert repr(value) in caught.value.message or key in caught.value.message
    assert "the/config.json" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_untied_gpt1_is_refused() -> None:
    """It has no unembedding of its own in our table, so its logits would come from the wrong matrix."""
    with pytest.raises(UnsupportedError, match="tie_word_embeddings"):
        from_hf({**GPT1, "tie_word_embeddings": False})


@pytest.mark.parametrize("raw", [{}, _without(GPT2, "model_type"), {**GPT2, "model_type": None}])
def test_no_model_type(raw: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="model_type"):
        from_hf(raw)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
@pytest.mark.parametrize("raw", [GPT2, GPT1], ids=["gpt2", "gpt1"])
def test_missing_key_is_named(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(CorruptError, match=key):
        from_hf(_without(raw, key))


WRONG: list[tuple[str, Any]] = [
    ("model_type", 3),
    ("model_type", ["gpt2"]),
    ("vocab_size", "50257"),
    ("vocab_size", True),
    ("vocab_size", 50257.0),
    ("vocab_size", [50257]),
    ("n_positions", {}),
    ("n_embd", "768"),
    ("n_layer", 12.5),
    ("n_head", False),
    ("n_inner", "3072"),
    ("n_inner", True),
    ("layer_norm_epsilon", "1e-5"),
    ("layer_norm_epsilon", True),
    ("activation_function", 1),
    ("tie_word_embeddings", 1),
    ("tie_word_embeddings", "true"),
    ("torch_dtype", 32),
    ("bos_token_id", "0"),
    ("bos_token_id", [0]),
    ("eos_token_id", "0"),
    ("eos_token_id", True),
    ("eos_token_id", {"id": 0}),
    ("eos_token_id", ["0"]),
    ("eos_token_id", [0, None]),
    ("eos_token_id", [[0]]),
    ("eos_token_id", [True]),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(CorruptError, match=key) as caught:
        from_hf({**GPT2, key: value})
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_inner", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [0, -1, -768, 2**31, 10**30])
def test_absurd_sizes(key: str, value: int) -> None:
    with pytest.raises(CorruptError) as caught:
        from_hf({**GPT2, "n_embd": 768, key: value})
    assert str(value) in caught.value.message


def test_more_layers_than_any_model() -> None:
    assert from_hf({**GPT2, "n_layer": 10_000}).layers == 10_000
    with pytest.raises(CorruptError, match="layers"):
        from_hf({**GPT2, "n_layer": 10_001})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1e-5, 10**400], ids=["inf", "nan", "negative", "huge"])
def test_epsilon_that_is_none(value: float) -> None:
    with pytest.raises(CorruptError, match=r"layer_norm_epsilon|norm_eps"):
        from_hf({**GPT2, "layer_norm_epsilon": value})


@pytest.mark.parametrize("heads", [5, 7, 767, 769, 1536])
def test_heads_that_do_not_divide_the_width(heads: int) -> None:
    with pytest.raises(CorruptError, match="divide"):
        from_hf({**GPT2, "n_head": heads})


def test_heads_that_cannot_share_their_keys() -> None:
    with pytest.raises(CorruptError, match="5 key-value heads"):
        replace(from_hf(GPT2), kv_heads=5)


# --- files ----------------------------------------------------------------------------------------------------------


def test_read_from_a_file_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == from_hf(GPT2)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(NotFoundError, match=r"other\.json"):
        read_config(tmp_path / "other.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"\0\0\0", b"{'a': 1}", b"1" * 5_000])
def test_broken_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CorruptError, match="JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"gpt2"', "3"])
def test_json_that_is_no_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptError, match="not an object"):
        read_config(tmp_path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from([GPT2, GPT1]),
    changes=st.dictionaries(
        st.sampled_from([*GPT2, "n_inner", "eos_token_id", "bos_token_id", "activation_function", "afn", "dtype"]),
        json_values,
        min_size=1,
        max_size=3,
    ),
)
def test_any_value_under_any_key_is_read_or_refused(family: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        config = from_hf({**family, **changes})
    except GptcliError:
        return
    assert all(type(id_) is int for id_ in config.eos_ids)
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


# --- generation_config.json -------------------------------------------------------------------------------------------


def _with_generation(folder: Path, generation: object, **keys: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**GPT2, **keys}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("mine", "theirs", "ends"),
    [
        (7, [7, 9], (7, 9)),
        (9, [7, 9], (9, 7)),
        (None, [7, 9, 7], (7, 9)),
        (None, 7, (7,)),
        (7, None, (7,)),
        (7, [50256, 50257, -1], (7, 50256)),  # beyond the vocabulary is no token
    ],
)
def test_more_ends_of_a_text(tmp_path: Path, mine: int | None, theirs: object, ends: tuple[int, ...]) -> None:
    """Llama 3's chat models name the end of a turn only there."""
    folder = _with_generation(tmp_path, {"eos_token_id": theirs, "temperature": 0.6}, eos_token_id=mine)
    assert read_config(folder).eos_ids == ends
    assert read_config(folder / "config.json").eos_ids == (() if mine is None else (mine,))


@pytest.mark.parametrize("generation", [[], {"eos_token_id": "</s>"}])
def test_generation_config_that_is_none(tmp_path: Path, generation: object) -> None:
    with pytest.raises(CorruptError, match=r"generation_config\.json"):
        read_config(_with_generation(tmp_path, generation))
