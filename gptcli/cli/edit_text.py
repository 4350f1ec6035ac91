"""A whole text with ghost text: a file on the screen, a line that tells how it stands, keys that save and leave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from prompt_toolkit.application import Application
from prompt_toolkit.application.current import get_app
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout import ConditionalContainer, FormattedTextControl, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl
from prompt_toolkit.layout.processors import TabsProcessor
from prompt_toolkit.output import Output
from prompt_toolkit.search import SearchDirection, do_incremental_search, start_search
from prompt_toolkit.widgets import SearchToolbar

from gptcli.cli.cells import cells
from gptcli.cli.edit_ask import Asking
from gptcli.cli.edit_file import TextFile
from gptcli.cli.edit_parts import GhostText, hasten, look, menu
from gptcli.cli.edit_typing import Asks, TypedBuffer, Typing
from gptcli.cli.out import harmless
from gptcli.errors import GptcliError

_KEYS = "Tab all, → word, Esc none, ^Space others │ ^S save, ^X leave, ^F find, ^Z undo"
_LEAST_ROWS = 5  # of a screen that has room for the keys


def _end_of(path: str, room: int) -> str:
    """A path that is cut at its beginning, where there is not enough room; its last letters stay."""
    while len(path) > 8 and cells(path) > room:
        path = "…" + path[2:]
    return path


class _Question(NamedTuple):
    """Something that is asked, and what y and n do; n may be as good as Esc."""

    text: str
    yes: Callable[[], None]
    no: Callable[[], None] | None


class TextScreen:
    """A file that is edited.

    Attributes:
        app: the application; its result is the exit code.
        typing: the text and its ghost.
        saved: whether the file was written.
    """

    def __init__(
        self,
        file: TextFile,
        asker: Asks,
        asking: Asking,
        *,
        input: Input,
        output: Output,
        colored: bool = True,
        vi: bool = False,
        later: Any = None,
    ) -> None:
        self.file, self.saved = file, False
        self._message = "" if file.exists else "a new file"
        self._question: _Question | None = None
        self.buffer = TypedBuffer(document=Document(file.text, 0), multiline=True)
        self.typing = Typing(self.buffer, asker, asking, later)
        search = SearchToolbar(ignore_case=True)
        control = self._control = BufferControl(
            self.buffer,
            search_buffer_control=search.control,
            preview_search=True,
            input_processors=[GhostText(self.typing), TabsProcessor(char1=" ", char2=" ")],
        )
        self._text = Window(control, wrap_lines=True)
        asked = FormattedTextControl(
            self._told, focusable=Condition(lambda: self._question is not None), key_bindings=self._answers()
        )
        self._below = Window(asked, height=1, dont_extend_height=True)
        roomy = Condition(lambda: get_app().output.get_size().rows >= _LEAST_ROWS)
        needed = Condition(lambda: bool(self._question or self._message or self.typing.problem))
        body = HSplit(
            [
                self._text,
                search,
                menu(self.typing),
                Window(FormattedTextControl(self._status), height=1, style="class:status"),
                ConditionalContainer(self._below, filter=roomy | needed),
            ]
        )
        self.app: Application[int] = Application(
            layout=Layout(body, focused_element=self._text),
            key_bindings=merge_key_bindings([self._keys(search), self.typing.keys(in_text=True)]),
            full_screen=True,
            enable_page_navigation_bindings=True,
            input=input,
            output=output,
            **look(colored=colored, vi=vi),
        )
        hasten(self.app)
        self.app.key_processor.before_key_press += self._forget

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self.buffer.text != self.file.text

    def run(self) -> int:
        """Let it be edited; returns the exit code. Raises EOFError when the terminal has gone."""
        return self.app.run(pre_run=self.typing.begin, set_exception_handler=False)

    # --- What is shown

    def _status(self) -> StyleAndTextTuples:
        document = self.buffer.document
        star = "*" if self.changed else " "
        row, column = document.cursor_position_row + 1, document.cursor_position_col + 1
        rest = f"{star} {row}:{column} │ {self.typing.model}"
        room = get_app().output.get_size().columns - 1 - cells(rest)
        return [("", f" {_end_of(harmless(str(self.file.path)), room)}{rest}")]

    def _told(self) -> StyleAndTextTuples:
        if self._question is not None:
            return [("class:question", f" {self._question.text}")]
        message = self.typing.problem or self._message
        return [("", f" {harmless(message)}")] if message else [("class:dim", f" {_KEYS}")]

    def _forget(self, sender: Any) -> None:
        self._message = ""

    # --- What is done

    def _save(self, then: Callable[[], None] | None = None) -> None:
        def write() -> None:
            try:
                written = self.file.save(self.buffer.text)
            except GptcliError as error:
                self._message = f"{error.message}: {error.hint}"
                return
            self.saved, self._message = True, f"{written:,} bytes are saved"
            if then is not None:
                then()

        if self.file.changed_on_disk:
            what = "changed on the disk" if self.file.exists else "come into being"
            self._ask(f"The file has {what} meanwhile. Write over it? y, or Esc", write)
        else:
            write()

    def _leave(self, code: int = 0) -> None:
        def leave() -> None:
            self.app.exit(result=code)

        if self.changed:
            self._ask("Save the changes? y, n, or Esc to stay", lambda: self._save(leave), leave)
        else:
            leave()

    def _ask(self, text: str, yes: Callable[[], None], no: Callable[[], None] | None = None) -> None:
        self._question = _Question(text, yes, no)
        self.app.layout.focus(self._below)

    def _answers(self) -> KeyBindings:
        keys = KeyBindings()

        def answer(act: Callable[[], None] | None) -> None:
            self._question = None
            self.app.layout.focus(self._text)
            if act is not None:
                act()

        @keys.add("y")
        @keys.add("Y")
        def yes(event: KeyPressEvent) -> None:
            if self._question is not None:
                answer(self._question.yes)

        @keys.add("n")
        @keys.add("N")
        def no(event: KeyPressEvent) -> None:
            if self._question is not None:
                answer(self._question.no)

        @keys.add("escape")
        @keys.add("c-c")
        @keys.add("c-g")
        def stay(event: KeyPressEvent) -> None:
            answer(None)

        @keys.add(Keys.Any)
        def anything(event: KeyPressEvent) -> None:
            """Is no answer."""

        return keys

    def _keys(self, search: SearchToolbar) -> KeyBindings:
        keys = KeyBindings()
        here = has_focus(self.buffer)

        @keys.add("c-s", filter=here, eager=True)
        def save(event: KeyPressEvent) -> None:
            self._save()

        @keys.add("c-x", filter=here, eager=True)
        @keys.add("c-q", filter=here, eager=True)
        def leave(event: KeyPressEvent) -> None:
            self._leave()

        @keys.add("c-c", filter=here, eager=True)
        @keys.add("<sigint>", filter=here)
        def interrupt(event: KeyPressEvent) -> None:
            self._leave(130)

        @keys.add("c-z", filter=here, save_before=lambda event: False)
        def undo(event: KeyPressEvent) -> None:
            self.buffer.undo()

        @keys.add("escape", "z", filter=here, save_before=lambda event: False)
        def redo(event: KeyPressEvent) -> None:
            self.buffer.redo()

        @keys.add("c-f", filter=here)
        def find(event: KeyPressEvent) -> None:
            with suppress(IndexError):
                start_search(direction=SearchDirection.FORWARD)

        @keys.add("c-f", filter=has_focus(search.control))
        def find_next(event: KeyPressEvent) -> None:
            # With nothing to find yet it is what was found last.
            if not search.search_buffer.text and (last := self._control.search_state.text):
                search.search_buffer.insert_text(last)
            do_incremental_search(SearchDirection.FORWARD, count=event.arg)

        return keys
