"""What a folder says of itself in its card, and the kind of its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.spec.card import read_card, tokenizer_kind

CARD = """---
# for the Hub
license: "apache-2.0"  # free
language:
- en
- de
datasets: [a/b, 'c/d']
base_model:
  - owner/base
tags:
- license
model-index:
- name: x
  results: []
---
# A model
license: none of this
"""


def test_facts_of_a_card(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "README.md").write_text(CARD)
    assert read_card(tmp_path) == {
        "license": ["apache-2.0"],
        "base_model": ["owner/base"],
        "language": ["en", "de"],
        "datasets": ["a/b", "c/d"],
    }


@pytest.mark.parametrize("text", ["", "# no front matter\nlicense: mit\n", "---\nlicense: mit\n", "---\n- x\n---\n"])
def test_cards_without_facts(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == {}


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\nlanguage: \xff\r\n---\r\n")
    assert read_card(tmp_path)["license"] == ["mit"]


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}, "byte-level BPE"),
        ({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}, "byte-level BPE"),
        ({"model": {"byte_fallback": True}}, "BPE with bytes to fall back on"),
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ([], "unreadable"),
        ({"model": 3}, "unreadable"),
    ],
)
def test_kinds_of_tokenizer(raw: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert tokenizer_kind(tmp_path) == kind


def test_older_tokenizer_files(tmp_path: Path) -> None:
    assert tokenizer_kind(tmp_path) is None
    (tmp_path / "tokenizer.model").touch()
    assert tokenizer_kind(tmp_path) == "SentencePiece"
    (tmp_path / "vocab.json").touch()
    (tmp_path / "merges.txt").touch()
    assert tokenizer_kind(tmp_path) == "byte-level BPE"
