"""Fine-tuning data: which tokens are learnt, what is refused and where, and what the windows make of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.errors import CorruptError, NotFoundError, UsageError
from gptcli.text.template import PLAIN, ChatTemplate
from gptcli.text.tokenizer import Tokenizer
from gptcli.train import examples as module
from gptcli.train.documents import held_out_place, is_held_out
from gptcli.train.examples import Examples, examples_of, hold_examples, kind_of

EOT = "<|endoftext|>"
TEMPLATE = ChatTemplate(PLAIN, EOT, EOT)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def marked(examples: Examples, tokenizer: Tokenizer) -> str:
    """The stream as text: what is learnt in »«, the token that parts and ends as |."""
    text, before = b"", 0
    for id_, learnt in zip(examples.tokens, examples.learnt, strict=True):
        text += {(0, 1): "»", (1, 0): "«"}.get((before, int(learnt)), "").encode()
        text += b"|" if id_ == 0 else tokenizer.token_bytes(int(id_))
        before = int(learnt)
    return text.decode()


def read(folder: Path, tokenizer: Tokenizer, *rows: Any, template: ChatTemplate = TEMPLATE) -> Examples:
    train, held_out = examples_of([write(folder, *rows)], tokenizer, template, 0)
    assert held_out is None
    return train


# --- What is learnt


def test_only_answers_and_their_ends_are_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    examples = read(
        tmp_path,
        tokenizer,
        chat("Hello?", "Hello.", "Who are you?", " naïve 👩‍👩‍👧 日本語\n", system="Be brief."),
        "",
        {"prompt": "1 + 1 =", "completion": " 2\n"},
        chat("b", "c", "not answered"),
        {"prompt": "", "completion": "d"},
    )
    assert marked(examples, tokenizer) == (
        "|System:\nBe brief.\n\nUser:\nHello?\n\nAssistant:\n»Hello.|«User:\nWho are you?\n\nAssistant:\n"
        "»naïve 👩‍👩‍👧 日本語|«|1 + 1 =» 2\n|«|User:\nb\n\nAssistant:\n»c|«|»d|«|"
    )
    assert examples.documents == 4
    assert examples.text_bytes == len("Hello.naïve 👩‍👩‍👧 日本語 2\ncd".encode())
    assert (examples.tokens.dtype, examples.learnt.dtype) == (np.uint16, np.uint8)
    assert len(examples.tokens) == len(examples.learnt)


def test_a_prompt_is_encoded_as_it_is_when_the_answer_is_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = chat("one king", "two kings", "the forest", "  the animals")
    tokens = read(tmp_path, tokenizer, row).tokens.tolist()
    messages = row["messages"]
    for turn in (1, 3):
        prompt = TEMPLATE.encode(tokenizer, messages[:turn], add_generation_prompt=True)
        assert tokens[: len(prompt)] == prompt
    assert tokens == [*TEMPLATE.encode(tokenizer, messages, add_generation_prompt=False), 0]
    # Also where the two would make one token together.
    word = max((tokenizer.token_bytes(id_) for id_ in range(1, 300)), key=len).decode()
    both = read(tmp_path, tokenizer, {"prompt": word[:2], "completion": word[2:]}).tokens.tolist()
    assert both == [0, *tokenizer.encode(word[:2]), *tokenizer.encode(word[2:]), 0, 0]
    assert len(tokenizer.encode(word)) == 1


def test_special_tokens_written_in_a_row_are_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"a{EOT}", f"{EOT}b{EOT}", system=EOT), {"prompt": EOT, "completion": EOT}]
    examples = read(tmp_path, tokenizer, *rows)
    # Start and end of each of the two, and the stream's end.
    assert examples.tokens.tolist().count(0) == 5
    assert marked(examples, tokenizer) == (
        f"|System:\n{EOT}\n\nUser:\na{EOT}\n\nAssistant:\n»{EOT}b{EOT}|«|{EOT}»{EOT}|«|"
    )
    assert examples.text_bytes == len(f"{EOT}b{EOT}{EOT}")


def test_a_lone_surrogate_is_learnt_as_the_replacement_character(tmp_path: Path, tokenizer: Tokenizer) -> None:
    examples = read(tmp_path, tokenizer, r'{"prompt": "\ud800", "completion": "a\ud800"}')
    assert marked(examples, tokenizer) == "|\ufffd»a\ufffd|«|"
    assert examples.text_bytes == len("a\ufffd".encode())


def test_another_template_decides_where_answers_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # No start token, no end token: the end is added, the start stands before in any case.
    bare = ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}", "", EOT)
    assert marked(read(tmp_path, tokenizer, chat("a", "b"), template=bare), tokenizer) == "|<a>»<b>|«|"
    # One that forgets how earlier answers began: an example for each.
    forgets = ChatTemplate(
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else m.content[1:] }}"
        "{{ eos_token }}{% endfor %}",
        "",
        EOT,
    )
    examples = read(tmp_path, tokenizer, chat("xa", "xb", "xc", "xd"), template=forgets)
    assert marked(examples, tokenizer) == "|xa|»xb|«|xa|b|xc|»xd|«|"
    assert examples.documents == 2
    assert examples.text_bytes == 4


def test_rows_in_groups_join_to_the_same_stream(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [chat(f"question {i}", "answer " * (i % 4 + 1), f"more {i}", "yes") for i in range(15)]
    rows += [{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(15)]
    whole = read(tmp_path, tokenizer, *rows)
    for size in (1, 7):
        monkeypatch.setattr(module, "_GROUP", size)
        again = read(tmp_path, tokenizer, *rows)
        assert np.array_equal(again.tokens, whole.tokens)
        assert np.array_equal(again.learnt, whole.learnt)


def test_a_large_vocabulary_takes_wider_tokens(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", (1 << 16) + 1)
    assert read(tmp_path, tokenizer, chat("a", "b")).tokens.dtype == np.uint32


def test_an_example_longer_than_the_context_is_learnt_in_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = "abcdefg " * 40
    rows = [chat("x", "y"), chat(long, long), *(chat(f"{i}", f"{i}") for i in range(20))]
    examples = read(tmp_path, tokenizer, *rows)
    ends = np.flatnonzero(examples.tokens == 0)
    context = 32
    assert examples.longest == ends[3] - ends[2] + 1 > 5 * context
    assert int(examples.learnt.sum()) == sum(
        len(tokenizer.encode(row["messages"][1]["content"].strip())) + 1 for row in rows
    )
    # Windows that lie within its answer learn every token, those within its question none.
    whole = [window.sum() for window in np.split(examples.learnt[ends[2] : ends[3]], range(context, 400, context))]
    assert whole.count(context) >= 2
    assert whole.count(0) >= 2


# --- What is refused


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ({"text": "a"}, "neither messages nor a prompt"),
        ({"prompt": "a"}, "neither messages nor a prompt"),
        ({"prompt": ["a"], "completion": "b"}, "the prompt is not a text"),
        ({"prompt": "a", "completion": None}, "the completion is not a text"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ({"messages": None}, "not a list"),
        ({"messages": []}, "no message is the assistant's"),
        (chat("a"), "no message is the assistant's"),
        (chat("a", ""), "message 2 is empty"),
        ({"messages": [{"role": "human", "content": "a"}]}, "message 1 has the role 'human'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no text"),
        ({"messages": ["a"]}, "message 1 is not an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, tokenizer: Tokenizer, row: Any, problem: str) -> None:
    path = write(tmp_path, chat("a", "b"), "", row)
    with pytest.raises(CorruptError, match=f"line 3: .*{problem}") as caught:
        examples_of([path], tokenizer, TEMPLATE, 0)
    assert path in caught.value.message
    assert caught.value.hint


def test_a_template_that_refuses_or_hides_an_answer_names_the_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, chat("a", "b"))
    refuses = "{{ raise_exception('roles must alternate') }}"
    hides = "{% for m in messages|reverse %}{{ m.content }}{% endfor %}"
    for source, problem in ((refuses, "roles must alternate"), (hides, "behind the prompt")):
        with pytest.raises(CorruptError, match=f"line 1: .*{problem}"):
            examples_of([path], tokenizer, ChatTemplate(source, EOT, EOT), 0)


def test_no_rows_no_file_and_no_end_token_are_errors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no example"):
        examples_of([write(tmp_path, "", "")], tokenizer, TEMPLATE, 0)
    with pytest.raises(NotFoundError):
        examples_of([str(tmp_path / "none.jsonl")], tokenizer, TEMPLATE, 0)
    with pytest.raises(UsageError, match="'</s>'"):
        examples_of([write(tmp_path, chat("a", "b"))], tokenizer, ChatTemplate(PLAIN, "", "</s>"), 0)


# --- Which kind, and what is held out


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text": "a"}, "text"),
        ({"text": "a", "messages": []}, "text"),
        ({"text": None, "messages": []}, "messages"),
        (chat("a", "b"), "messages"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a", "completion": "b"}, "completion"),
    ],
)
def test_the_first_row_says_what_a_file_holds(tmp_path: Path, row: Any, kind: str) -> None:
    path = write(tmp_path, "", row, "{")
    assert kind_of(path) == kind
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(path).read_bytes()))
    assert kind_of(str(packed)) == kind
    assert hold_examples([path, str(packed)]) == (kind != "text")


def test_a_field_that_is_named_counts_first(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "a", "completion": "b"})
    assert kind_of(path, "prompt") == "text"


@pytest.mark.parametrize("row", ["{", "[]", {"prompt": "a"}, {"body": "a"}])
def test_a_first_row_of_no_kind_is_an_error(tmp_path: Path, row: Any) -> None:
    with pytest.raises(CorruptError, match=r"data\.jsonl line 1"):
        kind_of(write(tmp_path, row))


def test_text_and_examples_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, chat("a", "b"), name="chat.jsonl")
    (tmp_path / "text.txt").write_text("text")
    assert kind_of("-") == "text"
    assert not hold_examples(["-", str(tmp_path / "text.txt")])
    with pytest.raises(UsageError, match=r"text\.txt holds text, .*chat\.jsonl examples"):
        hold_examples([str(tmp_path)])


def test_rows_are_held_out_by_what_they_say(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"{i} ", "completion": "x" * (i + 1)} for i in range(200)]
    path = write(tmp_path, *rows)
    whole, _ = examples_of([path], tokenizer, TEMPLATE, 0)
    train, held_out = examples_of([path], tokenizer, TEMPLATE, 0, held_out=0.1)
    assert held_out is not None
    assert 5 <= held_out.documents <= 40
    assert train.documents + held_out.documents == 200
    assert train.text_bytes + held_out.text_bytes == whole.text_bytes
    # In another order, spaced otherwise, or in two files: the same rows.
    other = write(
        tmp_path, *(json.dumps(row, indent=None, separators=(" ,", " :")) for row in rows[::-1]), name="b.jsonl"
    )
    _, again = examples_of([other], tokenizer, TEMPLATE, 0, held_out=0.1)
    assert again is not None
    assert sorted(marked(again, tokenizer).split("«")) == sorted(marked(held_out, tokenizer).split("«"))
    assert (again.documents, again.text_bytes) == (held_out.documents, held_out.text_bytes)
    # A file named twice counts twice in training only.
    twice, once = examples_of([path, path], tokenizer, TEMPLATE, 0, held_out=0.1)
    assert once is not None
    assert (twice.documents, once.documents) == (2 * train.documents, held_out.documents)


def test_the_place_of_a_document_agrees_with_whether_it_is_held_out() -> None:
    places = [held_out_place(f"document {i}") for i in range(300)]
    assert 0 <= min(places) < 0.05
    assert 0.95 < max(places) <= 1
    for fraction in (0.0, 0.01, 0.5, 1.0):
        assert [place < fraction for place in places] == [is_held_out(f"document {i}", fraction) for i in range(300)]


def test_of_few_rows_one_is_held_out_and_of_very_few_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [chat(f"{i}", f"{i}") for i in range(30)]
    train, held_out = examples_of([write(tmp_path, *rows)], tokenizer, TEMPLATE, 0, held_out=1e-9)
    assert held_out is not None
    assert (train.documents, held_out.documents) == (29, 1)
    train, held_out = examples_of([write(tmp_path, *rows[:19])], tokenizer, TEMPLATE, 0, held_out=0.5)
    assert (train.documents, held_out) == (19, None)
    train, held_out = examples_of([write(tmp_path, *(rows[:1] * 30))], tokenizer, TEMPLATE, 0, held_out=1e-9)
    assert (train.documents, held_out) == (30, None)
