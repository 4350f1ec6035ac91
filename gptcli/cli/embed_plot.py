"""Texts or words as points in the plane in which they differ most: in the terminal, or in a file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.cli.cells import cells, cut
from gptcli.cli.embed_vectors import Work
from gptcli.cli.out import Output, harmless

_MARK = "●"
_LONGEST_LABEL = 24


def show_plot(out: Output, work: Work, texts: Sequence[str], file: Path | None, *, drawn: bool) -> None:
    """Draw the points into ``file`` if there is one, and with ``drawn`` or without a file on stdout."""
    if file is not None:
        from gptcli.cli.figure import need_matplotlib

        need_matplotlib("--plot to draw in the terminal")  # what is missing is told at once
    from gptcli.core.embedding import principal_components

    items = work.items(texts)
    found = principal_components([item.vector for item in items])
    names = [item.label for item in items]
    if file is not None:
        _into_file(file, names, found.points, found.explained, work.source())
    if out.json:
        points = [
            {"text": item.text, "tokens": list(item.vector.ids), "x": x, "y": y}
            for item, (x, y) in zip(items, found.points, strict=True)
        ]
        written = {} if file is None else {"output": str(file)}
        out.record({**work.head(), **written, "explained_variance": list(found.explained), "items": points})
        return
    if file is not None:
        out.data(str(file))
        if not drawn:
            return
    if not out.on_terminal:
        for name, (x, y) in zip(names, found.points, strict=True):
            out.data(f"{x!r}\t{y!r}\t{name}")
        return
    size = shutil.get_terminal_size()
    lines, dropped = scatter(names, found.points, size.columns, max(8, min(40, size.lines - 4)))
    for line in lines:
        out.data(line)
    x, y = found.explained
    said = f"PCA: {x:.1%} of the variance across, {y:.1%} up; {work.source()}"
    out.data(out.style(cut(said, size.columns), "dim"))
    if dropped:
        out.note(f"{dropped} of {len(names)} labels found no room; a wider terminal or --plot-file has more")


def scatter(
    names: Sequence[str], points: Sequence[tuple[float, float]], width: int, height: int
) -> tuple[list[str], int]:
    """``height`` lines of at most ``width`` cells with a mark at each point and its name beside it, and how many names
    were left out because they would cover another name or mark.
    """
    canvas = _Canvas(width, height)
    places = [
        (column, row)
        for column, row in zip(
            _spread([x for x, _ in points], width - 1), _spread([-y for _, y in points], height - 1), strict=True
        )
    ]
    for column, row in places:
        canvas.put(column, row, _MARK)
    dropped = 0
    for name, (column, row) in zip(names, places, strict=True):
        shown = cut(name, min(_LONGEST_LABEL, width // 2))
        length = cells(shown)
        beside = ((column + 2, row), (column - 1 - length, row))
        around = ((column - length // 2, row - 1), (column - length // 2, row + 1))
        corners = ((column + 1, row - 1), (column + 1, row + 1), (column - length, row - 1), (column - length, row + 1))
        free = next((place for place in (*beside, *around, *corners) if canvas.is_free(*place, length)), None)
        if free is None:
            dropped += 1
        else:
            canvas.put(*free, shown)
    return canvas.lines(), dropped


class _Canvas:
    """A grid of cells; a wide character fills two."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells: list[list[str | None]] = [[None] * width for _ in range(height)]

    def is_free(self, column: int, row: int, length: int) -> bool:
        """Whether ``length`` cells from here are empty, and a cell to either side of them."""
        if not (0 <= row < self.height and column >= 0 and column + length <= self.width):
            return False
        # A mark may stand right beside its own name where the name is above or below, but not within it.
        around = self._cells[row][max(0, column - 1) : column + length + 1]
        return all(cell is None for cell in around)

    def put(self, column: int, row: int, text: str) -> None:
        for char in text:
            taken = cells(char)
            if taken == 0:  # it stands on the character before
                before = self._cells[row][column - 1]
                self._cells[row][column - 1] = (before or "") + char
                continue
            self._cells[row][column : column + taken] = [char, *[""] * (taken - 1)]
            column += taken

    def lines(self) -> list[str]:
        return ["".join(" " if cell is None else cell for cell in row).rstrip() for row in self._cells]


def _spread(values: Sequence[float], last: int) -> list[int]:
    """Values as whole places from 0 to ``last``, in proportion; all the same in the middle."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        return [last // 2] * len(values)
    return [round((value - low) / (high - low) * last) for value in values]


def _into_file(
    file: Path,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    explained: tuple[float, float],
    source: str,
) -> None:
    from gptcli.cli.figure import figure
    from gptcli.core.files import write_whole

    def draw(axes: Any) -> None:
        axes.scatter([x for x, _ in points], [y for _, y in points], s=18, color="C0")
        for name, point in zip(names, points, strict=True):
            shown = cut(harmless(name), 2 * _LONGEST_LABEL)
            axes.annotate(shown, point, xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set_xlabel(f"first component, {explained[0]:.1%} of the variance")
        axes.set_ylabel(f"second component, {explained[1]:.1%}")
        axes.set_title(source, fontsize=9)
        axes.margins(0.12)
        axes.grid(alpha=0.25)

    write_whole(file, figure(file.suffix.lower().removeprefix("."), (8, 6), draw))
