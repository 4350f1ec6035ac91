"""Tables: columns that line up in text, in Markdown, in CSV."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptcli.cli.cells import bar
from gptcli.cli.out import Output, harmless

_SHORTEST_BAR, _LONGEST_BAR = 8, 60


class Column(NamedTuple):
    """``keep``: on a terminal that is too narrow the columns that matter least go first; 0 always stays."""

    title: str
    right: bool = True
    keep: int = 0


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    notes: tuple[str, ...] = ()


def width_of(out: Output) -> int | None:
    """Columns of the terminal that stdout is; None where it is none, and lines may be as long as they like."""
    return shutil.get_terminal_size().columns if out.on_terminal else None


def fits(table: Table, out: Output) -> bool:
    """Whether all columns are shown."""
    return len(_kept(table, width_of(out))) == len(table.columns)


def as_text(table: Table, out: Output, *, shares: Sequence[float] | None = None) -> list[str]:
    """Lines of a table with a heading. ``shares`` (percent, one a row) draws bars, on a terminal that has room."""
    width = width_of(out)
    kept = _kept(table, width)
    widths = [max(len(row[i]) for row in [_titles(table), *table.rows]) for i in kept]
    room = None if width is None else width - sum(widths) - 2 * len(widths)
    bars = bars_of(shares, room) if shares is not None else [""] * len(table.rows)
    lines = _wrapped(out, table.title, "bold") if table.title else []
    for row, drawn, is_title in [
        (_titles(table), "", True),
        *((r, b, False) for r, b in zip(table.rows, bars, strict=True)),
    ]:
        cells = [
            harmless(row[i]).rjust(size) if table.columns[i].right else harmless(row[i]).ljust(size)
            for i, size in zip(kept, widths, strict=True)
        ]
        line = "  ".join([*cells, drawn]).rstrip()
        lines.append(out.style(line, "dim") if is_title else line)
    for note in table.notes:
        lines += _wrapped(out, note, "dim")
    return lines


def bars_of(shares: Iterable[float], room: int | None) -> list[str]:
    """Bars for percentages, the largest as long as there is room; none off a terminal or where room is scarce."""
    shares = list(shares)
    if room is None or room < _SHORTEST_BAR or not any(shares):
        return [""] * len(shares)
    return [bar(share / max(shares), min(room, _LONGEST_BAR)) for share in shares]


def as_markdown(table: Table) -> list[str]:
    """Lines of a Markdown table; its title and notes stand around it."""
    lines = [f"**{_cell(table.title)}**", ""] if table.title else []
    lines.append(_line(_titles(table)))
    lines.append("|" + "|".join("---:" if column.right else "---" for column in table.columns) + "|")
    lines += [_line(row) for row in table.rows]
    for note in table.notes:
        lines += ["", _cell(note)]
    return lines


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Rows for a sheet, with plain numbers; None is an empty cell."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(["" if cell is None else harmless(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def wrap(text: str, out: Output) -> list[str]:
    """A line, broken between words on a terminal that it is too long for."""
    import textwrap

    width = width_of(out)
    return [text] if width is None or len(text) <= width else textwrap.wrap(text, max(20, width))


def _wrapped(out: Output, text: str, mark: str) -> list[str]:
    return [out.style(line, mark) for line in wrap(harmless(text), out)]


def _titles(table: Table) -> tuple[str, ...]:
    return tuple(column.title for column in table.columns)


def _kept(table: Table, width: int | None) -> list[int]:
    """The columns for which there is room."""
    kept = list(range(len(table.columns)))
    sizes = [max(len(row[i]) for row in [_titles(table), *table.rows]) for i in kept]
    going = sorted((i for i in kept if table.columns[i].keep), key=lambda i: table.columns[i].keep)
    while width is not None and going and sum(sizes[i] + 2 for i in kept) - 2 > width:
        kept.remove(going.pop(0))
    return kept


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return harmless(text).replace("|", "\\|").replace("\n", " ")
