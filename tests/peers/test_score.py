"""Perplexity by gptcli and by transformers, live: Hugging Face's recipe of a sliding window, on the same text.

The recipe counts the target into the context, so each of its predictions has a token less to go by; measured, that and
the arithmetic move the perplexity of the whole text by 1.4e-4 (255.285 here, 255.250 there).
"""

from __future__ import annotations

import lzma
import math
from typing import Any

import pytest
import torch

from gptcli.core.build import open_model
from gptcli.core.score import Mark, Totals, score
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

FOLDER = ROOT / "weights" / "fable"
TEXT = ROOT.parent / "shared" / "corpus" / "wikitext2.valid.txt.xz"
# Of 1.1 million: both together take about a minute on two quiet cores.
CHARACTERS = 200_000


def theirs(ids: list[int], start: int, context: int, stride: int) -> float:
    """The perplexity that "Perplexity of fixed-length models" computes, with the start token before the text."""
    model = transformers.GPT2LMHeadModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = torch.tensor([[start, *ids]])
    nats, count, before = 0.0, 0, 0
    for begin in range(0, tokens.shape[1], stride):
        end = min(begin + context, tokens.shape[1])
        window = tokens[:, begin:end]
        labels = window.clone()
        labels[:, : window.shape[1] - (end - before)] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        nats, count, before = nats + loss.item() * scored, count + scored, end
        if end == tokens.shape[1]:
            break
    assert count == len(ids)
    return math.exp(nats / count)


@pytest.mark.skipif(not TEXT.is_file(), reason=f"needs {TEXT.name} in ../shared/corpus")
def test_perplexity_on_wikitext_is_that_of_transformers() -> None:
    with lzma.open(TEXT, "rt", encoding="utf-8") as stream:
        text = stream.read(CHARACTERS)
    model = open_model(FOLDER, Tokenizer.from_folder(FOLDER), device="cpu", dtype="float32")
    ids = model.tokenizer.encode(text)
    assert ids == transformers.AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"]
    assert model.config.bos_id is not None
    totals = Totals()
    for piece in score(model, [ids, Mark.END], stride=256):
        totals.add(Totals(piece.total_bits, piece.tokens_scored))
    assert totals.tokens == len(ids)
    assert totals.perplexity == pytest.approx(theirs(ids, model.config.bos_id, 512, 256), rel=1e-3)
