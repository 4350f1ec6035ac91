"""The tables of ``gptcli trace``: attention as a heat map, the logit lens, and the list of all stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptcli.cli.cells import cells, cut_token, pad, pad_left
from gptcli.cli.trace_sheet import Sheet, Span
from gptcli.cli.trace_view import sizes
from gptcli.cli.trace_words import percent, title, token, words

if TYPE_CHECKING:
    from gptcli.core.trace import Guess, Trace

_ROW_NAME = 14  # cells of a token at the left
_NAMED, _WIDEST = 6, 21  # cells of a column under a token's name
_BEFORE = 8  # cells of the column that sums up what is not shown
_LEAST_GUESS, _WIDEST_GUESS = 10, 22  # cells of the lens, the space after them counted in


def attention(
    sheet: Sheet, trace: Trace, weights: Sequence[Sequence[float]], layer: int | None, head: int | None
) -> None:
    """Where each token looked: a row for each token that asks, a column for each that answers.

    Of more tokens than the width has room for the last ones are shown, and what they gave to those before in one sum.
    """
    names = [token(trace, id_) for id_ in trace.ids]
    digits = len(str(len(names)))
    label = digits + 1 + min(max(map(cells, names)), _ROW_NAME)
    columns, first = _columns(names, None if sheet.width is None else sheet.width - label)
    sheet.card()
    sheet.say(
        f"{_whose(trace, layer, head)} A row for each token, a column for each token that it may look at: itself and "
        f"those before. {columns.unit} A row adds up to 100%.",
        "Attention",
    )
    if first:
        shown = len(names) - first
        sheet.say(f'The last {shown} of {len(names):,} tokens are shown; "before" sums up what goes to the others.')
    above = [Span(" " * label)] + ([sheet.dim(pad_left("before", _BEFORE))] if first else [])
    sheet.line(above + [sheet.dim(columns.name(place)) for place in range(first, len(names))], indent=0)
    for place in range(first, len(names)):
        row = weights[place]
        spans = [Span(pad(f"{place + 1:>{digits}} {cut_token(names[place], label - digits - 1)}", label))]
        if first:
            spans.append(sheet.dim(f"{_percent(sum(row[:first])):>{_BEFORE}}"))
        spans += [
            sheet.heat(pad_left(columns.show(weight), columns.width), weight) for weight in row[first : place + 1]
        ]
        sheet.line(spans, indent=0)
    last = weights[-1]
    best = max(range(len(last)), key=lambda place: last[place])
    itself = " (itself)" if best == len(last) - 1 else ""
    sheet.say(f"Of the last token, {names[-1]}, most goes to {names[best]}{itself}: {percent(last[best])}.")


@dataclass(frozen=True)
class _Columns:
    """How the columns of a heat map look."""

    width: int
    unit: str
    name: Callable[[int], str]
    show: Callable[[float], str]


def _columns(names: Sequence[str], room: int | None) -> tuple[_Columns, int]:
    """The most telling columns that fit: under names, under numbers, in tenths; and the first token that is shown."""
    count = len(names)
    wide = min(max(map(cells, names)) + 1, _WIDEST)
    if room is None or count * _NAMED <= room:
        width = wide if room is None else max(_NAMED, min(wide, room // count))
        named = _Columns(
            width, "In percent.", lambda place: pad_left(cut_token(names[place], width - 1), width), _percent
        )
        return named, 0
    numbered = _Columns(4, "In percent; the columns by number.", lambda place: f"{place + 1:>4}", _percent)
    if count * 4 <= room:
        return numbered, 0
    tenths = _Columns(
        2,
        "In tenths (2: from 20%; +: from 3%); each fifth column has its number.",
        lambda place: "",
        lambda weight: str(min(9, int(weight * 10 + 1e-9)) or ("+" if weight >= 0.03 else ".")),
    )
    first = 0 if count * 2 <= room else count - (room - _BEFORE) // 2
    fifths = replace(
        tenths, name=lambda place: f"{place + 1:>10}" if (place + 1) % 5 == 0 and place - first >= 4 else ""
    )
    return fifths, first


def _percent(weight: float) -> str:
    return str(round(100 * weight) or ".")


def _whose(trace: Trace, layer: int | None, head: int | None) -> str:
    config = trace.model.config
    if head is not None:
        return f"Head {head} of block {layer}: where each token looks."
    if layer is not None:
        return f"Block {layer}, the mean of its {config.heads} heads (--head H shows one): where each token looks."
    return (
        f"The mean of all {config.layers * config.heads} heads in {config.layers} blocks "
        "(--layer L shows one block, and --head H one of its heads): where each token looks."
    )


def lens(sheet: Sheet, trace: Trace) -> None:
    """What the model would predict at every place: a row for each place of the stream, a column for each token.

    Of more tokens than the width has room for the last ones are shown.
    """
    config = trace.model.config
    rows = ["embedding", *(f"block {layer}" for layer in range(config.layers))]
    label = max(map(cells, rows)) + 2
    names = [token(trace, id_) for id_ in trace.ids]
    least = _LEAST_GUESS if sheet.colored else _LEAST_GUESS + 3  # without colour the percentage has to be there
    first = 0 if sheet.width is None else max(0, len(names) - max(1, (sheet.width - label) // least))
    guesses = replace(trace, streams=[stream[first:] for stream in trace.streams]).lens()
    names = names[first:]
    needed = max(len(f"{token(trace, one.id)} 100%") for row in guesses for one in row)
    widest = min(max(needed, *map(cells, names)) + 1, _WIDEST_GUESS)
    width = widest if sheet.width is None else max(1, min(widest, (sheet.width - label) // len(names)))
    sheet.card()
    sheet.say(
        "What the model would say after each token if it ended after that block: each vector on its way is read as if "
        "it were the last. Watch a guess form from top to bottom"
        + ("; the stronger the colour, the surer it is." if sheet.colored else "."),
        "Logit lens",
    )
    if first:
        sheet.say(f"The last {len(names)} of {len(trace.ids):,} tokens are shown.")
    above = [sheet.bold(pad(cut_token(name, width - 1), width)) for name in names]
    sheet.line([sheet.dim(pad("after", label)), *above], indent=0)
    for name, row in zip(rows, guesses, strict=True):
        spans = [Span(pad(name, label))]
        for one in row:
            spans += [sheet.heat(pad(_guess(trace, one, width - 1, least), width - 1), one.probability), Span(" ")]
        sheet.line(spans, indent=0)
    final = guesses[-1][-1]
    at = "" if trace.next.temperature == 1 else " (at temperature 1)"
    sheet.say(
        f"The last row is the model's own prediction: after {names[-1]} it says {token(trace, final.id)}, "
        f"{percent(final.probability)}{at}."
    )


def _guess(trace: Trace, guess: Guess, room: int, least: int) -> str:
    share, name = percent(guess.probability), token(trace, guess.id)
    if cells(name) + 1 + len(share) <= room or least > _LEAST_GUESS or room >= _LEAST_GUESS + 3:
        return f"{cut_token(name, room - len(share) - 1)} {share}"
    return cut_token(name, room)


def stages(sheet: Sheet, trace: Trace) -> None:
    """Every stage: its name, sizes and type, and what it does."""
    rows = [
        (stage.name, sizes(stage), stage.dtype, f"{title(stage.kind)}: {words(stage, trace)}") for stage in trace.stages
    ]
    widths = [max(cells(row[column]) for row in rows) + 2 for column in range(3)]
    sheet.card()
    for row in rows:
        columns = [Span(pad(row[0], widths[0])), sheet.dim(pad(row[1], widths[1])), sheet.dim(pad(row[2], widths[2]))]
        if sheet.width is None:
            sheet.line([*columns, Span(row[3])], indent=0)
        else:
            sheet.line([sheet.bold(pad(row[0], widths[0])), *columns[1:]], indent=0)
            sheet.say(row[3], indent=2)
