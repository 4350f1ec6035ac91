"""gptcli and transformers, live: each opens what the other writes, and logits, greedy text and token ids agree.

Measured on a CPU: float32 logits differ by at most 2.2e-6, on the tiny models and on the one of GPT-2's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcli.core.build import open_model, random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.decode import Decoder
from gptcli.core.model import Transformer
from gptcli.spec.config import from_hf
from gptcli.spec.index import FILE_NAME, INDEX_NAME, read_folder
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

TOLERANCE = 1e-5
TINY = {"vocab_size": 311, "n_positions": 256, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu", "n_head": 1},
    "relu": {"activation_function": "relu", "n_inner": 100},
    "silu": {"activation_function": "silu", "n_inner": 20, "layer_norm_epsilon": 1e-2},
    "untied": {"tie_word_embeddings": False},
}
# What a file may look like; see `rewrite`.
LAYOUTS = ["as saved", "sharded", "no prefix", "mask buffers", "no prefix, sharded", "no prefix, mask buffers"]


def peer_model(**settings: Any) -> Any:
    """A random model of transformers', every parameter of a size that shows."""
    config = transformers.GPT2Config(**{**settings, "bos_token_id": None, "eos_token_id": None})
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(float("ln_" in name and name.endswith("weight")), config.initializer_range)
    return model


def rewrite(folder: Path, layout: str, config: Any) -> None:
    """Make the files of a folder look as those of an older program."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if "no prefix" in layout:
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        if "mask buffers" in layout:
            prefix = "" if "no prefix" in layout else "transformer."
            for layer in range(config.n_layer):
                size = config.n_positions
                tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, size, size).tril().bool()
                tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, file, metadata={"format": "pt"})
    index = folder / INDEX_NAME
    if index.exists() and "no prefix" in layout:
        index.write_text(index.read_text().replace('"transformer.', '"'))


def load(folder: Path, dtype: str = "float32") -> Transformer:
    return open_model(folder, None, device="cpu", dtype=dtype).transformer  # type: ignore[arg-type]


def some_ids(model: Any, rows: int = 2, count: int = 24) -> Tensor:
    return torch.randint(model.config.vocab_size, (rows, count), generator=torch.Generator().manual_seed(1))


def greedy(transformer: Transformer, prompt: list[int], count: int) -> list[int]:
    decoder = Decoder(transformer)
    logits = decoder.prefill([prompt], len(prompt) + count)
    made = [int(logits.argmax(-1))]
    while len(made) < count:
        made.append(int(decoder.step(torch.tensor(made[-1:])).argmax(-1)))
    return made


@torch.no_grad()
def peer_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return made[0, len(prompt) :].tolist()


@torch.no_grad()
def difference(ours: Transformer, theirs: Any) -> float:
    ids = some_ids(theirs)
    wanted = theirs(ids).logits
    assert wanted.std() > 0.1
    return float((ours(ids) - wanted).abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_folder_of_theirs_gives_their_logits(tmp_path: Path, kind: str, layout: str) -> None:
    theirs = peer_model(**{**TINY, **KINDS[kind]})
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if "sharded" in layout else "1GB")
    rewrite(tmp_path, layout, theirs.config)
    disk = read_folder(tmp_path)
    assert (len({info.file for info in disk.values()}) > 1) == ("sharded" in layout)
    assert ("wte.weight" in disk) == ("no prefix" in layout)
    assert any(name.endswith("masked_bias") for name in disk) == ("mask" in layout)
    assert difference(load(tmp_path), theirs) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_over_200_tokens(tmp_path: Path, kind: str) -> None:
    theirs = peer_model(**{**TINY, **KINDS[kind]})
    theirs.save_pretrained(tmp_path)
    prompt = some_ids(theirs)[0].tolist()
    made = greedy(load(tmp_path), prompt, 200)
    assert made == peer_greedy(theirs, prompt, 200)


@pytest.fixture(scope="module")
def full_size() -> Any:
    """GPT-2's own sizes, 124 million parameters."""
    model = peer_model()
    assert 124e6 < model.num_parameters() < 125e6
    return model


@pytest.mark.parametrize("layout", ["as saved", "no prefix, sharded"])
def test_a_folder_of_124_million_gives_their_logits_and_text(tmp_path: Path, full_size: Any, layout: str) -> None:
    full_size.save_pretrained(tmp_path, max_shard_size="200MB" if "sharded" in layout else "1GB")
    rewrite(tmp_path, layout, full_size.config)
    ours = load(tmp_path)
    assert difference(ours, full_size) <= TOLERANCE
    if layout == "as saved":
        prompt = some_ids(full_size, count=16)[0].tolist()
        assert greedy(ours, prompt, 200) == peer_greedy(full_size, prompt, 200)


def our_model(**settings: Any) -> Transformer:
    model = random_model(from_hf({"model_type": "gpt2", **TINY, **settings}), 3).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_they_open_what_we_save(tmp_path: Path, kind: str, dtype: torch.dtype, shard_bytes: int) -> None:
    ours = our_model(**KINDS[kind])
    save_folder(ours, tmp_path, dtype=dtype, shard_bytes=shard_bytes)
    assert (tmp_path / FILE_NAME).exists() == (shard_bytes == 10**9)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    back = load(tmp_path)
    assert difference(back, theirs.eval()) <= TOLERANCE
    if dtype == torch.float32:
        assert difference(ours, theirs) <= TOLERANCE
    assert theirs.config.n_layer == 3
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr() or kind == "untied"


def test_they_take_our_dtype_from_the_config(tmp_path: Path) -> None:
    save_folder(our_model(), tmp_path, dtype=torch.bfloat16)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_a_round_trip_through_both_keeps_every_bit(tmp_path: Path) -> None:
    theirs = peer_model(**{**TINY, "n_inner": 100, "tie_word_embeddings": False})
    theirs.save_pretrained(tmp_path / "theirs")
    save_folder(load(tmp_path / "theirs"), tmp_path / "ours", dtype=torch.float32)
    back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


TEXTS = [
    "",
    "Once upon a time there was a king.",
    "  spaces   and\n\nlines\t\ttabs ",
    "don't we'll I'm they've",
    "1234567890 3.14159",
    "naïve café — “quotes” … 日本語 😀👩‍👩‍👧 e\u0301",
    "a\u00a0b\u2028c\x00d\r\n",
    "x" * 200,
]


@pytest.mark.parametrize("opener", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_that_we_trained_gives_equal_ids(tiny_folder: Path, opener: str) -> None:
    ours = Tokenizer.from_folder(tiny_folder)
    if opener == "AutoTokenizer":
        theirs = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    else:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tiny_folder / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids) == text
    assert theirs.encode("a<|endoftext|>b") == ours.encode("a<|endoftext|>b", special=True)


def test_the_shipped_model_is_the_same_model_there() -> None:
    """``fable`` opens with the Auto classes: equal ids, logits to 1e-4 (measured 2e-5, at logits of size 20)."""
    folder = ROOT / "weights" / "fable"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ours = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    text = 'Once upon a time, the king\'s daughter said: "Ümlaut 123 👩‍👩‍👧"\n\nEnd  '
    assert words(text)["input_ids"] == ours.tokenizer.encode(text)
    assert words.eos_token_id == ours.config.eos_ids[0]
    ids = torch.tensor([ours.tokenizer.encode(text)])
    with torch.inference_mode():
        assert (theirs(ids).logits - ours.transformer(ids)).abs().max() < 1e-4
