"""What gptcli exports, opened by llama.cpp: the same ids for a text, the same logits, the same greedy text.

Measured on a CPU in float32, with llama.cpp's cache in float32 too: logits of GPT-2 differ by up to 3e-3 (it looks its
GELU up in half precision), those of the others by up to 2e-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from gptcli.cli import main
from gptcli.core.build import open_model
from gptcli.core.gguf import write_gguf
from gptcli.core.model import Transformer
from gptcli.spec.config import ModelConfig, RopeScaling
from gptcli.text.gguf_words import read_gguf_words
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.core.gguf_models import FAMILIES, GPT2, LLAMA, random_weights
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


# --- tokenizers of every kind, llama.cpp beside the tokenizers library ---

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {"dbrx": _GPT4 + r"\p{N}{1,3}" + _REST, "qwen2": _GPT4 + r"\p{N}" + _REST}


def byte_level(kind: str) -> tokenizers.Tokenizer:
    """A vocabulary trained on the nasty texts, split as the kind's are."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    steps: list[Any] = [whole]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif kind != "gpt-2":
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(PATTERNS[kind]), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text[:2_000] for text in TEXTS.values()] * 3, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return tokenizer


def in_pieces(scheme: str | None) -> tokenizers.Tokenizer:
    """A vocabulary as SentencePiece's become: byte fall-back, spaces as ▁; ``scheme`` None is the older spelling."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme is None:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, max_token_length=12, show_progress=False)
    lines = [line for text in TEXTS.values() for line in text[:600].translate({10: " ", 0: ""}).split("  ")]
    tokenizer.train_from_iterator(lines, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]
    if scheme is not None:
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    **{kind: (lambda kind=kind: byte_level(kind)) for kind in ("gpt-2", "smollm", "dbrx", "qwen2")},
    "pieces": lambda: in_pieces(None),
    "pieces, first": lambda: in_pieces("first"),
    "pieces, never": lambda: in_pieces("never"),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizers.Tokenizer, Any]:
    """A tokenizer, and what llama.cpp makes of it; the model has room for more tokens."""
    tokenizer = request.param()
    tokenizer.encode_special_tokens = True  # those written out in a text are text
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 7
    words = read_gguf_words(folder, size, start_id=None, end_ids=())
    config = replace(GPT2, vocab_size=size, layers=1)
    write_gguf(random_weights(config), folder / "a.gguf", kind="f32", name="words", words=words)
    return tokenizer, opened(folder / "a.gguf", vocab_only=True, logits_all=False)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_every_kind_of_tokenizer_cuts_text_alike(pair: tuple[tokenizers.Tokenizer, Any], text: str) -> None:
    tokenizer, peer = pair
    text = text[:3_000]
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Metaspace):
        text = text.lstrip(" ")  # before a space llama.cpp puts another, as the export tells
    if text:  # before nothing at all tokenizers puts no space
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert peer.tokenize(text.encode(), add_bos=False, special=False) == plain
        assert peer.tokenize(text.encode(), add_bos=True, special=False) == tokenizer.encode(text).ids
