"""The parts of a screen that ghost text needs: the text itself, a menu to choose from, colours."""

from __future__ import annotations

from typing import Any

from prompt_toolkit.application.current import get_app
from prompt_toolkit.cursor_shapes import ModalCursorShapeConfig
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import Condition, has_focus, is_done
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.formatted_text.utils import fragment_list_len
from prompt_toolkit.layout import ConditionalContainer, Container, FormattedTextControl, Window
from prompt_toolkit.layout.processors import Processor, Transformation, TransformationInput
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.styles import Style

from gptcli.cli.complete import percent
from gptcli.cli.edit_ghost import on_one_line
from gptcli.cli.edit_typing import Typing

# Seconds after which Esc is a key of its own, and not the beginning of another one's sequence: what a terminal sends
# for one key comes at once.
_ESCAPE_SECONDS = 0.05


class GhostText(Processor):
    """Shows the ghost text in the line of the cursor, behind it."""

    def __init__(self, typing: Typing) -> None:
        self._typing = typing

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        given, fragments = transformation_input, transformation_input.fragments
        if given.lineno != given.document.cursor_position_row or get_app().is_done:
            return Transformation(fragments)
        # While something is searched for, the cursor is shown where it would go.
        if not get_app().layout.has_focus(self._typing.buffer):
            return Transformation(fragments)
        if not (shown := on_one_line(self._typing.shown())):
            return Transformation(fragments)
        place = given.source_to_display(given.document.cursor_position_col)
        exploded: Any = explode_text_fragments(fragments)
        missing = place - fragment_list_len(exploded)  # the line's end may not be among them
        line = [*exploded[:place], *([("", " " * missing)] if missing > 0 else [])]
        whole: StyleAndTextTuples = [*line, ("class:ghost", shown), *exploded[place:]]
        length = len(shown)

        def to_display(column: int) -> int:
            return column if column <= place else column + length

        def to_source(column: int) -> int:
            return column if column <= place else max(place, column - length)

        return Transformation(whole, to_display, to_source)


def menu(typing: Typing) -> Container:
    """The alternatives with their probabilities, while they are to be chosen from."""

    def lines() -> StyleAndTextTuples:
        told: StyleAndTextTuples = []
        for number, each in enumerate(typing.ghost.found):
            mark, style = ("▸", "class:others.chosen") if number == typing.ghost.chosen else (" ", "class:others")
            told.append((style, f"{mark} {percent(each.probability)}  {on_one_line(each.text)}\n"))
        return told

    window = Window(
        FormattedTextControl(lines),
        height=lambda: len(typing.ghost.found),
        dont_extend_height=True,
        style="class:others",
    )
    return ConditionalContainer(
        window, filter=has_focus(typing.buffer) & ~is_done & Condition(lambda: typing.ghost.menu)
    )


def look(*, colored: bool, vi: bool) -> dict[str, Any]:
    """The arguments of an application that say how things look. Without colours the ghost text is underlined.

    With ``vi`` also whose keys they are; the cursor's shape then tells the mode.
    """
    styles = {
        "ghost": "ansibrightblack" if colored else "underline",
        "others": "",
        "others.chosen": "reverse",
        "status": "reverse",
        "dim": "ansibrightblack" if colored else "",
        "question": "bold",
    }
    told: dict[str, Any] = {"style": Style.from_dict(styles), "color_depth": None if colored else ColorDepth.MONOCHROME}
    if vi:
        told |= {"editing_mode": EditingMode.VI, "cursor": ModalCursorShapeConfig()}
    return told


def hasten(app: Any) -> None:
    """Let Esc be a key that acts at once."""
    app.ttimeoutlen = app.timeoutlen = _ESCAPE_SECONDS
