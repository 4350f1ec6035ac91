"""File against configuration: what belongs in the file, under which names, and every way in which it may not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

import gptcli.spec
from gptcli.errors import CorruptError, NotFoundError
from gptcli.spec.config import ModelConfig, from_hf, read_config
from gptcli.spec.index import FILE_NAME, TensorInfo
from gptcli.spec.match import compare, disk_layout, match, match_folder, match_names, stored_dtype, written_name
from gptcli.spec.params import count_params, tensors

PRESETS = sorted((Path(gptcli.spec.__file__).parent / "presets").glob("*.json"))
TINY = from_hf(
    {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_layer": 2, "n_head": 3, "n_inner": 7}
)
GPT1 = from_hf({"model_type": "openai-gpt", "vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_layer": 2, "n_head": 3})

# transformers' GPT2LMHeadModel with these sizes: every name and shape that it saves.
GPT2_BLOCK = {
    "ln_1.weight": (6,),
    "ln_1.bias": (6,),
    "attn.c_attn.weight": (6, 18),
    "attn.c_attn.bias": (18,),
    "attn.c_proj.weight": (6, 6),
    "attn.c_proj.bias": (6,),
    "ln_2.weight": (6,),
    "ln_2.bias": (6,),
    "mlp.c_fc.weight": (6, 7),
    "mlp.c_fc.bias": (7,),
    "mlp.c_proj.weight": (7, 6),
    "mlp.c_proj.bias": (6,),
}
GPT2_SHAPES = {
    "wte.weight": (11, 6),
    "wpe.weight": (5, 6),
    **{f"h.{i}.{name}": shape for i in range(2) for name, shape in GPT2_BLOCK.items()},
    "ln_f.weight": (6,),
    "ln_f.bias": (6,),
}


def _infos(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype, shape, 0, 4 * prod(shape), Path("x")) for name, shape in shapes.items()}


def _prefixed(shapes: dict[str, Any]) -> dict[str, Any]:
    return {"transformer." + name: value for name, value in shapes.items()}


# --- the layout -----------------------------------------------------------------------------------------------------


def test_layout_of_gpt2_is_transformers() -> None:
    layout = disk_layout(TINY)
    assert {name: tensor.shape for name, tensor in layout.items()} == GPT2_SHAPES
    assert next(iter(layout)) == "wte.weight"
    assert list(layout)[-1] == "ln_f.bias"


def test_layout_of_an_untied_gpt2_has_its_head() -> None:
    layout = disk_layout(replace(TINY, tied=False))
    assert layout.keys() - GPT2_SHAPES.keys() == {"lm_head.weight"}
    assert layout["lm_head.weight"].shape == (11, 6)
    assert not layout["lm_head.weight"].transpose


def test_layout_of_gpt1() -> None:
    layout = disk_layout(GPT1)
    assert layout["tokens_embed.weight"].shape == (11, 6)
    assert layout["positions_embed.weight"].shape == (5, 6)
    assert layout["h.1.mlp.c_fc.weight"].shape == (6, 24)
    assert "ln_f.weight" not in layout
    assert len(layout) == 2 + 2 * 12


def test_query_key_value_are_joined_in_this_order_and_transposed() -> None:
    joined = disk_layout(TINY)["h.1.attn.c_attn.weight"]
    names = [f"blocks.1.attention.{name}.weight" for name in ("query", "key", "value")]
    assert joined.parts == tuple((name, 6) for name in names)
    assert joined.transpose
    assert not disk_layout(TINY)["h.1.attn.c_attn.bias"].transpose
    assert not disk_layout(TINY)["wte.weight"].transpose


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_layout_holds_every_tensor_once(path: Path) -> None:
    config = read_config(path)
    layout = disk_layout(config)
    ours = [name for tensor in layout.values() for name, _ in tensor.parts]
    assert sorted(ours) == sorted(tensor.name for tensor in tensors(config))
    assert sum(prod(tensor.shape) for tensor in layout.values()) == count_params(config).total_stored


def test_written_names_are_transformers() -> None:
    assert written_name(TINY, "wte.weight") == "transformer.wte.weight"
    assert written_name(TINY, "h.0.ln_1.bias") == "transformer.h.0.ln_1.bias"
    assert written_name(TINY, "lm_head.weight") == "lm_head.weight"


# --- what fits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixed", [False, True])
def test_with_and_without_the_prefix(prefixed: bool) -> None:
    shapes = _prefixed(GPT2_SHAPES) if prefixed else GPT2_SHAPES
    matched = match(_infos(shapes), TINY, "file")
    assert matched.keys() == GPT2_SHAPES.keys()
    for name, (theirs, info) in matched.items():
        assert theirs == ("transformer." + name if prefixed else name)
        assert info.shape == GPT2_SHAPES[name]


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_old_mask_buffers_are_ignored(prefix: str) -> None:
    masks = {f"{prefix}h.{i}.attn.bias": (1, 1, 5, 5) for i in range(2)}
    masks |= {f"{prefix}h.{i}.attn.masked_bias": () for i in range(2)}
    shapes = {prefix + name: shape for name, shape in GPT2_SHAPES.items()}
    infos = {**_infos(masks, "U8"), **_infos(shapes)}
    assert match(infos, TINY, "file").keys() == GPT2_SHAPES.keys()


def test_no_other_bias_is_ignored() -> None:
    found, missing, extra = match_names(TINY, [*GPT2_SHAPES, "h.0.attn.other_bias", "h.x.attn.bias", "attn.bias"])
    assert found.keys() == GPT2_SHAPES.keys()
    assert missing == []
    assert extra == ["h.0.attn.other_bias", "h.x.attn.bias", "attn.bias"]


def test_repeated_head_of_a_tied_file_is_accepted() -> None:
    matched = match(_infos({**GPT2_SHAPES, "lm_head.weight": (11, 6)}), TINY, "file")
    assert "lm_head.weight" not in matched


def test_head_of_an_untied_file_is_wanted() -> None:
    untied = replace(TINY, tied=False)
    assert "lm_head.weight" in match(_infos({**_prefixed(GPT2_SHAPES), "lm_head.weight": (11, 6)}), untied, "file")
    with pytest.raises(CorruptError, match=r"missing: lm_head\.weight"):
        match(_infos(GPT2_SHAPES), untied, "file")


# --- what does not --------------------------------------------------------------------------------------------------


def _fault(infos: dict[str, TensorInfo], config: ModelConfig = TINY) -> str:
    with pytest.raises(CorruptError) as caught:
        match(infos, config, "the/file")
    assert "the/file" in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3
    return caught.value.message


@pytest.mark.parametrize("name", GPT2_SHAPES)
def test_each_missing_tensor_is_named(name: str) -> None:
    shapes = {other: shape for other, shape in GPT2_SHAPES.items() if other != name}
    assert f"missing: {name}" in _fault(_infos(shapes))


def test_left_over_tensor_is_named() -> None:
    assert "left over: h.2.ln_1.weight" in _fault(_infos({**GPT2_SHAPES, "h.2.ln_1.weight": (6,)}))
    assert "left over: adapter" in _fault(_infos({**GPT2_SHAPES, "adapter": (6,)}))


def test_tensor_under_both_names_is_left_over() -> None:
    assert "left over" in _fault(_infos({**GPT2_SHAPES, "transformer.wte.weight": (11, 6)}))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wte.weight", (12, 6)),
        ("wte.weight", (6, 11)),
        ("h.1.attn.c_attn.weight", (18, 6)),
        ("h.0.mlp.c_fc.bias", (7, 1)),
        ("ln_f.bias", ()),
        ("wpe.weight", (6, 6)),
    ],
)
def test_wrong_shape_is_named_with_both(name: str, shape: tuple[int, ...]) -> None:
    message = _fault(_infos({**GPT2_SHAPES, name: shape}))
    assert f"{name} is {list(shape)}" in message
    assert str(list(GPT2_SHAPES[name])) in message


def test_wrong_shape_is_named_as_in_the_file() -> None:
    assert "transformer.wte.weight is" in _fault(_infos({**_prefixed(GPT2_SHAPES), "transformer.wte.weight": (1, 6)}))


@pytest.mark.parametrize("dtype", ["I64", "I8", "U8", "BOOL", "F64", "F8_E4M3"])
def test_type_that_is_no_weights_is_named(dtype: str) -> None:
    infos = {**_infos(GPT2_SHAPES), **_infos({"ln_f.bias": (6,)}, dtype)}
    assert f"ln_f.bias is of type {dtype}" in _fault(infos)


def test_several_faults_are_told_together() -> None:
    shapes = {**GPT2_SHAPES, "extra": (1,), "wte.weight": (1, 1)}
    del shapes["ln_f.bias"]
    message = _fault(_infos(shapes))
    assert "missing: ln_f.bias" in message
    assert "left over: extra" in message
    assert "wte.weight is [1, 1]" in message


def test_many_names_are_cut_short() -> None:
    message = _fault({})
    assert "and 23 more" in message
    assert len(message) < 400


# --- folders and types ----------------------------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    save_file({name: np.zeros(shape, np.float32) for name, shape in GPT2_SHAPES.items()}, tmp_path / FILE_NAME)
    assert match_folder(tmp_path, TINY).keys() == GPT2_SHAPES.keys()
    with pytest.raises(CorruptError, match=r"wpe\.weight"):
        match_folder(tmp_path, replace(TINY, context=6))
    with pytest.raises(NotFoundError):
        match_folder(tmp_path / "nothing", TINY)


def test_stored_type_is_that_of_most_parameters() -> None:
    half = _infos({"wte.weight": (11, 6)}, "BF16")
    small = {name: shape for name, shape in GPT2_SHAPES.items() if len(shape) == 1}
    rest = _infos({name: shape for name, shape in GPT2_SHAPES.items() if len(shape) == 2}, "F16")
    assert stored_dtype(match({**rest, **_infos(small), **half}, TINY, "file")) == "float16"
    assert stored_dtype(match(_infos(GPT2_SHAPES, "BF16"), TINY, "file")) == "bfloat16"
    assert json.dumps(stored_dtype(match(_infos(GPT2_SHAPES), TINY, "file"))) == '"float32"'


def test_a_comparison_lists_everything() -> None:
    shapes = {**GPT2_SHAPES, "wte.weight": (1, 6), "adapter": (2,)}
    del shapes["h.1.ln_2.bias"], shapes["ln_f.weight"]
    infos = _infos(shapes)
    infos["ln_f.bias"] = replace(infos["ln_f.bias"], dtype="I8")
    result = compare(infos, TINY)
    assert not result.ok
    assert (set(result.missing), result.left_over) == ({"h.1.ln_2.bias", "ln_f.weight"}, ("adapter",))
    assert result.wrong_shape == (("wte.weight", (1, 6), (11, 6)),)
    assert result.wrong_type == (("ln_f.bias", "I8"),)
    assert compare(_infos(GPT2_SHAPES), TINY).ok
