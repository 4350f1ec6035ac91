"""A picture that stays at the bottom of the terminal: rich's Live, and what it lacks when the window gets narrower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live


def keep_drawn(picture: Any, console: Console, per_second: float) -> Live:
    """A Live (a context manager) that draws ``picture`` anew ``per_second`` times, each time to the window's size."""
    from rich.control import Control
    from rich.live import Live
    from rich.segment import ControlType, Segment

    class Measured:
        """The picture, and how wide its lines were when last drawn."""

        widths: tuple[int, ...] = ()

        def __rich_console__(self, console: Console, options: Any) -> Any:
            lines = console.render_lines(picture, options, pad=False)
            self.widths = tuple(sum(segment.cell_length for segment in line) for line in lines)
            for line in lines:
                yield from line
                yield Segment.line()

    class Resized(Live):
        def refresh(self) -> None:
            # Live goes up by as many lines as it drew. Terminals fold lines that became too long: it has to start
            # above what the folds added, or the rest of the old picture stays.
            with self._lock:
                width = max(1, console.width)
                folds = sum(max(0, drawn - 1) // width for drawn in measured.widths)
                if folds and console.is_terminal:
                    up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * min(folds, console.height)
                    console.control(Control(*up))
                    measured.widths = ()
                super().refresh()

    measured = Measured()
    return Resized(measured, console=console, refresh_per_second=per_second, transient=True, vertical_overflow="crop")
