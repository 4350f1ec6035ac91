"""Chat templates: the plain transcript, other models' Jinja, what a message can't do, and the files of a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from gptcli.errors import CorruptError, UsageError
from gptcli.text.template import (
    PLAIN,
    ChatTemplate,
    Message,
    Shield,
    check_messages,
    open_template,
    read_template,
    tokenizer_config,
)
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT

EOT = "<|endoftext|>"
PLAIN_TEMPLATE = ChatTemplate(PLAIN, EOT, EOT)
# The form of ChatML, and the same written as a template that drops what stands in <think> from earlier answers.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FORGETS = (
    "{% for message in messages %}[{{ message.role }}] "
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] <think>{% endif %}"
)


def said(*contents: str, system: str = "") -> list[Message]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else list(turns)


CONVERSATIONS = {
    "a question": said("Hello?"),
    "an answer": said("Hello?", "Hello."),
    "turns": said("a", "b", "c", "d", "e", system="Be brief."),
    "white space": said("  a\n\n", "\n b \t", "\u00a0c\u2003", system="\nx\n"),
    "unicode": said("你好，世界 👩‍👩‍👧", "e\u0301 “naïve” {{ messages }} {% raw %}", system="日本語"),
    "marks": said(f"what is {EOT}?", f"{EOT} ends a text{EOT}"),
    "an assistant first": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hi."}],
    "nothing": [],
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_plain_template_is_what_its_jinja_says(name: str, prompted: bool) -> None:
    messages = CONVERSATIONS[name]
    # A comment, so that it goes through Jinja.
    jinja = ChatTemplate(PLAIN + "{# #}", EOT, EOT)
    assert PLAIN_TEMPLATE.render(messages, add_generation_prompt=prompted) == jinja.render(
        messages, add_generation_prompt=prompted
    )


def test_the_plain_template_is_a_transcript() -> None:
    text = PLAIN_TEMPLATE.render(said("Hello?", " Hello.\n", "Who?", system="Be brief."), add_generation_prompt=True)
    assert text == (f"{EOT}System:\nBe brief.\n\nUser:\nHello?\n\nAssistant:\nHello.{EOT}User:\nWho?\n\nAssistant:\n")


def test_neither_jinja_nor_torch_is_imported_for_the_plain_template() -> None:
    code = (
        "import sys; from gptcli.text.template import ChatTemplate; "
        "ChatTemplate().render([{'role': 'user', 'content': 'x'}]); "
        "sys.exit(str({'jinja2', 'torch', 'numpy', 'tiktoken'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", "not a list"),
        ({"role": "user"}, "not a list"),
        (["hello"], "message 1 is not an object"),
        ([*said("a"), {"role": "robot", "content": "b"}], "message 2 has the role 'robot'"),
        ([{"content": "b"}], "message 1 has the role None"),
        ([{"role": ["user"], "content": "b"}], "message 1 has the role"),
        ([{"role": "user", "content": None}], "message 1 has no text"),
        ([{"role": "user", "content": [{"type": "text", "text": "b"}]}], "message 1 has no text"),
        (said("a", " \n"), "message 2 is empty"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        check_messages(messages)
    with pytest.raises(CorruptError, match=problem):
        PLAIN_TEMPLATE.render(messages)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}\n  {% if loop.first %}\nfirst\n  {% endif %}\n{% endfor %}", "first\n"),
        ("{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}", "<s></s>False"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "<é>&"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>&"}]'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if tools %}tools{% endif %}{{ missing }}", ""),
        ("{% set x = namespace(y=1) %}{% set x.y = 2 %}{{ x.y }}", "2"),
        ("{{ strftime_now('%%') }}", "%"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, text: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render(said("<é>&")) == text


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for %}", "can't be read"),
        ("{{ messages | nothing }}", "can't be read"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ messages.append(1) }}", "fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
        ("{{ messages.__init__.__globals__ }}", "fails"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails"),
        ("{% include '/etc/passwd' %}", "fails"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error(source: str, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        ChatTemplate(source).render(said("x"))


# --- Tokens


def test_special_tokens_in_messages_stay_plain_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens[EOT]
    messages = said(f"a {EOT} b", f"{EOT}", f"\ufdd00\ufdd0 {EOT[:5]}{EOT}", system=EOT)
    ids = PLAIN_TEMPLATE.encode(tokenizer, messages)
    assert ids[0] == end
    assert ids.count(end) == 2  # the start, and the end of the one answer
    assert tokenizer.decode(ids) == PLAIN_TEMPLATE.render(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "marks"])
def test_the_ids_are_those_of_the_text_where_no_message_holds_special_tokens(tokenizer: Tokenizer, name: str) -> None:
    text = PLAIN_TEMPLATE.render(CONVERSATIONS[name], add_generation_prompt=True)
    assert PLAIN_TEMPLATE.encode(tokenizer, CONVERSATIONS[name]) == tokenizer.encode(text, special=True)


def test_a_shielded_text_comes_back_whole(tokenizer: Tokenizer) -> None:
    shield = Shield(tokenizer)
    for text in ("", EOT, EOT * 3, f"<|end{EOT}oftext|>", "\ufdd0", "\ufdd01\ufdd0", f"\ufdd0{EOT}\ufdd0\ufdd0", "é"):
        assert EOT not in shield.text(text)
        assert shield.plain(shield.text(text)) == text
        assert shield.parts(f"{EOT}{shield.text(text)}") == [0, *([text] if text else [])]


# --- Where the answers are


def marked(template: ChatTemplate, tokenizer: Tokenizer, messages: list[Message]) -> list[str]:
    """The texts to learn from, answers in »«."""
    shield = Shield(tokenizer)
    lessons = template.lessons(shield.messages(messages), shield)
    return [
        "".join(f"»{shield.plain(text)}«" if answer else shield.plain(text) for text, answer in one) for one in lessons
    ]


def test_answers_are_found_with_the_mark_that_ends_them(tokenizer: Tokenizer) -> None:
    messages = said("a", f"b {EOT}", "c", "a", "never answered", system="s")
    assert marked(PLAIN_TEMPLATE, tokenizer, messages) == [
        f"{EOT}System:\ns\n\nUser:\na\n\nAssistant:\n»b {EOT}{EOT}«User:\nc\n\nAssistant:\n»a{EOT}«"
    ]


def test_answers_are_found_in_other_templates(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chatml = with_tokens(tmp_path, "<|im_start|>", "<|im_end|>")
    head = "<|im_start|>assistant\n"
    assert marked(ChatTemplate(CHATML), chatml, said("a", "b", "c", "d")) == [
        f"<|im_start|>user\na<|im_end|>\n{head}»b<|im_end|>«\n<|im_start|>user\nc<|im_end|>\n{head}»d<|im_end|>«\n"
    ]
    # Without a mark behind it, an answer ends with its text.
    assert marked(ChatTemplate("{% for m in messages %}({{ m.content }}){% endfor %}"), tokenizer, said("a", "b")) == [
        "(a)»(b)«"
    ]


def test_a_template_that_rewrites_earlier_answers_gives_one_text_an_answer(tokenizer: Tokenizer) -> None:
    messages = said("a", "<think>hm</think>b", "c", "<think>oh</think>d")
    assert marked(ChatTemplate(FORGETS, EOT, EOT), tokenizer, messages) == [
        f"[user] a{EOT}[assistant] <think>»hm</think>b{EOT}«",
        f"[user] a{EOT}[assistant] b{EOT}[user] c{EOT}[assistant] <think>»oh</think>d{EOT}«",
    ]


def test_added_tokens_that_are_not_special_are_seen_by_the_template_and_stay_tokens(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "</think>", special=False)
    messages = said("a</think>", "x</think>b", "c")
    ids = ChatTemplate(FORGETS, EOT, EOT).encode(tokenizer, messages)
    assert tokenizer.decode(ids) == f"[user] {EOT}[assistant] b{EOT}[user] c{EOT}[assistant] <think>"
    assert PLAIN_TEMPLATE.encode(tokenizer, messages).count(300) == 2


def with_tokens(folder: Path, *tokens: str, special: bool = True) -> Tokenizer:
    """The tiny tokenizer with more added tokens."""
    from tests.conftest import tiny_tokenizer

    raw = json.loads(tiny_tokenizer())
    for place, token in enumerate(tokens):
        raw["added_tokens"].append({**raw["added_tokens"][0], "content": token, "id": 300 + place, "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return Tokenizer.from_folder(folder)


# --- Folders


def test_a_folders_template_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert read_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "one"}))
    assert read_template(tmp_path) == "one"
    config.write_text(
        json.dumps({"chat_template": [{"name": "x", "template": "1"}, {"name": "default", "template": "2"}]})
    )
    assert read_template(tmp_path) == "2"
    (tmp_path / "chat_template.jinja").write_text("fileé", encoding="utf-8")
    assert read_template(tmp_path) == "fileé"


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 3}', "[" * 100_000])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CorruptError, match=tmp_path.name):
        read_template(tmp_path)


def test_the_marks_come_from_the_tokenizers_config_or_the_ids(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "<s>", "</s>")
    assert open_template(tmp_path, tokenizer, 0, 0) == PLAIN_TEMPLATE
    assert open_template(tmp_path, tokenizer, 300, 301) == ChatTemplate(PLAIN, "<s>", "</s>")
    config = {"bos_token": None, "eos_token": {"content": "</s>"}, "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_template(tmp_path, tokenizer, None, 0) == ChatTemplate(CHATML, "", "</s>")
    assert open_template(tmp_path, tokenizer, None, 0, source=PLAIN) == ChatTemplate(PLAIN, "", "</s>")
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no token that ends"):
        open_template(tmp_path, tokenizer, None, None)


def test_a_written_tokenizer_config_is_read_again(tmp_path: Path) -> None:
    tokenizer = with_tokens(tmp_path, "</s>")
    template = ChatTemplate(PLAIN, EOT, "</s>")
    written = tokenizer_config(template, 64, {"tokenizer.json": b""})
    assert json.loads(written)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads(written)["model_max_length"] == 64
    (tmp_path / "tokenizer_config.json").write_bytes(written)
    assert open_template(tmp_path, tokenizer, None, None) == template
    assert json.loads(tokenizer_config(template, 64, {"vocab.json": b"", "merges.txt": b""}))["tokenizer_class"] == (
        "GPT2Tokenizer"
    )


def test_an_existing_tokenizer_config_is_kept_but_for_the_template() -> None:
    existing = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "chat_template": "old", "é": [1]}
    files = {"tokenizer_config.json": json.dumps(existing).encode()}
    changed = {**existing, "chat_template": PLAIN, "model_max_length": 9}
    assert json.loads(tokenizer_config(ChatTemplate(), 9, files)) == changed
    with pytest.raises(CorruptError, match=r"tokenizer_config\.json"):
        tokenizer_config(ChatTemplate(), 9, {"tokenizer_config.json": b"\xff"})


def test_jinja_is_new_enough_to_be_safe() -> None:
    """Older releases have known ways out of the sandbox."""
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)
