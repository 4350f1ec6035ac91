"""The large folder of ``tests/bench/big_folder.py``, small: Llama's shape in four shards, whole and in slices."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gptcli.core.build import open_model
from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.spec.config import ModelConfig, from_hf
from gptcli.spec.params import count_params
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "bench"), *sys.path])
    return importlib.import_module("big_folder")


def config() -> ModelConfig:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return from_hf({"model_type": "llama", **sizes, **heads, "tie_word_embeddings": False})


def test_four_shards_open_and_go_on(bench: ModuleType, tmp_path: Path) -> None:
    size = bench.write(tmp_path, config())
    assert size == 2 * count_params(config()).total_stored
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    files = [file.name for file in bench.shards_of(tmp_path)]
    assert (
        sorted(set(index["weight_map"].values()))
        == files
        == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    )
    model = open_model(tmp_path, Tokenizer.from_folder(tmp_path), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {torch.bfloat16}
    steps = list(generate(model, [Request([5, 9], 0, 4, ignore_eos=True)], Sampling(temperature=0)))
    assert [step.finish for step in steps] == [None, None, None, "length"]
    assert bench.read_seconds(tmp_path) > 0
