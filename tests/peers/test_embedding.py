"""Vectors of texts beside the hidden states of transformers, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.core.build import open_model
from gptcli.core.embedding import text_vectors
from gptcli.text.tokenizer import Tokenizer

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer


def test_our_layers_are_their_hidden_states(tiny_folder: Path) -> None:
    ours = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    ids = ours.tokenizer.encode("Once upon a time there was a king")
    with torch.inference_mode():
        states = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert len(states) == ours.config.layers + 1
    for layer, state in enumerate(states):
        (vector,) = text_vectors(ours, [ids], pool="none", layer=layer)
        torch.testing.assert_close(vector.values, state[0], atol=1e-5, rtol=1e-5)
