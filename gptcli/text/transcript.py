"""A conversation for a model that has learnt none: a transcript, which the model continues as it would any text.

What 3Blue1Brown's lecture on GPTs shows: a text that sets the scene, what the user said, and the opening of an answer::

    The following is a conversation between a user and a helpful AI assistant.

    User: Hello?

    Assistant: Hello.

    User: Who are you?

    Assistant:

The model writes what may come next, and would go on with what the user says: ``ends`` stops it there. No space stands
behind the last colon, since byte-level BPE joins it with the word that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.text.template import ChatTemplate, Message, open_template, read_template
from gptcli.text.tokenizer import Tokenizer

SCENE = "The following is a conversation between a user and a helpful AI assistant."


@dataclass(frozen=True)
class Transcript(ChatTemplate):
    """The template of a base model.

    Attributes:
        scene: what stands first where the conversation has no system message.
    """

    scene: str = SCENE

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        text = self.bos_token
        if not messages or messages[0]["role"] != "system":
            text += f"{self.scene}\n\n"
        for message in messages:
            name = "" if message["role"] == "system" else f"{message['role'].capitalize()}: "
            text += f"{name}{message['content'].strip()}\n\n"
        return text + "Assistant:" * add_generation_prompt

    def ends(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """Where another turn begins."""
        return ("\nUser:", "\nAssistant:")


class Trim:
    """Takes white space off both ends of a streamed text: what may be its end waits until more comes."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now."""
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._begun = self._begun or bool(shown)
        self._held = text[len(shown) :]
        return shown


def open_chat(folder: Path, tokenizer: Tokenizer, start_id: int | None, end_id: int | None) -> ChatTemplate:
    """How conversations with a model are written: by the template that it brings, or as a transcript.

    Arguments and errors are those of ``open_template``.
    """
    if read_template(folder) is not None:
        return open_template(folder, tokenizer, start_id, end_id)
    names = {id_: text for text, id_ in tokenizer.special_tokens.items()}
    return Transcript(bos_token="" if start_id is None else names.get(start_id, ""))
