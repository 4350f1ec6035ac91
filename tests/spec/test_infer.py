"""A configuration read off the tensors: GPT-2's and no one else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import gptcli.spec
from gptcli.errors import CorruptError, GptcliError, UnsupportedError
from gptcli.spec.config import ModelConfig, read_config
from gptcli.spec.index import TensorInfo, read_folder
from gptcli.spec.infer import infer_config
from gptcli.spec.match import disk_layout, match

FOLDER = Path(gptcli.spec.__file__).parent / "presets"


def _infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", shape, 0, 0, Path("x")) for name, shape in shapes.items()}


def _shapes(config: ModelConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {
        name if name == "lm_head.weight" else prefix + name: tensor.shape
        for name, tensor in disk_layout(config).items()
    }


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_sizes_come_back(name: str, prefix: str) -> None:
    config = read_config(FOLDER / f"{name}.json")
    inferred = infer_config(_infos(_shapes(config, prefix)), "file")
    assert inferred == replace(config, bos_id=None, eos_ids=(), dtype=None)


def test_untied_and_inner_width_come_back() -> None:
    config = replace(read_config(FOLDER / "gpt2.json"), tied=False, mlp_width=1_000, bos_id=None, eos_ids=())
    infos = _infos(_shapes(config))
    assert infer_config(infos, "file") == config
    assert match(infos, config, "file").keys() == infos.keys()


def test_width_that_64_does_not_divide_is_one_head() -> None:
    config = replace(
        read_config(FOLDER / "gpt2.json"), width=100, heads=1, kv_heads=1, head_dim=100, bos_id=None, eos_ids=()
    )
    assert infer_config(_infos(_shapes(config)), "file") == config


def test_missing_layer_is_left_to_the_match() -> None:
    config = replace(read_config(FOLDER / "gpt2.json"), layers=3)
    shapes = {name: shape for name, shape in _shapes(config).items() if not name.startswith("h.1.")}
    inferred = infer_config(_infos(shapes), "file")
    assert inferred.layers == 3
    with pytest.raises(CorruptError, match=r"h\.1\.attn"):
        match(_infos(shapes), inferred, "file")


GOOD: dict[str, tuple[int, ...]] = {"wte.weight": (11, 64), "wpe.weight": (5, 64), "h.0.mlp.c_fc.weight": (64, 256)}


def test_least_that_is_needed() -> None:
    config = infer_config(_infos(GOOD), "file")
    assert (config.vocab_size, config.context, config.layers, config.width) == (11, 5, 1, 64)
    assert (config.heads, config.head_dim, config.mlp_width) == (1, 64, 256)


@pytest.mark.parametrize("name", GOOD)
def test_other_tensors_are_unsupported(name: str) -> None:
    without = {other: shape for other, shape in GOOD.items() if other != name}
    flat: dict[str, tuple[int, ...]] = {**GOOD, name: (64,)}
    for shapes in (without, flat):
        with pytest.raises(UnsupportedError, match="the/file") as caught:
            infer_config(_infos(shapes), "the/file")
        assert "config.json" in caught.value.hint
        assert caught.value.exit_code == 3


def test_no_tensors_and_llamas_are_unsupported() -> None:
    llama: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
    }
    for shapes in ({}, llama):
        with pytest.raises(UnsupportedError):
            infer_config(_infos(shapes), "file")


@pytest.mark.parametrize(
    "changes",
    [
        {"wte.weight": (0, 64)},
        {"wte.weight": (11, 0)},
        {"wpe.weight": (0, 64)},
        {"h.0.mlp.c_fc.weight": (64, 0)},
        {"h.99999.ln_1.weight": (64,)},
        {"wte.weight": (2**40, 64)},
    ],
)
def test_sizes_that_are_none_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(GptcliError) as caught:
        infer_config(_infos({**GOOD, **changes}), "file")
    assert type(caught.value) is CorruptError


@pytest.mark.parametrize(
    ("name", "kin"),
    [("neox", "gpt_neox"), ("llama", "llama or mistral or"), ("phi3", "phi3"), ("opt", "opt"), ("olmo2", "olmo2")],
)
def test_tensors_of_other_families_are_told_by_name(name: str, kin: str) -> None:
    golden = Path(__file__).parent.parent / "data" / "golden" / name
    with pytest.raises(UnsupportedError, match=f"look like those of .*{kin}.*, which need one"):
        infer_config(read_folder(golden), "file")
