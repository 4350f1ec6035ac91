"""What gptcli exports, opened by llama.cpp: the same ids for a text, the same logits, the same greedy text.

Measured on a CPU in float32, with llama.cpp's cache in float32 too: logits of GPT-2 differ by up to 3e-3 (it looks its
GELU up in half precision), those of the others by up to 2e-5.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gptcli.cli import main
from gptcli.core.build import open_model
from gptcli.core.gguf import write_gguf
from gptcli.core.model import Transformer
from gptcli.errors import UnsupportedError
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.text.gguf_words import read_gguf_words
from gptcli.text.template import PLAIN
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.core.gguf_models import FAMILIES, GPT2, LLAMA, random_weights
from tests.text.conftest import TEXTS
from tests.text.families import ALL_TEXTS, folder_of
from tests.text.families import FAMILIES as FAMILY_TOKENIZERS

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


# How far logits may be off in each type; they spread by 3.
BOUNDS = {"f32": 0.01, "f16": 0.02, "bf16": 0.15, "q8_0": 0.6}


@pytest.mark.parametrize("kind", BOUNDS)
def test_every_type_is_the_model(tmp_path: Path, kind: str) -> None:
    model = open_model(FABLE, Tokenizer.from_folder(FABLE), device="cpu", dtype="float32")
    file = tmp_path / "a.gguf"
    assert main(["models", "export", str(FABLE), "--to", "gguf", "-o", str(file), "--dtype", kind, "-q"]) == 0
    ids = model.tokenizer.encode("Once upon a time there was a king who had a daughter, and one day she said")
    with torch.inference_mode():
        wanted = model.transformer(torch.tensor([ids]))[0]
    off = (peer_logits(opened(file), ids) - wanted).abs().max().item()
    assert off < BOUNDS[kind]


def test_a_chat_is_the_same_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the template that fine-tuning writes."""
    folder = tmp_path / "talker"
    shutil.copytree(FABLE, folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    file = str(tmp_path / "a.gguf")
    assert main(["models", "export", str(folder), "--to", "gguf", "-o", file, "--dtype", "f32", "-q"]) == 0
    capsys.readouterr()
    command = ["chat", "Tell me of the king!", "-s", "Be brief.", "-m", str(folder), "-t", "0", "-n", "30", "--json"]
    assert main([*command, "--dtype", "float32", "--repetition-penalty", "1"]) == 0
    ours = json.loads(capsys.readouterr().out)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the king!"}]
    peer = opened(Path(file), logits_all=False)
    theirs = peer.create_chat_completion(messages, temperature=0, max_tokens=30, repeat_penalty=1)
    answer = theirs["choices"][0]["message"]["content"]
    print(ours, theirs)
    assert theirs["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]
    assert answer.strip() == ours["text"].strip() != ""


LINEAR = RopeScaling("linear", 4.0, 16)
LLAMA3 = RopeScaling("llama3", 8.0, 32)
YARN = RopeScaling("yarn", 4.0, 16)
SHAPES: dict[str, ModelConfig] = {
    **FAMILIES,
    "gpt2, untied": replace(GPT2, tied=False),
    "gpt_neox, one after the other, tied": replace(FAMILIES["gpt_neox"], parallel=False, tied=True, rope_dim=None),
    "llama, tied": replace(LLAMA, tied=True),
    "llama, all heads": replace(LLAMA, kv_heads=4, rope_theta=500.0, norm_eps=1e-3),
    "llama, biases": replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama, wide heads": replace(LLAMA, head_dim=32),
    "llama, linear": replace(LLAMA, rope_scaling=LINEAR),
    "llama, llama3": replace(LLAMA, rope_scaling=LLAMA3),
    "llama, yarn": replace(LLAMA, rope_scaling=YARN),
    "llama, yarn, told factor": replace(LLAMA, rope_scaling=replace(YARN, attention_factor=1.3, beta_fast=8.0)),
    "qwen3, yarn, tied": replace(FAMILIES["qwen3"], rope_scaling=YARN, tied=True),
    "phi3, all of a head, tied": replace(FAMILIES["phi3"], rope_dim=None, tied=True),
    "olmo2, linear, tied": replace(FAMILIES["olmo2"], rope_scaling=LINEAR, tied=True),
}
TOLERANCE = {"gpt2": 0.01, "gpt_neox": 0.01}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_random_models_give_the_same_logits_and_greedy_tokens(tmp_path: Path, config: ModelConfig) -> None:
    model = random_weights(config, seed=3)
    write_gguf(model, tmp_path / "a.gguf", kind="f32", name="random")
    peer = opened(tmp_path / "a.gguf", n_ctx=64, n_batch=64)
    ids = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids]))[0]
    off = (peer_logits(peer, ids) - wanted).abs().max().item()
    assert off < TOLERANCE.get(config.family, 5e-5)
    assert greedy(peer, ids[:8], 12) == our_greedy(model, ids[:8], 12)


# --- tokenizers of every kind ---

# What is told of them, and on which texts it shows.
TOLD = {
    "neox": "does not compose accents",
    "qwen2": "does not compose accents",
    "qwen3": "does not compose accents",
    "nemo": "beyond",
    "gpt4o": "beyond",
    "phi4": "added tokens take the space",
    "phi3": "added tokens take the space",
    "llama2": "takes <s>, </s> for the token",
    "gemma": "takes <s>, </s> for the token",
    "mistral": "begins with one",
    "mistral always": "begins with one",
}
_APART = {"combining", "nfc and nfd", "marks alone"}
_MARKS = {"devanagari", "arabic", "combining", "nfc and nfd"}
_AS_TEXT = {"nul", "marks in text", "joined"}
_SPACES = {"space", "spaces", "spaces and a word", "one space", "two spaces", "metaspace"}
OTHER = {
    "neox": _APART,
    "qwen2": _APART,
    "qwen3": _APART,
    "nemo": _MARKS,
    "gpt4o": _MARKS,
    "llama2": _AS_TEXT,
    "gemma": _AS_TEXT,
    "phi3": _AS_TEXT,
    "mistral": _AS_TEXT | _SPACES,
    "mistral always": _AS_TEXT | _SPACES,
}
REFUSED = {
    "letters": "no name for how",
    "deepseek": "no name for how",
    "digits in runs": "no name for how",
    "merged with previous": "no name for how",
    "space before": "adds a space",
    "old metaspace": "no pre-tokenizer Metaspace",
}


class Pair(NamedTuple):
    """A tokenizer, what llama.cpp makes of it, and what was told of that."""

    name: str
    ours: Tokenizer
    peer: Any
    notes: tuple[str, ...]


@pytest.fixture(scope="module", params=sorted(FAMILY_TOKENIZERS.keys() - REFUSED.keys()))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The model has room for more tokens than there are."""
    folder = folder_of(request.param, tmp_path_factory.mktemp("words"))
    ours = Tokenizer.from_folder(folder)
    size = ours.vocab_size + 7
    words = read_gguf_words(folder, size, start_id=None, end_ids=())
    model = random_weights(replace(GPT2, vocab_size=size, layers=1))
    write_gguf(model, folder / "a.gguf", kind="f32", name="words", words=words)
    return Pair(request.param, ours, opened(folder / "a.gguf", vocab_only=True, logits_all=False), words.notes)


def test_every_kind_of_tokenizer_cuts_text_alike(pair: Pair) -> None:
    assert (pair.name in TOLD) == bool(pair.notes), pair.notes
    assert not pair.notes or TOLD[pair.name] in " ".join(pair.notes)
    start = [] if pair.ours.start_id is None else [pair.ours.start_id]
    other = set()
    for name, text in ALL_TEXTS.items():
        ids = pair.ours.encode(text)
        if pair.peer.tokenize(text.encode(), add_bos=False, special=False) != ids:
            other.add(name)
        else:
            assert pair.peer.tokenize(text.encode(), add_bos=True, special=False) == start + ids
    told = OTHER.get(pair.name, set())
    assert other <= told  # and of those it shows on some, by the words that the training found
    assert bool(other) == bool(told)


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        read_gguf_words(folder_of(name, tmp_path), 2000, start_id=None, end_ids=())
