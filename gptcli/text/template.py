"""Chat messages -> one prompt: a plain transcript of our own, or the Jinja template that a model brings.

The plain transcript needs no token that a base model lacks. Each message stands under its role, a blank line behind it;
an answer ends with the end-of-text token, which generation stops at anyway::

    <|endoftext|>System:
    Be brief.

    User:
    Hello?

    Assistant:
    Hello.<|endoftext|>User:
    ...

The role has a line of its own because byte-level BPE joins a space with the word behind it: after ``Assistant: `` an
answer would begin with a token that the model has hardly seen, after a line break it begins as any line does. White
space around a message is taken off, so where an answer starts no token can straddle.

What a message says is never a token of the template's: special tokens written out in it stay plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from gptcli.errors import CorruptError, UnsupportedError, UsageError
from gptcli.text.folder import token_names
from gptcli.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

# The same as `_plain` below, for other programs.
PLAIN = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{{- eos_token if message['role'] == 'assistant' else '\\n\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}"
)

Message = Mapping[str, str]


class Piece(NamedTuple):
    """Part of a rendered conversation; ``answer``: an assistant's words and the mark that ends them."""

    text: str
    answer: bool


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are written for one model.

    Attributes:
        source: a Jinja template; ``PLAIN`` is rendered without Jinja.
        bos_token, eos_token: the texts of the tokens that start a text and end an answer.
    """

    source: str = PLAIN
    bos_token: str = ""
    eos_token: str = ""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The messages as one text, with the opening of an answer behind them if told.

        Only ``role`` and ``content`` of a message reach the template. Raises CorruptError for messages that are none,
        or that the template refuses, and for a template that can't be read or fails.
        """
        check_messages(messages)
        return self._render(messages, add_generation_prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self.source == PLAIN:
            return self._plain(messages, add_generation_prompt)
        try:
            return _compiled(self.source).render(
                messages=[{"role": message["role"], "content": message["content"]} for message in messages],
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (CorruptError, UnsupportedError):
            raise
        except Exception as error:  # a template is a program: it can fail in any way
            hint = "look at its chat_template, or at the order of the roles"
            raise CorruptError(f"the chat template fails on these messages: {error}", hint) from None

    def _plain(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.bos_token
        for message in messages:
            end = self.eos_token if message["role"] == "assistant" else "\n\n"
            text += f"{message['role'].capitalize()}:\n{message['content'].strip()}{end}"
        return text + "Assistant:\n" * add_generation_prompt

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation as fine-tuning sees it: piece by piece, special tokens from the template alone.

        Raises CorruptError as ``render`` does.
        """
        check_messages(messages)
        shield = Shield(tokenizer)
        shielded = shield.messages(messages)
        try:
            pieces = self._pieces(shielded, shield, add_generation_prompt)
        except (CorruptError, UnsupportedError):  # of a part of the conversation; the whole may do
            pieces = None
        if pieces is None:
            pieces = [Piece(self._render(shielded, add_generation_prompt), False)]
        return tokenizer.encode_parts(part for piece in pieces for part in shield.parts(piece.text))

    def ends(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """What ends an answer, as text: the mark that the template writes behind one, or all up to the next message.

        Empty where it writes nothing of the kind. Raises CorruptError as ``render`` does.
        """
        first, answer, second = "Is it?", "It is.", "Why so?"
        turns = (("user", first), ("assistant", answer), ("user", second))
        messages = [{"role": role, "content": said} for role, said in turns]
        text = self.render(messages)
        begin = text.rfind(answer) + len(answer)
        between = text[begin : text.rfind(second)] if begin >= len(answer) else ""
        marks = [text for text in tokenizer.special_tokens if text in between]
        end = min(marks, key=between.index) if marks else between.rstrip()
        return (end,) if end.strip() else ()

    def lessons(self, messages: Sequence[Message], shield: Shield) -> list[list[Piece]]:
        """A conversation as the texts to learn from, in pieces: one text, with every answer marked.

        What follows the last answer is left out. A template that writes an earlier answer otherwise than the last (some
        drop its reasoning) gives one text an answer, as generation will see it. ``messages`` are shielded. Raises
        CorruptError as ``render`` does, UnsupportedError when a template does not put an answer behind its prompt.
        """
        ends = [place + 1 for place, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._pieces(messages[: ends[-1]], shield, False)
        if whole is not None:
            return [whole]
        texts = []
        for end in ends:
            before, answer, rest = self._answer(messages[:end], shield)
            texts.append([Piece(before, False), Piece(answer, True), Piece(rest, False)])
        return texts

    def _pieces(self, messages: Sequence[Message], shield: Shield, add_generation_prompt: bool) -> list[Piece] | None:
        """The rendered messages cut around each answer; None where an answer changes with what follows it."""
        whole = self._render(messages, add_generation_prompt)
        pieces: list[Piece] = []
        done = 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, answer, _ = self._answer(messages[: place + 1], shield)
            if not whole.startswith(before + answer) or len(before) < done:
                return None
            pieces += [Piece(whole[done : len(before)], False), Piece(answer, True)]
            done = len(before) + len(answer)
        return [*pieces, Piece(whole[done:], False)]

    def _answer(self, messages: Sequence[Message], shield: Shield) -> tuple[str, str, str]:
        """What stands before the last message, an answer; the answer up to its end mark; what follows that."""
        after = self._render(messages, False)
        bare, prompted = self._render(messages[:-1], False), self._render(messages[:-1], True)
        if after.startswith(bare):
            # A template may open an answer with more than it keeps of it (a thought that history drops).
            same = takewhile(lambda pair: pair[0] == pair[1], zip(after, prompted, strict=False))
            before = after[: sum(1 for _ in same)]
            if len(before) < len(bare):
                before = bare
            answer = after[len(before) :]
            end = shield.end_of_marks(answer)
            return before, answer[:end], answer[end:]
        raise UnsupportedError(
            "the chat template does not write an answer behind the prompt that asks for it",
            "give the model another chat_template, or use rows of prompt and completion",
        )


class Shield:
    """Keeps special tokens written out in messages apart from those that a template writes.

    In a message they are replaced by a code before it is rendered, and put back when the text has been cut at the
    special tokens that are then left in it.
    """

    _CODE = "\ufdd0"  # a noncharacter: no text to exchange holds it, and if one does, it gets a code too

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.special_tokens
        # Tokens not marked special are matched in any text; a template may look for them in a message (</think>).
        coded = [text for text, id_ in self._special.items() if tokenizer.encode(text) != [id_]]
        self._coded = [*sorted(coded, key=len, reverse=True), self._CODE]
        self._into_code = _any_of(self._coded)
        self._out_of_code = re.compile(f"{self._CODE}([0-9]+){self._CODE}")
        self._marks = _any_of(self._special) if self._special else None

    def messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages with codes in place of special tokens."""
        return [{"role": message["role"], "content": self.text(message["content"])} for message in messages]

    def text(self, text: str) -> str:
        return self._into_code.sub(lambda mark: f"{self._CODE}{self._coded.index(mark[0])}{self._CODE}", text)

    def plain(self, text: str) -> str:
        """The text that a shielded one stands for."""
        return self._out_of_code.sub(lambda code: self._coded[int(code[1])], text)

    def parts(self, text: str) -> list[str | int]:
        """A shielded text as plain texts and the ids of special tokens between them."""
        parts: list[str | int] = []
        done = 0
        for mark in self._marks.finditer(text) if self._marks else ():
            parts += [self.plain(text[done : mark.start()]), self._special[mark[0]]]
            done = mark.end()
        parts.append(self.plain(text[done:]))
        return [part for part in parts if part != ""]

    def end_of_marks(self, text: str) -> int:
        """Where the last special token in a shielded text ends; the text's end without any."""
        ends = [mark.end() for mark in self._marks.finditer(text)] if self._marks else []
        return ends[-1] if ends else len(text)


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def check_messages(messages: object) -> None:
    """Raise CorruptError, saying which message is wrong, unless this is a list of ``{"role", "content"}``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise CorruptError("the messages are not a list", 'write [{"role": "user", "content": "..."}, ...]')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise CorruptError(f"message {number} is not an object", 'write {"role": "user", "content": "..."}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise CorruptError(f"message {number} has the role {role!r}", f"the roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise CorruptError(f"message {number} has no text as its content", "gptcli learns from text alone")
        if not content.strip():
            raise CorruptError(f"message {number} is empty", "leave it out")


def read_template(folder: Path) -> str | None:
    """The Jinja chat template of a model folder, or None.

    ``chat_template.jinja`` counts before ``tokenizer_config.json``, as it does for transformers, and this before
    ``chat_template.json``; of several named templates the one named ``default`` is taken, or the only one. Raises
    CorruptError when a file can't be read.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return _read(file)
    source = _read_config(folder, "tokenizer_config.json").get("chat_template")
    if source is None:
        source = _read_config(folder, "chat_template.json").get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
    if isinstance(source, dict):
        source = next(iter(source.values())) if len(source) == 1 else source.get("default")
    if source is not None and not isinstance(source, str):
        raise CorruptError(f"{folder} has a chat_template that is not a text", "download the model again")
    return source


def open_template(
    folder: Path, tokenizer: Tokenizer, start_id: int | None, end_id: int | None, source: str | None = None
) -> ChatTemplate:
    """The template that conversations with a model are written by: its own (or ``source``), else the plain one.

    Args:
        folder: the model's.
        tokenizer: the folder's.
        start_id, end_id: the tokens that start and end a text; the names in tokenizer_config.json and
            special_tokens_map.json count before them.

    Raises CorruptError when a file can't be read, UsageError when the plain template finds no token to end an answer.
    """
    names = {id_: text for text, id_ in tokenizer.special_tokens.items()}
    named = token_names(folder)
    marks = {}
    for key, id_ in (("bos_token", start_id), ("eos_token", end_id)):
        marks[key] = named[key] if key in named else names.get(-1 if id_ is None else id_, "")
    template = ChatTemplate(source or read_template(folder) or PLAIN, marks["bos_token"], marks["eos_token"])
    if template.source == PLAIN and template.eos_token not in tokenizer.special_tokens:
        raise UsageError(f"{folder.name} has no token that ends a text", "start from another model")
    return template


def tokenizer_config(template: ChatTemplate, model_max_length: int, files: Mapping[str, bytes]) -> bytes:
    """A ``tokenizer_config.json`` with which transformers opens the tokenizer and its chat template.

    Args:
        template: what ``chat_template`` becomes.
        model_max_length: the context in tokens.
        files: the tokenizer's files by name; a ``tokenizer_config.json`` among them is kept, but for what is set here.
            Leave ``chat_template.jinja`` out of the folder: it would count before this file.

    Raises CorruptError when the existing file is no JSON object.
    """
    existing = files.get("tokenizer_config.json")
    # By the model's type transformers would take GPT-2's own class, which rebuilds the tokenizer from its vocabulary
    # and passes over how tokenizer.json splits text; it is needed where vocab.json and merges.txt are all there is.
    kind = "PreTrainedTokenizerFast" if "tokenizer.json" in files else "GPT2Tokenizer"
    default = {
        "tokenizer_class": kind,
        "bos_token": template.bos_token or None,
        "eos_token": template.eos_token or None,
        "clean_up_tokenization_spaces": False,
    }
    config = default if existing is None else _json_object(existing, "tokenizer_config.json")
    config |= {"model_max_length": model_max_length, "chat_template": template.source}
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    return _json_object(_read(file), str(file)) if file.exists() else {}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(f"{file} can't be read: {error}", "download the model again") from None


def _json_object(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{name} can't be read as JSON: {error}", "download the model again") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{name} is not a JSON object", "download the model again")
    return value


class _Compiled(NamedTuple):
    render: Callable[..., str]


@lru_cache(maxsize=8)
def _compiled(source: str) -> _Compiled:
    """A Jinja template, compiled with what transformers offers to templates; it reaches nothing outside."""
    from datetime import datetime

    try:
        from jinja2 import TemplateError
    except ImportError:
        raise UnsupportedError("the model's chat template is one for Jinja", "pip install 'gptcli[families]'") from None
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks an answer for transformers; here the answer is found without it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **settings: Any) -> str:
        # Jinja's own escapes what is special in HTML.
        return json.dumps(value, **{"ensure_ascii": False, **settings})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return _Compiled(environment.from_string(source).render)
    except Exception as error:  # also what Python's compiler says of what Jinja made
        raise CorruptError(f"the chat template can't be read: {error}", "look at its chat_template") from None
