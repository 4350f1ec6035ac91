"""Fine-tuning data: rows of messages, or of a prompt and its completion, to tokens and which of them are learnt.

Learnt are the answers and the token that ends each: what an assistant says, what completes a prompt. The rest is read
and not learnt. A conversation is encoded piece by piece, cut where each answer begins and ends, so the ids up to an
answer are those that generation sees when it is asked for that answer.

In the stream each example stands behind a start token of its own, even where that is the token which ended the one
before: of the two, the end is learnt and the start is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptcli.errors import CorruptError, GptcliError, UsageError
from gptcli.text.template import ChatTemplate, Piece, Shield, check_messages
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.documents import files_of, held_out_place, is_json_lines, lines_of

Kind = Literal["text", "messages", "completion"]

_FORMS = '{"messages": [{"role": ..., "content": ...}]} or {"prompt": ..., "completion": ...}'
_GROUP = 4096  # rows encoded together
_LEAST_ROWS = 20  # of fewer, none is held out


@dataclass(frozen=True)
class Examples:
    """Examples as one stream, as a ``Corpus`` takes it.

    Attributes:
        tokens: ``[N]`` uint16 or uint32; each example behind the start token, which also ends the stream.
        learnt: ``[N]`` uint8, 1 where the token is a target.
        documents: the number of examples.
        text_bytes: UTF-8 bytes of the learnt text; the tokens that end answers count none, as the token that ends a
            document counts none.
        starts: ``[documents + 1]`` int64, where each example begins, and where the stream ends: a start token may
            also stand within an example.
        longest: tokens of the longest example, its start token included; what is longer than the context is learnt in
            parts.
    """

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    learnt: npt.NDArray[np.uint8]
    documents: int
    text_bytes: int
    starts: npt.NDArray[np.int64]
    longest: int


def kind_of(path: str, field: str = "text") -> Kind:
    """What a file holds, by the first row of a ``.jsonl``; every other file is text.

    A text under ``field`` counts first, then messages, then a prompt and its completion. Raises NotFoundError without
    the file, CorruptError when it can't be read or its first row is none of these.
    """
    if not is_json_lines(path):
        return "text"
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                if isinstance(row.get(field), str):
                    return "text"
                if "messages" in row:
                    return "messages"
                if "prompt" in row and "completion" in row:
                    return "completion"
            message = f"{path} line {number} is neither an object with a text under {field!r} nor one of {_FORMS}"
            raise CorruptError(message, "correct the line, or name the text's field with --field")
    return "text"


def hold_examples(paths: Sequence[str], field: str = "text") -> bool:
    """Whether the files, and those in the folders, hold examples (else text). Raises UsageError if they hold both."""
    kinds = {file: kind_of(file, field) != "text" for path in paths for file in files_of(path)}
    if len(set(kinds.values())) > 1:
        text = next(file for file, examples in kinds.items() if not examples)
        example = next(file for file, examples in kinds.items() if examples)
        raise UsageError(f"{text} holds text, {example} examples", "train on the one, then on the other")
    return any(kinds.values())


def examples_of(
    paths: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate, start_id: int, *, held_out: float = 0.0
) -> tuple[Examples, Examples | None]:
    """The examples of some files and folders: those to train on, and those held out.

    A row is held out by a hash of what it says; of 20 rows or more at least one is. A file named twice counts twice in
    training only.

    Args:
        paths: ``.jsonl`` files, or folders of them.
        tokenizer: the model's.
        template: how conversations are written; its ``eos_token`` also ends a completion.
        start_id: the token that stands before each example.
        held_out: the fraction to hold out.

    Raises NotFoundError without a file; CorruptError, with its number, for a row that is not well formed; UsageError
    without any row, and when the tokenizer lacks the token that ends an answer.
    """
    if template.eos_token not in tokenizer.special_tokens:
        raise UsageError(f"the tokenizer has no token {template.eos_token!r} to end an answer", "use another model")
    encoder = _Encoder(tokenizer, template, start_id)
    seen: set[str] = set()
    kept: list[tuple[float, bool, _Row]] = []
    for path in paths:
        for file in files_of(path):
            again = file in seen
            seen.add(file)
            kept += [(place, again, row) for place, row in encoder.rows(file)]
    if not kept:
        raise UsageError(f"there is no example in {', '.join(paths)}", "name files that hold some")
    least = min(place for place, _, _ in kept)
    bound = max(held_out, float(np.nextafter(least, 2))) if held_out and len(kept) >= _LEAST_ROWS else 0.0
    train = [row for place, _, row in kept if place >= bound]
    valid = [row for place, again, row in kept if place < bound and not again]
    if not train:  # as when all rows are the same
        train, valid = valid, []
    return encoder.stream(train), encoder.stream(valid) if valid else None


@dataclass(frozen=True)
class _Row:
    """What one row teaches: for each of its examples the ids and whether each is learnt; bytes of the learnt text."""

    examples: list[tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]]
    text_bytes: int


class _Encoder:
    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, start_id: int) -> None:
        self._tokenizer, self._template, self._start_id = tokenizer, template, start_id
        self._end_id = tokenizer.special_tokens[template.eos_token]
        self._shield = Shield(tokenizer)
        self._dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def rows(self, path: str) -> Iterator[tuple[float, _Row]]:
        """The rows of a file, each with the place in [0, 1] that its hash gives it."""
        group: list[tuple[float, list[list[Piece]]]] = []
        for number, line in enumerate(lines_of(path), 1):
            if not line.strip():
                continue
            try:
                group.append(self._read(line))
            except GptcliError as error:
                raise CorruptError(f"{path} line {number}: {error.message}", error.hint) from None
            if len(group) == _GROUP:
                yield from self._encoded(group)
                group = []
        yield from self._encoded(group)

    def _read(self, line: str) -> tuple[float, list[list[Piece]]]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, Mapping):
            raise CorruptError("this is not a JSON object", f"write {_FORMS}")
        if "messages" in row:
            messages = row["messages"]
            check_messages(messages)
            if not any(message["role"] == "assistant" for message in messages):
                raise CorruptError("no message is the assistant's", "give it an answer to learn, or leave it out")
            lessons = self._template.lessons(self._shield.messages(messages), self._shield)
            said = json.dumps([[message["role"], message["content"]] for message in messages])
        elif "prompt" in row and "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
            for name, text in (("prompt", prompt), ("completion", completion)):
                if not isinstance(text, str):
                    raise CorruptError(f"the {name} is not a text", f"write {_FORMS}")
            if not completion.strip():
                raise CorruptError("the completion is empty", "give it a text to learn, or leave the line out")
            pieces = [Piece(self._shield.text(prompt), False), Piece(self._shield.text(completion), True)]
            lessons, said = [pieces], json.dumps([prompt, completion])
        else:
            raise CorruptError("there are neither messages nor a prompt and its completion", f"write {_FORMS}")
        return held_out_place(said), lessons

    def _encoded(self, group: Sequence[tuple[float, list[list[Piece]]]]) -> Iterator[tuple[float, _Row]]:
        lessons = [pieces for _, row in group for pieces in row]
        cut = [
            [(part, piece.answer) for piece in pieces for part in self._shield.parts(piece.text)] for pieces in lessons
        ]
        texts, follows = [], []
        for parts in cut:
            trimmed = self._tokenizer.trimmed(part for part, _ in parts)
            for part, goes_on in zip(trimmed, self._tokenizer.following(trimmed), strict=True):
                if isinstance(part, str):
                    texts.append(part)
                    follows.append(goes_on)
        encoded = iter(self._tokenizer.encode_batch(texts, follows=follows))
        examples = iter([self._example(parts, encoded) for parts in cut])
        for place, row in group:
            own = [next(examples) for _ in row]
            yield place, _Row([(ids, learnt) for ids, learnt, _ in own], sum(size for _, _, size in own))

    def _example(
        self, parts: Sequence[tuple[str | int, bool]], encoded: Iterator[list[int]]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8], int]:
        ids, learnt, size = [self._start_id], [False], 0
        for place, (part, answer) in enumerate(parts):
            if isinstance(part, str):
                own = next(encoded)
                # A lone surrogate is encoded as U+FFFD, which takes three bytes as well.
                size += len(part.encode("utf-8", "surrogatepass")) if answer else 0
            else:
                # A template may write the start token itself.
                own = [] if place == 0 and part == self._start_id else [part]
            ids += own
            learnt += [answer] * len(own)
        if not isinstance(parts[-1][0], int) and parts[-1][1]:
            ids, learnt = [*ids, self._end_id], [*learnt, True]
        return np.array(ids, self._dtype), np.array(learnt, np.uint8), size

    def stream(self, rows: Iterable[_Row]) -> Examples:
        rows = list(rows)
        examples = [example for row in rows for example in row.examples]
        start = np.array([self._start_id], self._dtype)
        return Examples(
            tokens=np.concatenate([*(ids for ids, _ in examples), start]),
            learnt=np.concatenate([*(learnt for _, learnt in examples), np.zeros(1, np.uint8)]),
            documents=len(examples),
            text_bytes=sum(row.text_bytes for row in rows),
            starts=np.cumsum([0, *(len(ids) for ids, _ in examples)], dtype=np.int64),
            longest=max(len(ids) for ids, _ in examples),
        )
