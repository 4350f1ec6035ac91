"""gptcli against logits and greedy text that transformers gave once (``tests/data/golden``); needs no transformers.

Measured on a CPU: float32 logits, whose standard deviation is 1, differ by at most 1.5e-6 on the four models; bfloat16
logits by at most 0.06.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.core.build import Model, open_model
from gptcli.core.decode import Decoder
from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.spec.index import INDEX_NAME, read_folder
from gptcli.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
MODELS = ["old", "plain", "sharded", "untied"]
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.1


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def opened(name: str, tokenizer: Tokenizer, dtype: str = "float32") -> Model:
    return open_model(GOLDEN / name, tokenizer, device="cpu", dtype=dtype)


def greedy_text(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "greedy.json").read_text())


def golden_difference(name: str, model: Model) -> float:
    golden = load_file(GOLDEN / name / "logits.safetensors")
    with torch.inference_mode():
        logits = model.transformer(golden["ids"])
    assert logits.shape == golden["logits"].shape
    assert golden["logits"].std() > 0.5  # or any model would do
    return float((logits.float() - golden["logits"]).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tokenizer: Tokenizer) -> None:
    assert golden_difference(name, opened(name, tokenizer)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits_stay_close(name: str, tokenizer: Tokenizer) -> None:
    difference = golden_difference(name, opened(name, tokenizer, "bfloat16"))
    assert 0 < difference <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_transformers(name: str, tokenizer: Tokenizer) -> None:
    golden = greedy_text(name)
    model = opened(name, tokenizer)
    decoder = Decoder(model.transformer)
    logits = decoder.prefill([golden["prompt"]], len(golden["prompt"]) + 8)
    made = []
    for _ in golden["ids"]:
        made.append(int(logits.argmax(-1)))
        if len(made) < len(golden["ids"]):
            logits = decoder.step(torch.tensor(made[-1:]))
    assert made == golden["ids"]
    assert len(made) == (200 if model.config.context == 256 else model.config.context + 1 - len(golden["prompt"]))


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_text(name: str, tokenizer: Tokenizer) -> None:
    golden = greedy_text(name)
    request = Request(golden["prompt"], seed=0, max_tokens=200, ignore_eos=True)
    steps = list(generate(opened(name, tokenizer), [request], Sampling(temperature=0)))
    assert [step.token for step in steps] == golden["ids"]
    assert steps[-1].finish == ("length" if len(golden["ids"]) == 200 else "context")


def test_the_golden_files_are_of_the_kinds_they_should_be() -> None:
    assert (GOLDEN / "sharded" / INDEX_NAME).is_file()
    assert len({info.file for info in read_folder(GOLDEN / "sharded").values()}) > 1
    old = read_folder(GOLDEN / "old")
    assert {"wte.weight", "h.0.attn.bias", "h.1.attn.masked_bias"} <= old.keys()
    assert "lm_head.weight" in read_folder(GOLDEN / "untied")
    assert "lm_head.weight" not in read_folder(GOLDEN / "plain")


@pytest.mark.parametrize("name", MODELS)
def test_golden_greedy_choices_are_clear(name: str) -> None:
    """The gap between the two best logits is hundreds of times the tolerance, so equal text is no accident."""
    assert greedy_text(name)["smallest_gap"] > 100 * FLOAT32_TOLERANCE
