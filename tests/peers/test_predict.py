"""``gptcli predict`` and transformers, live, on the same folder: the next token's distribution, and continuations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.core.build import open_model
from gptcli.core.generate import prompt_ids
from gptcli.core.predict import distribution, next_logits, score_continuations
from gptcli.spec.library import DEFAULT_MODEL, resolve
from gptcli.text.tokenizer import Tokenizer

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

PROMPT = "Once upon a time there was a"
CHOICES = [" little girl", " dog", " king who had three daughters", "!"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve(DEFAULT_MODEL).folder


def test_bars_and_choices_are_those_of_transformers(folder: Path) -> None:
    words = Tokenizer.from_folder(folder)
    ours = open_model(folder, words, device="cpu", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = prompt_ids(ours, PROMPT)
    assert peer(PROMPT)["input_ids"] == prompt
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    for each in distribution(next_logits(ours, prompt), 1.0, 50).top:
        assert each.probability == pytest.approx(expected[each.id].item(), rel=1e-4)
    choices = [words.encode(text) for text in CHOICES]
    (found,) = score_continuations(ours, [prompt], choices)
    for ids, each in zip(choices, found, strict=True):
        with torch.inference_mode():
            logprobs = theirs(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
        total = sum(logprobs[len(prompt) + place - 1, id_].item() for place, id_ in enumerate(ids))
        assert each.logprob == pytest.approx(total, abs=1e-4)
