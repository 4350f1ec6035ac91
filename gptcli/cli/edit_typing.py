"""Typing with ghost text: a prompt_toolkit buffer, who is asked how it goes on, and the keys that take it."""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from prompt_toolkit.application.current import get_app
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import Condition, FilterOrBool, has_focus, vi_mode
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.vi_state import InputMode

from gptcli.cli.edit_ask import FAILED, LOADING, Answer, Asking, Question
from gptcli.cli.edit_ghost import Ghost, first_word
from gptcli.errors import GptcliError

# Alternatives, at most. They go on while they are so likely: of whole lines none is.
_ALTERNATIVES, _LIKELY = 6, 0.01
# Bytes of earlier texts that are kept to be come back to.
_UNDO_BYTES = 64 << 20


class Asks(Protocol):
    """Whoever is asked: ``edit_ask.Asker``."""

    name: str
    state: str
    why: str

    def start(self, changed: Callable[[], None], answered: Callable[[Question, Answer], None]) -> None: ...

    def ask(self, question: Question) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class TypedBuffer(Buffer):
    """A buffer whose undo does not eat up the memory."""

    def save_to_undo_stack(self, clear_redo_stack: bool = True) -> None:
        super().save_to_undo_stack(clear_redo_stack)
        most = max(16, _UNDO_BYTES // max(1, len(self.text)))
        del self._undo_stack[:-most]


class Typing:
    """A buffer that is typed in, and the ghost text at its cursor.

    Attributes:
        buffer: what is typed.
        ghost: what is suggested.
        problem: what went wrong with it last, to be told.
    """

    def __init__(self, buffer: Buffer, asker: Asks, asking: Asking, later: Callable[..., Any] | None = None) -> None:
        """``later(seconds, what)``: the event loop's ``call_later``, or another clock for tests."""
        self.buffer, self.asker, self.ghost = buffer, asker, Ghost()
        self.problem = ""
        self._asking, self._later = asking, later
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draw: Callable[[], None] = lambda: None
        self._timer: Any = None
        self._asked: Question | None = None
        self._settling = self._cancelled = False
        self._place = ("", "")
        buffer.on_text_changed += self._touched
        buffer.on_cursor_position_changed += self._touched

    # --- What the screen shows

    def shown(self) -> str:
        """The ghost text at the cursor now."""
        if not self.ghost.found or not _writes() or self.buffer.selection_state is not None:
            return ""
        return self.ghost.text(*self._here())

    @property
    def model(self) -> str:
        """The model, and how it is."""
        if self.asker.state == FAILED:
            return f"no model: {self.asker.why}"
        return (
            f"{self.asker.name} is loading…"
            if self.asker.state == LOADING
            else f"{self.asker.name} ({self.asker.state})"
        )

    # --- What happens

    def begin(self) -> None:
        """Let the asker load, and ask for the text that is there already. Called when the event loop runs."""
        loop = self._loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._failed)

        def soon(what: Callable[..., None], *values: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(what, *values)

        self._draw = get_app().invalidate
        self.asker.start(lambda: soon(self._draw), lambda question, answer: soon(self._answered, question, answer))
        self._cancelled = True
        self._settle()

    def _here(self) -> tuple[str, str]:
        document = self.buffer.document
        return document.text_before_cursor, document.text_after_cursor

    def _touched(self, buffer: Buffer) -> None:
        """A key has changed something, and may still do more: where it all ends is looked at behind it."""
        self._cancel()
        if not self._settling and self._loop is not None:
            self._settling = True
            self._loop.call_soon(self._settle)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._timer is not None or self._asked is not None:
            self._cancelled = True
        self._timer = self._asked = None
        self.asker.cancel()

    def _settle(self) -> None:
        self._settling = False
        place, last = self._here(), self._place
        if place == last and not self._cancelled:
            return
        self._place, self._cancelled, self.problem = place, False, ""
        self.ghost.settle()
        if self.ghost.text(*place):
            return
        changed = len(place[0]) + len(place[1]) != len(last[0]) + len(last[1]) or "".join(place) != "".join(last)
        # Whoever only walks through a text is not spoken to, but where it might go on.
        if _writes() and place[0].strip() and (changed or self._at_the_end_of_a_line()):
            later = self._later or asyncio.get_running_loop().call_later
            self._timer = later(self._asking.delay_seconds, self._ask)

    def _at_the_end_of_a_line(self) -> bool:
        return not self.buffer.document.current_line_after_cursor.strip()

    def _ask(self, *, others_from: float | None = None) -> None:
        """Ask how it goes on here; or for alternatives that are at least so likely."""
        self._cancel()
        self._cancelled = False
        before, after = self._here()
        if others_from is None:
            self._asked = Question(before, after, min_prob=self._asking.min_prob)
        else:
            self._asked = Question(before, after, _ALTERNATIVES, others_from, menu=True)
        self.asker.ask(self._asked)

    def _answered(self, question: Question, answer: Answer) -> None:
        if question is not self._asked:
            return
        self._asked = None
        if isinstance(answer, GptcliError):
            self.problem = answer.message
        elif answer:
            self.ghost.show(question.before, question.after, answer, menu=question.menu)
        elif question.menu and question.min_prob:
            self._ask(others_from=0.0)
        elif question.menu:
            self.problem = "nothing comes to its mind here"
        self._draw()

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A fault of ours: it is told, and the text stays where it is."""
        error = context.get("exception")
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise error
        self.problem = f"a fault of gptcli: {type(error).__name__}: {error}" if error else str(context.get("message"))
        if error is not None and os.environ.get("GPTCLI_DEBUG") == "1":
            traceback.print_exception(error)
        self._draw()

    # --- Keys

    def keys(self, *, in_text: bool) -> KeyBindings:
        """What the keys do to the ghost text; ``in_text`` Tab before any text is a tab, and Ctrl-F is left to find."""
        keys = KeyBindings()
        here = has_focus(self.buffer) & Condition(_writes)
        ghosted = here & Condition(lambda: bool(self.shown()))
        chosen_from = here & Condition(lambda: self.ghost.menu)
        busy = here & Condition(lambda: self._asked is not None or self._timer is not None)
        at_the_end = Condition(self._at_the_end_of_a_line)

        def add(*names: str, filter: FilterOrBool) -> Callable[[Callable[[KeyPressEvent], None]], Any]:
            return keys.add(*names, filter=filter)

        @add(" ", filter=here)
        def space(event: KeyPressEvent) -> None:
            """As any other character; but what is undone goes back to it, and not to the beginning."""
            self.buffer.insert_text(" ")

        @add("tab", filter=here & ~ghosted)
        def indent_or_ask(event: KeyPressEvent) -> None:
            if in_text and not self.buffer.document.current_line_before_cursor.strip():
                self.buffer.insert_text("\t")
            else:
                self._ask()

        @add("tab", filter=ghosted)
        @add("end", filter=ghosted & at_the_end)
        @add("c-e", filter=ghosted & at_the_end)
        @add("enter", filter=chosen_from)
        def take_all(event: KeyPressEvent) -> None:
            self._take(self.shown())

        @add("right", filter=ghosted & at_the_end)
        @add("c-f", filter=ghosted & at_the_end & Condition(lambda: not in_text))
        @add("c-right", filter=ghosted & at_the_end)
        @add("escape", "f", filter=ghosted & at_the_end)
        @add("escape", "right", filter=ghosted & at_the_end)
        def take_word(event: KeyPressEvent) -> None:
            self._take(first_word(self.shown()))

        @add("c-space", filter=here)
        def alternatives(event: KeyPressEvent) -> None:
            if self.ghost.menu:
                self.ghost.choose(1)
            else:
                self._ask(others_from=_LIKELY)

        @add("down", filter=chosen_from)
        @add("c-n", filter=chosen_from)
        def next_one(event: KeyPressEvent) -> None:
            self.ghost.choose(1)

        @add("up", filter=chosen_from)
        @add("c-p", filter=chosen_from)
        def one_before(event: KeyPressEvent) -> None:
            self.ghost.choose(-1)

        # To vi, Esc is another mode, which has no ghost text; that it closes the alternatives is enough.
        @add("escape", filter=chosen_from | (ghosted | busy) & ~vi_mode)
        def hide(event: KeyPressEvent) -> None:
            self._cancel()
            self._cancelled = False
            if self.ghost.menu:
                self.ghost.close()
            else:
                self.ghost.drop()

        return keys

    def _take(self, text: str) -> None:
        self.ghost.settle()
        self.buffer.insert_text(text)


def _writes() -> bool:
    """Whether what is typed is text: in one of vi's other modes it is not."""
    app = get_app()
    vi = app.vi_state
    return app.editing_mode is not EditingMode.VI or (
        vi.input_mode is InputMode.INSERT and not vi.temporary_navigation_mode
    )
