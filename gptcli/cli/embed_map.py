"""How like each other texts or words are: the cosine of each with each, as a heat map."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from gptcli.cli.cells import cells, cut, fit
from gptcli.cli.embed_vectors import Work
from gptcli.cli.out import Output
from gptcli.cli.shade import COLD, HEAT, shade

_NUMBER = 6  # cells of " -0.12"
_PATCH = 2  # cells of a coloured patch without its number


def show_similarity(out: Output, work: Work, texts: Sequence[str]) -> None:
    """Write the matrix to stdout: a heat map on a terminal, in a pipe a table with tabs."""
    from gptcli.core.embedding import cosines

    items = work.items(texts)
    matrix = cosines([item.vector for item in items])
    if out.json:
        named = [{"text": item.text, "tokens": list(item.vector.ids)} for item in items]
        out.record({**work.head(), "items": named, "similarity": matrix})
        return
    names = [item.label for item in items]
    if not out.on_terminal:
        out.data("\t".join(["", *names]))
        for name, row in zip(names, matrix, strict=True):
            out.data("\t".join([name, *map(repr, row)]))
        return
    width = shutil.get_terminal_size().columns
    for line in heat_map(names, matrix, width, colored=out.colored()):
        out.data(line)
    out.data(out.style(cut(f"cosines, {work.source()}", width), "dim"))


def heat_map(names: Sequence[str], matrix: Sequence[Sequence[float]], width: int, *, colored: bool) -> list[str]:
    """The matrix in at most ``width`` cells: numbers on a ground that tells their size, or, where there is no room for
    numbers, the ground alone; rows and columns beyond the width are left out, and the last line says so.
    """
    total = len(names)
    digits = len(str(total))
    room = min(max(map(cells, names)), max(8, width // 3))  # for a row's name
    free = width - room - digits - 1
    cell = _NUMBER if total * _NUMBER <= free or not colored else _PATCH
    count = max(1, min(total, free // cell))
    longest = max(map(cells, names)) + 1
    if cell == _NUMBER and max(longest, _NUMBER) * count <= free:
        cell = max(longest, _NUMBER)
        heads = names
    else:
        heads = [str(number) for number in range(1, count + 1)]
    numbered = heads is not names
    before = room + (digits + 1 if numbered else 0)
    low, high = _range(matrix)
    lines = [" " * before + "".join(_right(head, cell) for head in heads[:count])]
    if cell == _PATCH:  # no room for a number above each
        lines = [" " * before + "".join(_right(head if int(head) % 5 == 0 else "", cell) for head in heads)]
    for place in range(count):
        start = (f"{place + 1:>{digits}} " if numbered else "") + fit(names[place], room)
        lines.append(start + "".join(_cell(value, cell, low, high, colored) for value in matrix[place][:count]))
    if count < total:
        lines.append(f"the first {count} of {total}: in a pipe or with --json all are there"[:width])
    if colored:
        lines.append(cut(f"from no colour at {low:.2f} to the strongest at {high:.2f}", width))
    return lines


def _range(matrix: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What is drawn from no colour to the strongest: 0 to 1, or, where nothing is below a half, from the least.

    The vectors of a transformer's texts all lie in a narrow cone: from 0 the whole map would be one colour.
    """
    least = min(min(row) for row in matrix)
    return (least, 1.0) if 0.5 < least < 0.9999 else (0.0, 1.0)


def _cell(value: float, cell: int, low: float, high: float, colored: bool) -> str:
    text = " " * cell if cell == _PATCH else f"{value:.2f}".rjust(cell - 1) + " "
    if not colored:
        return text
    strength = (value - low) / (high - low)
    return shade(text, abs(strength), HEAT if strength >= 0 else COLD)


def _right(head: str, cell: int) -> str:
    """A column's head, over the right end of its numbers."""
    if cell == _PATCH:
        return head.rjust(cell)[-cell:]
    shown = cut(head, cell - 1)
    return " " * (cell - 1 - cells(shown)) + shown + " "
