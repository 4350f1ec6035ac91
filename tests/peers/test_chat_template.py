"""The chat template that gptcli writes into a folder, opened and rendered by transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.text.template import PLAIN, ChatTemplate, open_template, tokenizer_config
from gptcli.text.tokenizer import Tokenizer
from tests.text.test_template import CHATML, CONVERSATIONS, FORGETS

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

EOT = "<|endoftext|>"
SPLITS = ["as trained", "another pattern"]


@pytest.fixture(params=SPLITS)
def folder(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Path:
    """A model folder, in one case with a tokenizer that splits text otherwise than GPT-2's."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    if request.param != "as trained":
        raw = json.loads(file.read_text())
        split = {"type": "Split", "pattern": {"Regex": r"\p{L}|\P{L}+"}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        file.write_text(json.dumps(raw))
    return tmp_path / "model"


def with_template(folder: Path, source: str) -> tuple[Any, ChatTemplate, Tokenizer]:
    """The folder's tokenizer there and here, once a template is written into it."""
    ours = Tokenizer.from_folder(folder)
    template = open_template(folder, ours, 0, 0, source)
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    (folder / "tokenizer_config.json").write_bytes(tokenizer_config(template, 64, files))
    assert open_template(folder, ours, None, None) == template
    return transformers.AutoTokenizer.from_pretrained(folder), template, ours


@pytest.mark.parametrize("source", [PLAIN, CHATML, FORGETS], ids=["plain", "chatml", "forgets"])
def test_they_render_what_we_render(folder: Path, source: str) -> None:
    theirs, template, ours = with_template(folder, source)
    for name, messages in CONVERSATIONS.items():
        if not messages:
            continue
        for prompted in (False, True):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
            assert template.render(messages, add_generation_prompt=prompted) == wanted
            if source == PLAIN and name != "marks":
                ids = theirs.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
                assert template.encode(ours, messages, add_generation_prompt=prompted) == ids


def test_the_tokenizer_opens_as_without_the_template(folder: Path) -> None:
    before = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs, _, ours = with_template(folder, PLAIN)
    text = "Once upon a time, don't  123 日本語\n\nking . "
    ids = theirs.encode(text)
    assert ids == before.encode(text) == ours.encode(text)
    assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (0, 0, 64)
    assert len(theirs) == 300


def test_what_they_save_again_we_read(folder: Path, tmp_path: Path) -> None:
    theirs, template, ours = with_template(folder, PLAIN)
    theirs.save_pretrained(tmp_path / "again")
    assert open_template(tmp_path / "again", ours, None, None) == template
