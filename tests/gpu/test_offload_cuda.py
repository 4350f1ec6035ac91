"""On a CUDA device: layers that come from the host's pinned memory while others compute, in time and in room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.core.build import open_model, random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, so that the first and the last share a place, and large enough that a copy takes a while."""
    config = ModelConfig("gpt2", 300, 128, 7, 1024, 16, 16, 64, 4096)
    folder = tmp_path_factory.mktemp("models") / "seven"
    files = {"tokenizer.json": tiny_tokenizer()}
    save_folder(random_model(config, 1), folder, dtype=torch.float32, files=files)
    return folder


def test_the_text_is_the_same_and_the_card_holds_two_layers(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    texts, held = [], []
    for offload in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = open_model(folder, tokenizer, device="cuda", dtype="float32", offload=offload)
        held.append(torch.cuda.memory_allocated() - before)
        requests = [Request([1, 2, 3], 0, 40, ignore_eos=True), Request([7], 1, 40, ignore_eos=True)]
        # Both without graphs, so that only where the weights are differs.
        model.stepping.plain = "a test"
        texts.append([(step.row, step.token) for step in generate(model, requests, Sampling())])
        assert bool(model.told) == offload
        del model
    assert texts[0] == texts[1]
    assert held[1] < held[0] * 3 / 7


def test_a_layer_is_never_overwritten_while_it_computes(folder: Path) -> None:
    """Many passes without a wait for the device between them: the host runs ahead as far as it can."""
    tokenizer = Tokenizer.from_folder(folder)
    ids = torch.randint(0, 300, (8, 100), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        wanted = open_model(folder, tokenizer, device="cuda", dtype="float32").transformer(ids)
        offloaded = open_model(folder, tokenizer, device="cuda", dtype="float32", offload=True).transformer
        found = [offloaded(ids) for _ in range(20)]
    for each in found:
        torch.testing.assert_close(each, wanted)
