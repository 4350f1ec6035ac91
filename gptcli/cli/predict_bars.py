"""Bars for ``gptcli predict``: probabilities as a person reads them, within the width of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptcli.cli.cells import bar, cut
from gptcli.cli.cells import cells as width_of
from gptcli.cli.out import harmless
from gptcli.cli.tokens import visible

if TYPE_CHECKING:
    from gptcli.core.distribution import Distribution

Style = Callable[[str, str], str]  # text, and "bold" or "dim"

_NUMBER = 10  # cells of "100.0000 %"
_GAP = 2
_LEAST_BAR, _WIDEST_BAR = 5, 80


def percent(probability: float) -> str:
    """A probability in percent, with four decimals, or where these would all be zeros, as a power of ten."""
    value = 100 * probability
    return f"{value:.4f} %" if value >= 1e-4 or value == 0 else f"{value:.1e} %"


def title(model: str, prompt: str, width: int) -> tuple[str, str]:
    """The model, and the end of the prompt as far as the line has room: what the tokens below would follow."""
    before = f"{harmless(model)} after "
    shown = visible(prompt.encode("utf-8", errors="replace"))
    room = max(8, width - width_of(before) - 2)
    if width_of(shown) <= room:
        return before, f'"{shown}"'
    shown = shown[-room:]
    while width_of(shown) > room - 1:
        shown = shown[1:]
    return before, f'…{shown}"'


def distributions(found: Sequence[Distribution], tokens: Sequence[str], rest: int, width: int, style: Style) -> str:
    """The same tokens at one or several temperatures: side by side where the width allows, else in turn.

    All bars have one scale, so that they can be compared: the longest is the likeliest token, where it is likeliest.

    Args:
        found: one for each temperature.
        tokens: how the top tokens are shown.
        rest: how many tokens there are besides.
        width: cells of the terminal.
        style: marks a text.
    """
    names = [*tokens, *([f"{rest:,} other{'s' * (rest > 1)}"] if rest else []), "entropy"]
    label = min(max(map(width_of, names)), max(12, width // 3))
    cell = (width - label) // len(found) - _GAP
    most = max(each.top[0].probability for each in found)
    if len(found) > 1 and cell < _NUMBER + 1 + _LEAST_BAR:
        cell = width - label - _GAP
        return "\n\n".join(_table([each], names, label, cell, most, style) for each in found)
    return _table(found, names, label, cell, most, style)


def _table(
    found: Sequence[Distribution], names: Sequence[str], label: int, cell: int, most: float, style: Style
) -> str:
    room = max(1, min(cell - _NUMBER - 1, _WIDEST_BAR))
    cell = min(cell, _NUMBER + 1 + _WIDEST_BAR)
    rows = [_row("", [f"{f'T = {each.temperature:g}':>{_NUMBER}}" for each in found], label, cell)]
    rows[0] = style(rows[0], "bold")
    for place in range(len(found[0].top)):
        chances = [each.top[place].probability for each in found]
        cells = [f"{percent(chance):>{_NUMBER}} {bar(chance / most, room)}" for chance in chances]
        rows.append(_row(names[place], cells, label, cell))
    if len(names) > len(found[0].top) + 1:
        rows.append(
            style(_row(names[-2], [f"{percent(each.others):>{_NUMBER}}" for each in found], label, cell), "dim")
        )
    # Its decimals stand below those of the probabilities.
    bits = [f"{each.entropy_bits:>{_NUMBER - 2}.4f} bits" for each in found]
    rows.append(style(_row("entropy", bits, label, cell), "dim"))
    return "\n".join(rows)


def choices(
    names: Sequence[str],
    chances: Sequence[float],
    logprobs: Sequence[float],
    counts: Sequence[int],
    width: int,
    style: Style,
) -> str:
    """Continuations in their order, with probability, log-probability and number of tokens; the likeliest in bold.

    Where the terminal is narrow, the last two are left out.
    """
    label = min(max(map(width_of, names)), max(12, width // 3))
    nats = max(len(f"{logprob:.4f}") for logprob in logprobs)
    digits = len(str(max(counts)))
    facts = [
        f"{logprob:>{nats}.4f} nats, {count:>{digits}} token{'s' * (count > 1)}"
        for logprob, count in zip(logprobs, counts, strict=True)
    ]
    if width - label - _NUMBER - max(map(len, facts)) - 3 * _GAP < _LEAST_BAR:
        facts = [""] * len(names)  # no room: the bars say more
    widest = max(map(len, facts))
    room = max(1, min(width - label - _NUMBER - widest - 3 * _GAP, _WIDEST_BAR))
    most, best = max(chances), max(range(len(chances)), key=lambda place: chances[place])
    rows = []
    for place, (name, chance, fact) in enumerate(zip(names, chances, facts, strict=True)):
        numbers = f"{percent(chance):>{_NUMBER}}{'':{_GAP}}{fact:<{widest}}"
        row = _row(name, [numbers + " " * _GAP + bar(chance / most, room)], label, width)
        rows.append(style(row, "bold") if place == best else row)
    return "\n".join(rows)


def _row(name: str, cells: Sequence[str], label: int, cell: int) -> str:
    fitted = cut(name, label)
    padded = [" " * _GAP + text + " " * (cell - width_of(text)) for text in cells]
    return (fitted + " " * (label - width_of(fitted)) + "".join(padded)).rstrip()
