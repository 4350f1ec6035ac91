"""Prompts that go through the model in chunks: the same logits and text as in one piece, in memory that is bounded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gptcli.core import decode
from gptcli.core.attention import _QUERIES, attend, attention_pattern, gather
from gptcli.core.decode import Decoder, chunk_size
from gptcli.core.stepping import Stepping
from gptcli.spec.config import ModelConfig, RopeScaling
from tests.conftest import PATIENCE, ROOT
from tests.core.test_model import LLAMA_LIKE, every_config, visible_model

PROMPTS = [[1 + i % 40 for i in range(23)], [7], [2 + i % 30 for i in range(11)], [3 + i % 9 for i in range(10)]]


@every_config
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("size", [4, 10, 23])
def test_logits_and_text_are_those_of_one_piece(
    config: ModelConfig, lean: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and with rows of other lengths, which end within a chunk, at its end, or in an earlier one."""
    model = visible_model(config)
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS[:1] * 3):
        logits, texts = [], []
        for chunk in (1000, size):
            monkeypatch.setattr(decode, "chunk_size", lambda *counts, chunk=chunk: chunk)
            decoder = Decoder(model, Stepping(model, lean=lean))
            logits.append(decoder.prefill(prompts, 23 + 40))
            assert decoder.lengths == [len(prompt) for prompt in prompts]
            made = [logits[-1].argmax(-1)]
            for _ in range(6):
                made.append(decoder.step(made[-1]).argmax(-1))
            texts.append(torch.stack(made).tolist())
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)
        assert texts[0] == texts[1]


def test_chunks_are_for_all_rows_together() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_size(1, cpu) == 2048
    assert chunk_size(8, cpu) == 1024
    assert chunk_size(1000, cpu) == 512
    assert chunk_size(8, cuda) >= 1024  # in one piece


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("count", [2, _QUERIES, _QUERIES + 3])
def test_the_last_queries_of_a_sequence_are_the_slow_reference(heads: int, kv_heads: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, count, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, count + 9, 8, generator=generator) for _ in range(2))
    pattern = attention_pattern(query, key, "causal")
    assert pattern[0, 0, 0].nonzero().flatten().tolist() == list(range(10))
    torch.testing.assert_close(attend(query, key, value, "causal"), gather(pattern, value), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 2, _QUERIES, 2 * _QUERIES + 3])
@pytest.mark.parametrize("before", [0, 9])
@pytest.mark.parametrize("window", [1, 5, _QUERIES, 10**6])
def test_a_window_is_the_slow_reference(count: int, before: int, window: int) -> None:
    generator = torch.Generator().manual_seed(count)
    query = torch.randn(1, 4, count, 8, generator=generator)
    key, value = (torch.randn(1, 2, count + before, 8, generator=generator) for _ in range(2))
    pattern = attention_pattern(query, key, window)
    for place in {0, count // 2, count - 1}:
        seen = pattern[0, 0, place].nonzero().flatten().tolist()
        assert seen == list(range(max(0, before + place + 1 - window), before + place + 1))
    torch.testing.assert_close(attend(query, key, value, window), gather(pattern, value), atol=1e-5, rtol=0)


def test_a_prompt_that_is_to_be_turned_alike_goes_in_one_piece() -> None:
    config = ModelConfig(**{**LLAMA_LIKE, "rope_scaling": RopeScaling("dynamic", 4.0, 5)})
    model = visible_model(config)
    for lean in (False, True):
        decoder = Decoder(model, Stepping(model, lean=lean))
        wanted = model(torch.tensor(PROMPTS[:1]))[:, -1]
        torch.testing.assert_close(decoder.prefill(PROMPTS[:1], 64), wanted, atol=1e-5, rtol=1e-5)
    assert chunk_size(1, torch.device("cpu"), config.rope_scaling) > 10**6


MEMORY = """
import sys, torch
from gptcli.core import decode
from gptcli.core.build import random_model
from gptcli.spec.config import from_hf

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024

axes = {"model_type": "gpt2", "vocab_size": 1000, "n_positions": 8192, "n_embd": 128, "n_layer": 1, "n_head": 4}
model = random_model(from_hf({**axes, "n_inner": 4096}), 0).requires_grad_(False)
if sys.argv[1] == "whole":
    decode.chunk_size = lambda *counts: 8192
before = peak()
decode.Decoder(model).prefill([[i % 1000 for i in range(8191)]], 8192)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_long_prompt_needs_memory_for_a_chunk() -> None:
    """Of a model whose MLP is wide, so that what lies between layers is most of it: 128 MiB for 8,192 tokens, twice."""
    taken = {}
    for way in ("whole", "chunks"):
        command = [sys.executable, "-c", MEMORY, way]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
        taken[way] = float(done.stdout)
    assert taken["whole"] > 250
    assert taken["chunks"] < 0.5 * taken["whole"], taken
