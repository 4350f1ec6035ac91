"""The turns of a conversation: from what the user says to what is answered, shown, and kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.cli import keyboard
from gptcli.cli.chat_settings import Settings
from gptcli.cli.chat_speaker import Speaker
from gptcli.cli.options import check_biases
from gptcli.cli.out import Output, harmless
from gptcli.errors import GptcliError, LimitError, OutputError, UsageError
from gptcli.text.conversation import Conversation, fit, read_conversation
from gptcli.text.documents import SEPARATOR
from gptcli.text.template import ChatTemplate, Message
from gptcli.text.transcript import Transcript, Trim

# How much further the seed goes with each try of the same answer.
_RETRY = 1000


@dataclass
class Answer:
    """One answer as it grows."""

    seed: int
    prompt: str
    ids: list[int]  # of the prompt
    left_out: int
    text: str = ""
    tokens: int = 0
    finish: str | None = None  # until it ends; Ctrl-C leaves it so
    first_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        show_prompt: show what the model continues before each answer.
        several: more than one answer may come, so that they have to be parted.
        keep: the file that holds the conversation, up to date after each turn; None for none.
        stay: Ctrl-C ends an answer and nothing else.
        retries: how often the last question was asked again.
    """

    speaker: Speaker
    template: ChatTemplate
    conversation: Conversation
    settings: Settings
    out: Output
    show_prompt: bool = False
    several: bool = False
    keep: Path | None = None
    stay: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        own = self.template.ends(self.speaker.tokenizer)
        eos = {
            text for text, id_ in self.speaker.tokenizer.special_tokens.items() if id_ in self.speaker.config.eos_ids
        }
        self._ends = tuple(end for end in own if end not in eos)
        self._unanswered: str | None = None
        self._told_left_out = 0
        self._shown = 0

    def say(self, text: str) -> None:
        """Ask, and show the answer. Raises GptcliError, and then nothing was said."""
        self.retries = 0
        self._reply(text)

    def retry(self) -> None:
        """Ask the last question again, with another seed. Raises UsageError where there is none."""
        question = self.conversation.undo() or self._unanswered
        if question is None:
            raise UsageError("nothing was asked yet", "say something")
        self.retries += 1
        self.out.note(f"again, with seed {self._seed()}")
        self._reply(question)

    def undo(self) -> None:
        """Take the last question and its answer back. Raises UsageError where there is none."""
        question = self.conversation.undo()
        if question is None:
            raise UsageError("there is nothing to take back", "ask something first")
        self.retries, self._unanswered = 0, None
        self._save()
        self.out.note(f"taken back: {_beginning(question)}")

    def clear(self) -> None:
        """Begin anew, with the same system message and settings; what was said does not come back by ``--continue``."""
        said = bool(self.conversation.turns)
        self._forget()
        if said:  # where nothing was, what is kept is another conversation
            self._save()

    def _forget(self) -> None:
        self.conversation.turns.clear()
        self.retries, self._unanswered, self._told_left_out = 0, None, 0

    def adopt(self, settings: Settings) -> None:
        """Answer by these settings from now on. Raises UsageError for tokens that the model does not have."""
        check_biases(settings.sampling.logit_bias, self.speaker.name, self.speaker.config.vocab_size)
        self.settings = settings

    def prompt(self) -> str:
        """The text that the model would continue now."""
        return self._text(self.conversation.messages)

    def line(self, *, model: str | None = None) -> str:
        """The conversation and its settings as a line of JSON; ``model`` is what to call the model in it."""
        kept = {"model": model or self.speaker.name, "settings": self.settings.as_json(), "retries": self.retries}
        return self.conversation.as_json(kept)

    def take(self, line: str) -> None:
        """Go on with a conversation that ``line`` made, or any with messages. Raises CorruptError, UsageError."""
        conversation, more = read_conversation(line)
        if isinstance(values := more.get("settings"), dict):
            self.adopt(self.settings.changed(values))
        self._forget()
        self.conversation, self.retries = conversation, whole_number(more.get("retries"))

    def _seed(self) -> int:
        return int((self.settings.seed + self.conversation.answers + _RETRY * self.retries) % 2**63)

    def _reply(self, text: str) -> None:
        self.conversation.ask(text)
        try:
            answer = self._prepared()
            interrupted = self._speak(answer)
        except GptcliError:
            self.conversation.undo()
            raise
        self._unanswered = text
        self._end(answer)
        if interrupted and not self.stay:
            raise KeyboardInterrupt
        if interrupted and answer.text:
            self.out.note("ended by Ctrl-C; what was said is kept")

    def _prepared(self) -> Answer:
        """The prompt of the next answer, with as much of the conversation as fits into the context."""
        context, most = self.speaker.config.context, self.settings.max_tokens
        # What is left free for the answer: what it may need, up to a quarter of the context.
        room = min(most, context // 4) if most >= 0 else context // 4
        fitted = fit(self.conversation, self._encode, context - room)
        if len(fitted.ids) > context:
            raise LimitError(
                f"the message makes a prompt of {len(fitted.ids):,} tokens, and the context of {self.speaker.name} is "
                f"{context:,}",
                "say it in fewer words, or split it",
            )
        if fitted.left_out != self._told_left_out and fitted.left_out:
            words = f"the oldest {fitted.left_out:,} messages" if fitted.left_out > 1 else "the oldest message"
            self.out.note(f"the context is full: {words} of this conversation no longer go to the model")
        self._told_left_out = fitted.left_out
        return Answer(self._seed(), self._text(fitted.messages), fitted.ids, fitted.left_out)

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self.template.encode(self.speaker.tokenizer, messages)

    def _text(self, messages: Sequence[Message]) -> str:
        return self.template.render(messages, add_generation_prompt=True)

    def _speak(self, answer: Answer) -> bool:
        """Let the answer grow and be shown; returns whether Ctrl-C ended it."""
        self._begin(answer)
        trim = Trim() if isinstance(self.template, Transcript) else None
        interrupted = False

        def stop() -> None:
            nonlocal interrupted
            interrupted = True
            self.speaker.hush()

        with keyboard.interrupts(stop), keyboard.silent() if self.stay else nullcontext():
            self.speaker.wait()
            start = time.perf_counter()
            stops = (*self._ends, *self.settings.stop)
            for step in self.speaker.answer(answer.ids, answer.seed, self.settings, stops):
                answer.seconds = time.perf_counter() - start
                answer.first_seconds = answer.first_seconds or answer.seconds
                answer.tokens += step.token is not None
                text = trim.push(step.text) if trim else step.text
                answer.text += text
                answer.finish = step.finish
                shown = step.text if self.show_prompt else text  # behind a prompt, as the model went on with it
                if shown and not self.out.json:
                    self.out.text(shown)
        return interrupted

    def _begin(self, answer: Answer) -> None:
        out = self.out
        if out.json:
            return
        if self._shown and self.several and not out.on_terminal:
            out.data(SEPARATOR)
        self._shown += 1
        if self.show_prompt:
            if out.on_terminal:
                out.painted(out.style(harmless(answer.prompt), "dim"))
            else:
                out.text(answer.prompt)

    def _end(self, answer: Answer) -> None:
        """Tell what there is to tell about an answer, and keep it."""
        out = self.out
        if out.json:
            out.record(self._as_json(answer))
        elif out.on_terminal or not self.several:
            out.end_line()
        elif not answer.text.endswith("\n"):
            out.text("\n")
        if answer.finish == "context":
            out.note("the context is full: the answer ends here")
        if answer.seconds:
            rest = (answer.tokens - 1) / (answer.seconds - answer.first_seconds) if answer.tokens > 1 else 0.0
            out.detail(f"seed {answer.seed}, {answer.tokens:,} tokens, {rest:,.1f} a second")
        if answer.text.strip():
            self.conversation.answer(answer.text)
            self._unanswered = None
            self._save()
            return
        self.conversation.undo()
        if self.settings.max_tokens != 0:
            out.note("nothing was answered, so the question is not kept" + (": /retry asks again" * self.stay))

    def _as_json(self, answer: Answer) -> dict[str, Any]:
        decode = answer.seconds - answer.first_seconds
        value: dict[str, Any] = {
            "model": self.speaker.name,
            "role": "assistant",
            "text": answer.text,
            "finish_reason": answer.finish,
            "seed": answer.seed,
            **self.speaker.used,
            "usage": {"prompt_tokens": len(answer.ids), "completion_tokens": answer.tokens},
            "left_out": answer.left_out,
            "timing": {
                "load_seconds": self.speaker.load_seconds,
                "prefill_seconds": answer.first_seconds,
                "decode_seconds": decode,
                "tokens_per_second": (answer.tokens - 1) / decode if answer.tokens > 1 and decode else 0.0,
            },
        }
        return value | ({"prompt": answer.prompt} if self.show_prompt else {})

    def _save(self) -> None:
        """Keep the conversation for ``--continue``; where that can't be, say so once."""
        if self.keep is None:
            return
        from gptcli.core.files import write_whole

        try:
            write_whole(self.keep, self.line(model=self.speaker.known_as).encode(), private=True)
        except OutputError as error:
            self.out.note(f"the conversation is not kept: {error.message}")
            self.keep = None


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def whole_number(value: object) -> int:
    """A number of a file, 0 for what is none."""
    return value if type(value) is int and 0 <= value < 1 << 32 else 0
