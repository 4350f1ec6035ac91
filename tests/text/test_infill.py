"""The prompt that a middle is written from, by the marks that a tokenizer has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcli.text.infill import Infill
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import tiny_tokenizer

KINDS = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "santacoder": ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "codellama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    "deepseek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
}


def with_tokens(folder: Path, *texts: str, special: bool = True) -> Tokenizer:
    """The tiny tokenizer with more special tokens, whose ids follow its own."""
    raw = json.loads(tiny_tokenizer())
    first = raw["added_tokens"][0]
    raw["added_tokens"] += [
        {**first, "id": 300 + number, "content": text, "special": special} for number, text in enumerate(texts)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [True, False])
def test_the_middle_comes_last(kind: str, special: bool, tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, *KINDS[kind], special=special)
    infill = Infill.of(tokenizer)
    assert infill
    assert (infill.prefix, infill.suffix, infill.middle) == (300, 301, 302)
    before, after = tokenizer.encode("Once upon"), tokenizer.encode(" time")
    assert infill.prompt(tokenizer, before, " time") == [300, *before, 301, *after, 302]
    assert infill.prompt(tokenizer, [], "") == [300, 301, 302]
    assert set(KINDS[kind]) <= set(infill.ends)
    assert "<|endoftext|>" in infill.ends


def test_a_tokenizer_without_all_of_them_has_none(tmp_path: Path) -> None:
    assert Infill.of(with_tokens(tmp_path)) is None
    for kind in KINDS.values():
        assert Infill.of(with_tokens(tmp_path, *kind[:2])) is None
    assert Infill.of(with_tokens(tmp_path, KINDS["qwen"][0], *KINDS["starcoder"][1:])) is None


def test_marks_written_out_in_the_suffix_are_text(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, *KINDS["qwen"])
    infill = Infill.of(tokenizer)
    assert infill
    ids = infill.prompt(tokenizer, [], "<|fim_middle|>a<|endoftext|>")
    assert ids.count(302) == 1
    assert 0 not in ids
    assert tokenizer.decode(ids[2:-1]) == "<|fim_middle|>a<|endoftext|>"
