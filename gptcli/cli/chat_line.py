"""The line on which a person types: by prompt_toolkit where it is installed, else plainly."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gptcli.cli.out import Output
from gptcli.cli.state import private_file

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

MARK, MORE = "> ", "… "
_ESCAPE_SECONDS = 0.05

Complete = Callable[[str], list[str]]


class Line(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message; None when the user leaves."""
        ...


def open_line(out: Output, complete: Complete, *, history: bool, vi: bool, shown: Callable[[], None]) -> Line:
    """The best line that this terminal has.

    Args:
        complete: what the last word of an unfinished line may become.
        history: keep what is typed in the state folder, and find it there.
        vi: with vi's keys; a plain line has those that its library is set to (``~/.inputrc``).
        shown: is called when a line is there to be typed at.
    """
    if os.environ.get("TERM", "dumb") == "dumb":
        return PlainLine(out, shown)
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        out.note("pip install 'gptcli[edit]' for history, completion and messages of several lines")
        return PlainLine(out, shown)
    file = None
    if history:
        try:
            file = private_file("chat_history")
        except OSError as error:
            out.note(f"no history: {error.filename}: {error.strerror}")
    return ToolkitLine(out, complete, file, shown, vi=vi)


class PlainLine:
    """``input()``: a backslash at the end of a line goes on in the next."""

    def __init__(self, out: Output, shown: Callable[[], None]) -> None:
        self._out, self._shown = out, shown
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # the arrows work with it

    def read(self) -> str | None:
        lines: list[str] = []
        self._shown()  # as good as: input() shows the mark itself
        while True:
            try:
                lines.append(self._ask(MORE if lines else MARK))
            except EOFError:
                self._out.stats("")
                return None
            except KeyboardInterrupt:
                self._out.stats("")
                if not lines and not _typed():
                    return None
                lines = []
                continue
            if not lines[-1].endswith("\\"):
                return "\n".join(lines)
            lines[-1] = lines[-1][:-1]

    def _ask(self, mark: str) -> str:
        if self._out.on_terminal:
            return input(mark)
        # The answers go to a file, where the mark has no business; input() would put it there.
        self._out.stderr.write(mark)
        self._out.stderr.flush()
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.removesuffix("\n")


def _typed() -> str:
    """What stood on the line that Ctrl-C ended, where readline knows."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


class ToolkitLine:
    """A line that can be several, with history and completion.

    A paste goes in as it is. Enter sends; Alt-Enter, or a backslash before Enter, begins another line. Ctrl-X Ctrl-E
    (to vi: v) opens it in $VISUAL or $EDITOR, whose end sends it.
    """

    def __init__(
        self, out: Output, complete: Complete, history: Path | None, shown: Callable[[], None], *, vi: bool = False
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.cursor_shapes import ModalCursorShapeConfig
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.output import ColorDepth, create_output

        class Words(Completer):
            def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
                text = document.text_before_cursor
                last = text if " " not in text else text.split(" ", 2 if text.lower().startswith("/set ") else 1)[-1]
                for word in complete(text) if document.is_cursor_at_the_end else ():
                    yield Completion(word, start_position=-len(last))

        self._shown = shown
        # Where the answers go to a file, the line stands on stderr.
        stream = out.stdout if out.on_terminal else out.stderr
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)) if history else InMemoryHistory(),
            completer=Words(),
            complete_while_typing=True,
            reserve_space_for_menu=4,
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=lambda width, number, wrapped: "" if wrapped else MORE,
            output=create_output(stdout=stream),
            color_depth=None if out.colored(stream) else ColorDepth.MONOCHROME,
            enable_open_in_editor=out.on_terminal,  # else the editor's screen would go to the file
            tempfile_suffix=".txt",
            vi_mode=vi,
            cursor=ModalCursorShapeConfig() if vi else None,
        )
        if vi:  # Esc is a key of its own, and should not wait for what may come behind it
            self._session.app.ttimeoutlen = self._session.app.timeoutlen = _ESCAPE_SECONDS

    def read(self) -> str | None:
        try:
            return self._session.prompt(MARK, pre_run=self._before)
        except (EOFError, KeyboardInterrupt):
            return None

    def _before(self) -> None:
        """Called before the line is drawn the first time; what is due soon comes behind that."""
        import asyncio

        asyncio.get_running_loop().call_soon(self._shown)


def _keys() -> KeyBindings:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.filters import vi_navigation_mode
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None  # take the word that the menu shows
        elif buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("tab", filter=~vi_navigation_mode)
    def complete(event: KeyPressEvent) -> None:
        # Looked up here and now: while a menu is still being made in the background, toolkit's own Tab is lost.
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_next()
            return
        found = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif found:
            buffer.start_completion(select_first=True)

    @keys.add("escape", "enter")
    def another_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    def clear_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError)

    return keys
