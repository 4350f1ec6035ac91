"""A conversation: its messages, how much of it fits into a context, and the line of JSON that it is kept as."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptcli.errors import CorruptError, UsageError
from gptcli.text.template import Message, check_messages


@dataclass
class Conversation:
    """What was said so far.

    Attributes:
        turns: the messages of user and assistant in their order.
        system: what stands before them; empty for nothing.
    """

    turns: list[Message] = field(default_factory=list)
    system: str = ""

    @property
    def messages(self) -> list[Message]:
        """All of them, the system's first."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system.strip() else list(self.turns)

    @property
    def answers(self) -> int:
        """How many the assistant gave."""
        return sum(message["role"] == "assistant" for message in self.turns)

    def ask(self, text: str) -> None:
        """Add what the user says. Raises UsageError for nothing."""
        if not text.strip():
            raise UsageError("the message is empty", "say something")
        self.turns.append({"role": "user", "content": whole_characters(text)})

    def answer(self, text: str) -> None:
        """Add what the assistant says."""
        self.turns.append({"role": "assistant", "content": text})

    def undo(self) -> str | None:
        """Take the last question back, with its answer; returns it, or None where there is none."""
        places = [place for place, message in enumerate(self.turns) if message["role"] == "user"]
        if not places:
            return None
        question = self.turns[places[-1]]["content"]
        del self.turns[places[-1] :]
        return question

    def as_json(self, more: Mapping[str, Any]) -> str:
        """One line: the messages as ``gptcli train`` reads them, and beside them whatever else is to be kept."""
        return json.dumps({"messages": self.messages, **more}, ensure_ascii=False) + "\n"


def read_conversation(line: str) -> tuple[Conversation, dict[str, Any]]:
    """A line that ``as_json`` made, or any with messages: the conversation, and what stands beside it.

    Raises CorruptError for what is none.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or "messages" not in row:
        raise CorruptError("this is no conversation", 'it should be a line {"messages": [...]}')
    messages = row.pop("messages")
    check_messages(messages)
    said = [
        {"role": message["role"], "content": whole_characters(message["content"])}
        for message in messages
        if message["role"] != "system"
    ]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return Conversation(list(said), whole_characters(system)), row


class Fitted(NamedTuple):
    """What of a conversation goes into the context: its messages, their token ids, and how many were left out."""

    messages: Sequence[Message]
    ids: list[int]
    left_out: int


def fit(conversation: Conversation, encode: Callable[[Sequence[Message]], list[int]], most: int) -> Fitted:
    """As many of the last turns as make ``most`` tokens; the system's message and the last turn always stay.

    A turn begins with what the user says. ``encode`` makes the ids of some messages.
    """
    before = conversation.messages[: len(conversation.messages) - len(conversation.turns)]
    turns = conversation.turns
    begins = [0, *(place for place, message in enumerate(turns) if place and message["role"] == "user")]

    def without(dropped: int) -> Fitted:
        messages = [*before, *turns[begins[dropped] :]]
        return Fitted(messages, encode(messages), begins[dropped])

    fitted = without(0)
    low, high = 1, len(begins) - 1  # the fewest turns that have to go are among these
    while len(fitted.ids) > most and low <= high:
        if low == high:
            return without(low)
        middle = (low + high) // 2
        if len(encode([*before, *turns[begins[middle] :]])) <= most:
            high = middle
        else:
            low = middle + 1
    return fitted


def whole_characters(text: str) -> str:
    """Text with U+FFFD in place of what has no UTF-8: lone surrogates, of bytes that a terminal sent."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
