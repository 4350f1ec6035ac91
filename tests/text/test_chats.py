"""Conversations as published models have them: rendered, and as the very tokens that the whole text has."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gptcli.errors import CorruptError
from gptcli.text.template import ChatTemplate, open_template, read_template
from gptcli.text.tokenizer import Tokenizer
from tests.text.chats import CHATS, LLAMA3, MISTRAL, PHI3, QWEN3, SMOLLM, ZEPHYR
from tests.text.families import folder_of
from tests.text.test_template import said

CONVERSATIONS = {
    "a question": said("the quick fox?"),
    "a scene": said("Hello, world 日本", system="Be brief."),
    "turns": said("the fox", "The answer is 42.", "  why?\n", "Because.\n\nOf that.", "and 😀?", system="Be brief."),
    "thoughts": said("a", "<think>\nb\n</think>\n\nthe fox", "c"),
}


@pytest.fixture(params=CHATS)
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ChatTemplate, Tokenizer, tokenizers.Tokenizer]:
    family, source, start, end = CHATS[request.param]
    folder = folder_of(family, tmp_path)
    config = {"bos_token": start, "eos_token": {"content": end, "special": True}, "chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_folder(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return open_template(folder, ours, None, None), ours, theirs


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_those_of_the_whole_text(name: str, chat: tuple[ChatTemplate, Tokenizer, Any]) -> None:
    template, ours, theirs = chat
    messages = CONVERSATIONS[name]
    text = template.render(messages, add_generation_prompt=True)
    ids = template.encode(ours, messages)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    starts = [id_ for id_ in ids if id_ == ours.special_tokens.get(template.bos_token)]
    assert len(starts) <= 1 or template.bos_token == template.eos_token


def test_llama3() -> None:
    template = ChatTemplate(LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    century = datetime.now().strftime("%Y")[:2]
    assert template.render(said(" Hi "), add_generation_prompt=True) == (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: {century}\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_qwen3() -> None:
    text = ChatTemplate(QWEN3).render(said("a", "<think>x</think>\nb", "c", system="s"), add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_mistral() -> None:
    template = ChatTemplate(MISTRAL, "<s>", "</s>")
    assert template.render(said("a", "b ", "c", system="s")) == "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST]"
    with pytest.raises(CorruptError, match="must alternate"):
        template.render([*said("a"), *said("b")])


def test_zephyr() -> None:
    text = ChatTemplate(ZEPHYR, "<s>", "</s>").render(said("a", system="s"), add_generation_prompt=True)
    assert text == "<|system|>\ns</s>\n<|user|>\na</s>\n<|assistant|>\n"


def test_phi3_and_smollm() -> None:
    assert ChatTemplate(PHI3).render(said("a"), add_generation_prompt=True) == "<|user|>\na<|end|>\n<|assistant|>\n"
    assert ChatTemplate(SMOLLM).render(said("a", " b ")) == (
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "d"}))
    assert read_template(tmp_path) == "d"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "c"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_template(tmp_path) == "c"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"default": "b", "rag": "r"}}))
    assert read_template(tmp_path) == "b"
    (tmp_path / "chat_template.jinja").write_text("a")
    assert read_template(tmp_path) == "a"


def test_token_names_of_the_older_file(tmp_path: Path) -> None:
    folder = folder_of("llama2", tmp_path)
    names = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text("{{ bos_token + eos_token }}")
    template = open_template(folder, Tokenizer.from_folder(folder), None, None)
    assert (template.bos_token, template.eos_token) == ("<s>", "</s>")
