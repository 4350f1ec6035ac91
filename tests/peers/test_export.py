"""What ``models export --to hf`` writes, opened by transformers: the same logits, text and ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.cli import main
from gptcli.core.build import open_model
from gptcli.core.checkpoint import save_folder
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.core.gguf_models import FAMILIES, random_weights
from tests.text.families import ALL_TEXTS, folder_of

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

TOKENIZERS = {"gpt_neox": "neox", "llama": "llama2", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}


def export(source: Path, target: Path, *more: str) -> Path:
    assert main(["models", "export", str(source), "--to", "hf", "-o", str(target), "-q", *more]) == 0
    return target


def test_fable_is_the_same_model_there(tmp_path: Path) -> None:
    folder = export(ROOT / "weights" / "fable", tmp_path / "out", "--dtype", "float32")
    ours = open_model(folder, Tokenizer.from_folder(folder), device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert theirs.generation_config.eos_token_id == 0
    for text in ALL_TEXTS.values():
        ids = ours.tokenizer.encode(text, special=True)
        assert words(text)["input_ids"] == ids
    prompt = "Once upon a time"
    with torch.inference_mode():
        wanted = ours.transformer(torch.tensor([ours.tokenizer.encode(prompt)]))
        assert (theirs(**words(prompt, return_tensors="pt")).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_same_model_there(tmp_path: Path, family: str) -> None:
    model = random_weights(FAMILIES[family])
    words = folder_of(TOKENIZERS.get(family, "gpt2"), tmp_path)
    source = tmp_path / "source"
    save_folder(model, source, dtype=torch.float32, files={"tokenizer.json": (words / "tokenizer.json").read_bytes()})
    folder = export(source, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    for text in ("Hello, it's 1234 o'clock!", " two  spaces\n", "naïve 日本語"):
        start = [] if ours.start_id is None else [ours.start_id]
        assert opened(text)["input_ids"] == start + ours.encode(text)
