"""Whoever is asked for ghost text: a model that loads while one types, and that drops a question for the next one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptcli.cli.edit_ghost import Found, clean
from gptcli.cli.warm import Runner
from gptcli.errors import GptcliError

LOADING, WARM, COLD, FAILED = "loading", "warm", "cold", "failed"

# Seconds beyond the deadline that a warm process has for its answer to arrive.
_PATIENCE = 0.5
# Characters that are sent for each token of the context: more than a token has on average in any text.
_CHARACTERS = 16
_MOST_CHARACTERS = 1 << 19  # what a warm process reads in one request, whatever the context
_SUFFIX_CHARACTERS = 512  # of what stands behind the cursor only the beginning counts
_FAREWELL = 1.0  # seconds in which a thread that waits for somebody else may still find that it is not needed
# Bytes of keys and values of what was read before: a key does not have the whole text read anew.
_PREFIX_BYTES = 256 << 20

Answer = list[Found] | GptcliError


@dataclass(eq=False)
class Question:
    """What may stand between two texts.

    Attributes:
        before, after: what stands before the cursor and behind it.
        num: how many suggestions, at most; ``min_prob``: how likely they should be.
        menu: whether they are to be chosen from.
        dropped: nobody waits for the answer any more.
    """

    before: str
    after: str
    num: int = 1
    min_prob: float = 0.0
    menu: bool = False
    dropped: bool = field(default=False, init=False)


@dataclass(frozen=True)
class Asking:
    """How it is asked.

    Attributes:
        delay_seconds: after the last key.
        deadline_seconds: of an answer.
        until, max_tokens, min_prob: as of ``core.complete.complete``.
    """

    delay_seconds: float = 0.08
    deadline_seconds: float = 1.0
    until: str = "line"
    max_tokens: int = 16
    min_prob: float = 0.05


class _DroppedError(Exception):
    """Nobody waits for the answer that is being computed."""


class Asker:
    """A model on a thread of its own. One question at a time: the next one takes the place of the last.

    Attributes:
        state: ``loading``, ``warm`` (in another process), ``cold`` (in this one) or ``failed``.
        name: of the model; ``used``: what computes, once it is known.
        why: it failed.
    """

    def __init__(
        self, name: str, find: Callable[[], Runner | None], load: Callable[[], Runner], asking: Asking
    ) -> None:
        """Both are called on the thread as it begins, and again where a warm process has gone.

        Args:
            name: of the model, as far as it is known.
            find: a warm one; None where there is none.
            load: one of our own.
        """
        self.name, self.state, self.why = name, LOADING, ""
        self.used: dict[str, str] = {}
        self._find, self._load_own, self._asking = find, load, asking
        self._runner: Runner | None = None
        self._prefixes: Any = None
        self._condition = threading.Condition()
        self._next: Question | None = None
        self._now: Question | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="edit-ask", daemon=True)
        self._changed: Callable[[], None] = lambda: None
        self._answered: Callable[[Question, Answer], None] = lambda question, answer: None

    def start(self, changed: Callable[[], None], answered: Callable[[Question, Answer], None]) -> None:
        """Begin to load. Both are called on the asker's thread: when the state has changed, and with answers."""
        self._changed, self._answered = changed, answered
        self._thread.start()

    def ask(self, question: Question) -> None:
        """Have a question answered, and no other one."""
        with self._condition:
            self._drop()
            self._next = question
            self._condition.notify()

    def cancel(self) -> None:
        """Have no question answered."""
        with self._condition:
            self._drop()

    def close(self) -> None:
        """Let go of the model; what still loads is left to itself."""
        with self._condition:
            self._closing = True
            self._drop()
            self._condition.notify()
        # How the process ends depends on whether torch is there (``__main__.end``): it should not come in between.
        end = time.monotonic() + _FAREWELL
        while self._thread.is_alive() and "torch" not in sys.modules and time.monotonic() < end:
            self._thread.join(0.01)

    def _drop(self) -> None:
        self._next = None
        if self._now is not None:
            self._now.dropped = True
            client = getattr(self._runner, "client", None)
            if client is not None:
                client.interrupt()

    def _run(self) -> None:
        self._load()
        while (question := self._take()) is not None:
            answer = self._answer(question)
            with self._condition:
                self._now = None
            if not question.dropped:
                self._answered(question, answer)

    def _load(self) -> None:
        self._tell(LOADING)
        self._runner = None
        try:
            runner = self._find()
            if runner is None and not self._closing:
                runner = self._load_own()
        except GptcliError as error:
            self._tell(FAILED, error.message)
            return
        except Exception as error:  # whatever it is, it must not end the text that is being typed
            self._tell(FAILED, _told(error))
            return
        if runner is None:
            return
        self._runner, self.name, self.used = runner, runner.name, dict(runner.used)
        self._tell(COLD if getattr(runner, "client", None) is None else WARM)

    def _tell(self, state: str, why: str = "") -> None:
        self.state, self.why = state, why
        self._changed()

    def _take(self) -> Question | None:
        with self._condition:
            self._condition.wait_for(lambda: self._closing or self._next is not None)
            self._now, self._next = self._next, None
            return None if self._closing else self._now

    def _answer(self, question: Question) -> Answer:
        from gptcli.serve.client import GoneError, LateError

        try:
            try:
                return self._complete(question)
            except LateError:
                return []
            except GoneError:
                if question.dropped:
                    return []
                self._load()  # the warm process has ended: another one, or a model of our own
                return self._complete(question)
        except _DroppedError:
            return []
        except GptcliError as error:
            return error
        except Exception as error:
            return GptcliError(_told(error))

    def _complete(self, question: Question) -> list[Found]:
        runner, known = self._runner, -1
        if runner is None:
            return []
        asked: dict[str, Any] = {
            "num": question.num,
            "max_tokens": self._asking.max_tokens,
            "until": self._asking.until,
            "min_prob": question.min_prob,
            "deadline_seconds": self._asking.deadline_seconds,
            "suffix": _sound(question.after[:_SUFFIX_CHARACTERS]) if question.after.strip() else "",
        }
        prefix = _sound(question.before[begin(len(question.before), runner.context) :])
        while True:
            result = self._ask(runner, question, prefix, asked)
            # Too late for anything, but more of the text has been read, and is remembered.
            if result["completions"] or not result["late"] or result["known"] <= known:
                break
            known = result["known"]
        found = [Found(clean(each["text"]), each["probability"]) for each in result["completions"]]
        return [each for number, each in enumerate(found) if each.text and each.text not in _texts(found[:number])]

    def _ask(self, runner: Runner, question: Question, prefix: str, asked: dict[str, Any]) -> dict[str, Any]:
        client = getattr(runner, "client", None)
        if client is None:
            from gptcli.core.prefixes import Prefixes

            self._prefixes = self._prefixes or Prefixes(_PREFIX_BYTES)

            def clock() -> float:
                """Is looked at between two steps."""
                if question.dropped:
                    raise _DroppedError
                return time.perf_counter()

            return runner.complete(prefix, prefixes=self._prefixes, clock=clock, **asked)
        # A connection for each: one that has been interrupted, or idle for long, is of no use.
        client.open(self._asking.deadline_seconds + _PATIENCE)
        if question.dropped:
            raise _DroppedError
        return runner.complete(prefix, **asked)


def begin(length: int, context: int) -> int:
    """Where of ``length`` characters those begin that may fit a context of so many tokens.

    It is the same place for as many keys as are a quarter of them, so that what was read before still counts.
    """
    most = min(context * _CHARACTERS, _MOST_CHARACTERS)
    step = max(1, most // 4)
    return 0 if length <= most else -(-(length - most) // step) * step


def _texts(found: list[Found]) -> set[str]:
    return {each.text for each in found}


def _sound(text: str) -> str:
    """Without halves of characters, which a terminal in another encoding may send."""
    return text.encode("utf-8", "replace").decode()


def _told(error: Exception) -> str:
    return "there is not enough memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
