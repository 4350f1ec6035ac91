"""What gptcli exports, opened by llama.cpp: the same ids for a text, the same logits, the same greedy text.

Measured on a CPU in float32, with llama.cpp's cache in float32 too: logits of GPT-2 differ by up to 3e-3 (it looks its
GELU up in half precision), those of the others by up to 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.cli import main
from gptcli.core.build import open_model
from gptcli.core.gguf import write_gguf
from gptcli.core.model import Transformer
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.core.gguf_models import GPT2, LLAMA, random_weights
from tests.text.conftest import TEXTS

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="compares with llama.cpp: pip install llama-cpp-python")
pytest.importorskip("gguf", reason="needs the extra 'gguf'")
pytestmark = pytest.mark.peer

FABLE = ROOT / "weights" / "fable"


def opened(file: Path, **more: Any) -> Any:
    """A file in llama.cpp, on one thread, all of it in float32."""
    settings = {"n_threads": 1, "n_threads_batch": 1, "logits_all": True, "type_k": 0, "type_v": 0, "verbose": False}
    return llama_cpp.Llama(str(file), **{**settings, "n_ctx": 512, "n_batch": 512, **more})


def peer_logits(peer: Any, ids: Sequence[int]) -> Tensor:
    """``[T, V]``"""
    peer.reset()
    peer.eval(list(ids))
    return torch.from_numpy(peer.scores[: len(ids)].copy())


def greedy(peer: Any, ids: Sequence[int], count: int) -> list[int]:
    made = list(ids)
    for _ in range(count):
        made.append(int(peer_logits(peer, made)[-1].argmax()))
    return made[len(ids) :]


@torch.inference_mode()
def our_greedy(model: Transformer, ids: Sequence[int], count: int) -> list[int]:
    made = list(ids)
    for _ in range(count):
        made.append(int(model(torch.tensor([made]))[0, -1].argmax()))
    return made[len(ids) :]


@pytest.fixture(scope="module")
def fable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("gguf") / "fable.gguf"
    assert main(["models", "export", str(FABLE), "--to", "gguf", "-o", str(file), "--dtype", "f32", "-q"]) == 0
    return opened(file)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_fable_cuts_text_as_we_do(fable: Any, text: str) -> None:
    text = text[:20_000]
    tokenizer = Tokenizer.from_folder(FABLE)
    ids = fable.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text)
    assert fable.detokenize(ids) == text.encode()
    assert fable.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, special=True)


def test_fable_writes_the_same_greedy_text(fable: Any) -> None:
    model = open_model(FABLE, Tokenizer.from_folder(FABLE), device="cpu", dtype="float32")
    for prompt in ("Once upon a time", "The king said:\n", '"Why?" asked'):
        ids = model.tokenizer.encode(prompt)
        ours = our_greedy(model.transformer, ids, 60)
        fable.reset()
        answer = fable.create_completion(prompt, max_tokens=60, temperature=0)["choices"][0]
        until = ours[: ours.index(0)] if 0 in ours else ours
        assert answer["text"] == model.tokenizer.decode(until)
        with torch.inference_mode():
            wanted = model.transformer(torch.tensor([ids + ours]))[0]
        assert (peer_logits(fable, ids + ours) - wanted).abs().max() < 0.02


LINEAR = RopeScaling("linear", 4.0, 16)
LLAMA3 = RopeScaling("llama3", 8.0, 32)
YARN = RopeScaling("yarn", 4.0, 16)
SHAPES: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "gpt2, untied": replace(GPT2, tied=False),
    "llama": LLAMA,
    "llama, tied": replace(LLAMA, tied=True),
    "llama, all heads": replace(LLAMA, kv_heads=4, rope_theta=500.0, norm_eps=1e-3),
    "llama, biases": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama, wide heads": replace(LLAMA, head_dim=32),
}
TOLERANCE = {"gpt2": 0.02, "gpt_neox": 0.02}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_random_models_give_the_same_logits_and_greedy_tokens(tmp_path: Path, config: ModelConfig) -> None:
    model = random_weights(config, seed=3)
    write_gguf(model, tmp_path / "a.gguf", kind="f32", name="random")
    peer = opened(tmp_path / "a.gguf", n_ctx=64, n_batch=64)
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]))[0]
    off = (peer_logits(peer, ids) - wanted).abs().max().item()
    print(f"off by {off:.2g} of {wanted.std():.2g}")
    assert off < TOLERANCE.get(config.family, 1e-4)
    assert greedy(peer, ids[:8], 12) == our_greedy(model, ids[:8], 12)
