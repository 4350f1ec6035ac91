"""Typing at a screen of ``gptcli edit`` in this process: keys through a pipe, a model that a test stands in for."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from gptcli.cli.edit_ask import Answer, Asking, Question
from gptcli.cli.edit_ghost import Found
from gptcli.cli.edit_line import LineScreen
from gptcli.cli.edit_text import TextScreen

TAB, ENTER, ESCAPE, UP, DOWN, RIGHT, LEFT = "\t", "\r", "\x1b", "\x1b[A", "\x1b[B", "\x1b[C", "\x1b[D"
ALT_ENTER, CTRL_SPACE, CTRL_E, CTRL_F, END = "\x1b\r", "\x00", "\x05", "\x06", "\x1b[F"
_COLUMNS = DummyOutput().get_size().columns
_PATIENCE = float(os.environ.get("TMUX_PATIENCE", 180))  # seconds, far beyond what anything here takes


class Model:
    """Stands in for ``edit_ask.Asker``: a test reads the questions and gives the answers."""

    def __init__(self) -> None:
        self.name, self.state, self.why = "tiny", "warm", ""
        self.used: dict[str, str] = {}
        self.asked: list[Question] = []
        self.waiting: Question | None = None
        self.changed: Callable[[], None] = lambda: None
        self._answered: Callable[[Question, Answer], None] = lambda question, answer: None

    def start(self, changed: Callable[[], None], answered: Callable[[Question, Answer], None]) -> None:
        self.changed, self._answered = changed, answered

    def ask(self, question: Question) -> None:
        self.asked.append(question)
        self.waiting = question

    def cancel(self) -> None:
        self.waiting = None

    def close(self) -> None:
        pass

    def answer(self, answer: Answer, question: Question | None = None) -> None:
        """Answer the last question, or an earlier one."""
        self._answered(question or self.asked[-1], answer)


class Clock:
    """Stands in for the event loop's: what is to be done later is done when a test says so."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, what: Callable[[], None]) -> Clock._Handle:
        entry = (seconds, what)
        self.pending.append(entry)
        return Clock._Handle(self, entry)

    def strike(self) -> None:
        """The time has come."""
        due, self.pending = self.pending, []
        for _, what in due:
            what()

    class _Handle:
        def __init__(self, clock: Clock, entry: tuple[float, Callable[[], None]]) -> None:
            self._clock, self._entry = clock, entry

        def cancel(self) -> None:
            if self._entry in self._clock.pending:
                self._clock.pending.remove(self._entry)


Screen = LineScreen | TextScreen


class Hand:
    """Types at a screen, and looks at it."""

    def __init__(self, screen: Screen, model: Model, pipe: Any) -> None:
        self.screen, self.model, self._pipe = screen, model, pipe
        self.buffer = screen.typing.buffer

    async def type(self, text: str) -> None:
        """Type a text, and wait until it is there, and what it led to has been settled."""
        end = self.buffer.document.text_before_cursor + text
        self._pipe.send_text(text)
        await self.until(lambda: self.buffer.document.text_before_cursor == end)
        await self.settled()

    def press(self, keys: str) -> None:
        """Keys as a terminal sends them."""
        self._pipe.send_text(keys)

    async def until(self, holds: Callable[[], object]) -> None:
        """Let everything go on until something holds."""

        end = time.monotonic() + _PATIENCE
        while not holds():
            assert time.monotonic() < end, "\n".join(["it never came:", *self.picture, self.screen.typing.problem])
            await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Let what was begun by the last key go on: it is behind a few rounds of the event loop."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def question(self, number: int) -> Question:
        """The question of a number, from 1, once it is asked."""
        await self.until(lambda: len(self.model.asked) >= number)
        return self.model.asked[number - 1]

    async def ghost(self, *texts: str) -> None:
        """Answer the last question, and wait for it to be shown."""
        self.model.answer([Found(text, 0.5 / number) for number, text in enumerate(texts, 1)])
        await self.until(lambda: self.shown == texts[0])

    @property
    def shown(self) -> str:
        """The ghost text."""
        return self.screen.typing.shown()

    @property
    def picture(self) -> list[str]:
        """The lines of the screen as they were drawn last."""
        drawn = self.screen.app.renderer.last_rendered_screen
        if drawn is None:
            return [""]
        rows = (drawn.data_buffer[number] for number in range(drawn.height))
        # A wide character takes two columns, and the second is empty.
        return ["".join(row[column].char for column in range(_COLUMNS)).rstrip() for row in rows]


ASKING = Asking(delay_seconds=0.001, min_prob=0.25)


def play(make: Callable[..., Screen], scenario: Callable[[Hand], Awaitable[None]], clock: Clock | None = None) -> Any:
    """Open a screen, have a scenario played at it, and return its result."""
    model = Model()
    with create_pipe_input() as pipe:
        screen = make(model, ASKING, input=pipe, output=DummyOutput(), later=clock.later if clock else None)
        app: Any = screen.app

        async def both() -> Any:
            running = asyncio.ensure_future(
                app.run_async(pre_run=screen.typing.begin, set_exception_handler=False, handle_sigint=False)
            )
            try:
                await scenario(Hand(screen, model, pipe))
                return await asyncio.wait_for(running, _PATIENCE)
            finally:
                running.cancel()

        return asyncio.run(both())
