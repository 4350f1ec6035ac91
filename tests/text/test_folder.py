"""The files beside a vocabulary: start tokens, names of special tokens, OPT's folder without a tokenizer.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CorruptError
from gptcli.text.folder import token_names
from gptcli.text.tokenizer import Tokenizer
from tests.text.conftest import EOT, write
from tests.text.families import FAMILIES, folder_of, starting

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
ROBERTA = {
    "type": "RobertaProcessing",
    "sep": [EOT, 0],
    "cls": [EOT, 0],
    "trim_offsets": True,
    "add_prefix_space": False,
}


@pytest.mark.parametrize(
    ("post_processor", "config", "start"),
    [
        (None, None, None),
        (BYTE_LEVEL, None, None),
        (starting(EOT, 0), None, 0),
        ({"type": "Sequence", "processors": [BYTE_LEVEL, starting(EOT, 0)]}, None, 0),
        (ROBERTA, None, 0),
        (starting(EOT, 0), {"add_bos_token": True}, 0),
        (starting(EOT, 0), {"add_bos_token": False}, None),
        (None, {"add_bos_token": True, "bos_token": EOT}, 0),
        (None, {"add_bos_token": True, "bos_token": {"content": EOT, "special": True}}, 0),
        (None, {"add_bos_token": True}, None),
        (None, {"bos_token": EOT}, None),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": EOT, "tokenizer_class": "GPT2Tokenizer"}, None),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token": EOT, "tokenizer_class": "LlamaTokenizerFast"}, 0),
    ],
)
def test_start_token(post_processor: Any, config: Any, start: int | None, tmp_path: Path, trained: Any) -> None:
    raw = copy.deepcopy(trained)
    raw["post_processor"] = post_processor
    folder = write(tmp_path, raw)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(folder).start_id == start


def test_start_tokens_of_families(tmp_path: Path) -> None:
    """Llama puts one before every text; Qwen, SmolLM and NeoX, which have one, don't."""
    starts = {name: Tokenizer.from_folder(folder_of(name, tmp_path)) for name in FAMILIES}
    assert starts["llama3"].start_id == starts["llama3"].special_tokens["<|begin_of_text|>"]
    assert starts["llama2"].start_id == starts["llama2"].special_tokens["<s>"] == 1
    for name in ("qwen2", "qwen3", "smollm2", "neox", "olmo2", "gpt2"):
        assert starts[name].start_id is None


def test_names_of_special_tokens(tmp_path: Path) -> None:
    assert token_names(tmp_path) == {}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<a>"}, "pad_token": "<p>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": None, "legacy": True}))
    assert token_names(tmp_path) == {"bos_token": "<b>", "pad_token": "<p>"}
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CorruptError):
        token_names(tmp_path)


def opt(root: Path, trained: Any) -> Path:
    """OPT's files: special tokens first, ids by frequency, no tokenizer.json, and </s> before every text."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [token for token in trained["model"]["vocab"] if token != EOT]
    vocab = {text: id_ for id_, text in enumerate([*names, *reversed(words), "madeupword0000"])}
    root.mkdir(exist_ok=True)
    (root / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(merge) for merge in trained["model"]["merges"])
    (root / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    token = {
        "__type": "AddedToken",
        "content": "</s>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    config = {
        "errors": "replace",
        "unk_token": token,
        "bos_token": token,
        "eos_token": token,
        "pad_token": {**token, "content": "<pad>"},
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def test_opt(tmp_path: Path, trained: Any) -> None:
    ours = Tokenizer.from_folder(opt(tmp_path / "opt", trained))
    plain = Tokenizer.from_folder(write(tmp_path / "trained", trained))
    assert ours.start_id == 2
    assert ours.special_tokens == {"</s>": 2, "<pad>": 1}
    text = "the quick brown fox</s> isn't"
    assert [ours.token_bytes(id_) for id_ in ours.encode(text)] == [
        plain.token_bytes(id_) for id_ in plain.encode(text)
    ]
    assert ours.encode("a</s>b", special=True)[1:2] == [2]
    assert ours.token_text(ours.vocab_size - 1) == "madeupword0000"


def test_added_tokens_of_older_files(tmp_path: Path, trained: Any) -> None:
    folder = opt(tmp_path, trained)
    size = len(json.loads((folder / "vocab.json").read_text()))
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size, "<extra>": size + 1}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {str(size): {"content": "<|new|>", "special": True, **flags}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("a<|new|>  <extra>b")[-2:] == [size + 1, *ours.encode("b")]
    assert size not in ours.encode("<|new|>")
    assert ours.encode("<|new|>  <extra>", special=True) == [size, size + 1]
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": "x"}))
    with pytest.raises(CorruptError):
        Tokenizer.from_folder(folder)
