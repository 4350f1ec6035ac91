"""A prompt line with ghost text, which may be several: what Enter accepts is the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus, is_done
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import Output
from prompt_toolkit.widgets import SearchToolbar

from gptcli.cli.edit_ask import Asking
from gptcli.cli.edit_parts import GhostText, hasten, look, menu
from gptcli.cli.edit_typing import Asks, TypedBuffer, Typing

_MARK, _MORE = "> ", "… "
_KEYS = "Tab all, → word, Esc none, ^Space others, Enter done"


class LineScreen:
    """One prompt line.

    Attributes:
        app: the application; its result is the text, or None where the user left.
        typing: the text and its ghost.
    """

    def __init__(
        self,
        asker: Asks,
        asking: Asking,
        *,
        input: Input,
        output: Output,
        initial: str = "",
        history: Path | None = None,
        colored: bool = True,
        vi: bool = False,
        erase: bool = False,
        later: Any = None,
    ) -> None:
        """``erase``: leave nothing on the screen, since the text will be there anyway. ``vi``: with vi's keys."""
        kept: History = FileHistory(str(history)) if history else InMemoryHistory()
        buffer = TypedBuffer(
            document=Document(initial, len(initial)),
            history=kept,
            multiline=True,
            enable_history_search=False,
            accept_handler=self._accept,
        )
        self.typing = Typing(buffer, asker, asking, later)
        search = SearchToolbar(ignore_case=True)
        control = BufferControl(
            buffer,
            search_buffer_control=search.control,
            preview_search=True,
            input_processors=[GhostText(self.typing), TabsProcessor()],
        )
        text = Window(control, wrap_lines=True, dont_extend_height=True, get_line_prefix=_prefix)
        told = Window(FormattedTextControl(self._told), height=1, dont_extend_height=True, style="class:dim")
        body = HSplit(
            [
                text,
                ConditionalContainer(search, filter=~is_done),
                menu(self.typing),
                ConditionalContainer(told, filter=~is_done & has_focus(buffer)),
            ]
        )
        self.app: Application[str | None] = Application(
            layout=Layout(body, focused_element=text),
            key_bindings=merge_key_bindings([self._keys(buffer), self.typing.keys(in_text=False)]),
            erase_when_done=erase,
            input=input,
            output=output,
            **look(colored=colored, vi=vi),
        )
        hasten(self.app)

    def run(self) -> str | None:
        """Let it be typed; None where the user leaves. Raises KeyboardInterrupt for Ctrl-C."""
        try:
            return self.app.run(pre_run=self.typing.begin, set_exception_handler=False)
        except EOFError:  # the terminal has gone
            return None

    def _accept(self, buffer: Buffer) -> bool:
        self.app.exit(result=buffer.text)
        return True  # the text stays to be drawn once more

    def _told(self) -> StyleAndTextTuples:
        return [("", self.typing.problem or f"{self.typing.model} │ {_KEYS}")]

    def _keys(self, buffer: Buffer) -> KeyBindings:
        keys = KeyBindings()
        here = has_focus(buffer)

        @keys.add("enter", filter=here)
        def accept(event: KeyPressEvent) -> None:
            buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=here)
        def another_line(event: KeyPressEvent) -> None:
            buffer.newline(copy_margin=False)

        @keys.add("c-c", filter=here)
        @keys.add("<sigint>")
        def interrupt(event: KeyPressEvent) -> None:
            event.app.exit(exception=KeyboardInterrupt)

        @keys.add("c-d", filter=here & Condition(lambda: not buffer.text))
        def leave(event: KeyPressEvent) -> None:
            event.app.exit(result=None)

        return keys


def _prefix(line: int, wrapped: int) -> StyleAndTextTuples:
    return [("", "" if wrapped else _MORE if line else _MARK)]
