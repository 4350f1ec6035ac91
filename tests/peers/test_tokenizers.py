"""Every family's tokenizer, start token and conversations as transformers' AutoTokenizer has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.text.template import open_template
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.data import train_tokenizer
from tests.text.chats import CHATS
from tests.text.conftest import corpus
from tests.text.families import ALL_TEXTS, FAMILIES, folder_of
from tests.text.test_chats import CONVERSATIONS
from tests.text.test_folder import opt

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer


def both(folder: Path, **config: Any) -> tuple[Tokenizer, Any]:
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_text(name: str, tmp_path: Path) -> None:
    ours, theirs = both(folder_of(name, tmp_path))
    for text in ALL_TEXTS.values():
        plain = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == plain
        parsed = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=True) == parsed
        if name != "old metaspace" or not text.startswith((" ", "▁")):
            assert ours.decode(plain) == theirs.decode(plain)
        start = [] if ours.start_id is None else [ours.start_id]
        assert start + parsed == theirs.encode(text)


@pytest.mark.parametrize("name", CHATS)
def test_conversations(name: str, tmp_path: Path) -> None:
    family, source, start, end = CHATS[name]
    ours, theirs = both(folder_of(family, tmp_path), bos_token=start, eos_token=end, chat_template=source)
    template = open_template(tmp_path / family, ours, None, None)
    for messages in CONVERSATIONS.values():
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages, add_generation_prompt=True) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert template.encode(ours, messages) == ids


def test_opt(tmp_path: Path) -> None:
    folder = opt(tmp_path / "opt", json.loads(train_tokenizer(corpus(), 700)))
    ours, theirs = Tokenizer.from_folder(folder), transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in ALL_TEXTS.values():
        assert [ours.start_id, *ours.encode(text, special=True)] == theirs.encode(text)
