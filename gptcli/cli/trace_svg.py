"""A prediction as one picture: tokens run through the blocks from left to right, to what may come next.

Between two blocks each token is a line, the residual stream. In a block, curves show where the tokens look by its
strongest head: the stronger, the more the values that came along them added to the last vector.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from gptcli.cli.out import harmless
from gptcli.cli.trace_window import Window, one_line, plain
from gptcli.cli.trace_words import degrees, number, percent, strongest

if TYPE_CHECKING:
    from gptcli.core.trace import Trace

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
_MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_PAPER, _INK, _MUTED, _LINE = "#fbfaf6", "#1d1d1b", "#63625b", "#d9d6cc"
_BLUE, _ORANGE, _GOLD = "#2f72c4", "#d9763f", "#f2c14e"
_HUES = ("#d5e6fb", "#d8efd6", "#fbe0cf", "#e6dcf7", "#f9efc4", "#cfeeed")
_MARGIN, _TOP, _CELL = 36, 178, 13
_LEAST_LAST, _LEAST_OTHER = 0.01, 0.05  # weights below are not drawn
_BARS, _BAR = 8, 24.0
_LOOKS, _STREAM = 84, 60  # of a block's width: the curves, and the lines behind them


class _Drawing:
    def __init__(self) -> None:
        self.made: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        said: str,
        size: float = 12,
        fill: str = _INK,
        anchor: str = "start",
        font: str = "",
        weight: int = 400,
    ) -> None:
        family = f' font-family="{font}"' if font else ""
        bold = f' font-weight="{weight}"' if weight != 400 else ""
        place = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.made.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{place}{family}{bold} '
            f'xml:space="preserve">{escape(said)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, radius: float = 3, more: str = ""
    ) -> None:
        self.made.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" rx="{radius:g}" '
            f'fill="{fill}"{more}/>'
        )

    def path(self, drawn: str, stroke: str, width: float, opacity: float = 1) -> None:
        seen = f' stroke-opacity="{opacity:.2f}"' if opacity < 1 else ""
        self.made.append(f'<path d="{drawn}" fill="none" stroke="{stroke}" stroke-width="{width:.2f}"{seen}/>')


def picture(window: Window, later: Sequence[Trace], prompt: str) -> str:
    """The picture as SVG: no script, no fonts of its own, nothing that is loaded."""
    draw = _Drawing()
    count = len(window.tokens)
    pitch = 32 if count <= 12 else 24 if count <= 28 else 17
    size = 13 if pitch > 20 else 11
    rows = [_TOP + pitch * (index + 0.5) for index in range(count)]
    bottom = max(rows[-1] + 60, _TOP + _BAR * (_BARS + 1) + 12)
    x = _tokens(draw, window, rows, pitch, size)
    x = _embedding(draw, window, rows, x)
    for layer in range(window.config.layers):
        x = _block(draw, window, layer, rows, x)
    right = _softmax(draw, window, rows[-1], x) + _MARGIN
    height = _below(draw, window, later, bottom, right)
    _title(draw, window, prompt)
    name = plain(harmless(window.trace.model.name))
    model = f"{name}: {one_line(prompt, 80)} → {window.text(window.trace.drawn.id)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {height:.0f}" width="{right:.0f}" '
        f'height="{height:.0f}" role="img" aria-label={quoteattr(model)} font-family="{_SANS}">\n'
        f"<title>{escape(model)}</title>\n"
        f'<rect x="0.5" y="0.5" width="{right - 1:.0f}" height="{height - 1:.0f}" rx="14" fill="{_PAPER}" '
        f'stroke="{_LINE}"/>\n' + "\n".join(draw.made) + "\n</svg>\n"
    )


def _title(draw: _Drawing, window: Window, prompt: str) -> None:
    trace = window.trace
    shown = one_line(prompt, 60)
    draw.text(_MARGIN, 48, f"What comes after “{shown}”?" if shown else "What comes first?", 24, weight=600)
    config = window.config
    size = f"vectors of {config.width:,} numbers, {config.vocab_size:,} tokens"
    told = plain(harmless(f"{trace.model.name}: {config.layers} blocks of {config.heads} heads, {size}"))
    draw.text(_MARGIN, 72, told, 13, _MUTED)
    place = float(_MARGIN)
    for color, what in (
        (_BLUE, "where the last token looks, by the strongest head of each block"),
        ("#b9b7ae", "where the others look, 5% or more"),
        (_ORANGE, "MLP: how far it turns the last vector, and how many of its neurons are active"),
    ):
        draw.box(place, 88, 12, 12, color)
        draw.text(place + 18, 98.5, what, 12, _MUTED)
        place += 18 + len(what) * 5.6 + 24


def _heading(draw: _Drawing, x: float, said: str, below: str, top: float = _TOP) -> None:
    draw.text(x, top - 32, said, 13, weight=600)
    draw.text(x, top - 16, below, 11, _MUTED)


def _tokens(draw: _Drawing, window: Window, rows: Sequence[float], pitch: float, size: float) -> float:
    shown = [_open_spaces(token.text) for token in window.tokens]
    wide = max(60.0, max(map(_columns, shown)) * size * 0.61 + 14)
    numbers = max(len(str(token.id)) for token in window.tokens) * 6.6 + 8
    few = f"the last {len(rows)} of {len(window.trace.ids):,}" if window.first else "and their ids"
    _heading(draw, _MARGIN, "Tokens", few)
    for index, (token, text, y) in enumerate(zip(window.tokens, shown, rows, strict=True)):
        height = min(24, pitch - 4)
        draw.box(_MARGIN, y - height / 2, _columns(text) * size * 0.61 + 14, height, _HUES[index % len(_HUES)], 5)
        draw.text(_MARGIN + 7, y + size * 0.35, text, size, font=_MONO)
        draw.text(_MARGIN + wide + numbers, y + 4, str(token.id), 10.5, _MUTED, "end", _MONO)
    return _MARGIN + wide + numbers + 16


def _embedding(draw: _Drawing, window: Window, rows: Sequence[float], x: float) -> float:
    columns = window.columns()
    most = max(abs(each) for column in columns for each in column) or 1.0
    wide = _CELL * len(columns[0])
    with_place = "positions" in window.stages
    name = "Embedding + position" if with_place else "Embedding"
    _heading(draw, x, name, f"first {len(columns[0])} of {window.config.width:,} numbers")
    for column, y in zip(columns, rows, strict=True):
        draw.box(x, y - 5.5, wide, 11, "#ffffff", 2)
        for index, value in enumerate(column):
            seen = f' fill-opacity="{math.sqrt(abs(value) / most):.2f}"'
            # The sign is in the place too: above the middle or below it.
            top = y - 5.5 if value >= 0 else y
            draw.box(x + index * _CELL + 1, top, _CELL - 2, 5.5, _BLUE if value >= 0 else _ORANGE, 1, seen)
        draw.text(x + wide + 3, y + 4, "…", 11, _MUTED)
    return x + max(wide + 20, 172)


def _block(draw: _Drawing, window: Window, layer: int, rows: Sequence[float], x: float) -> float:
    """The curves of the strongest head, from what is looked at (left) to who looks (right), and the stream behind."""
    head = strongest(window.block(layer, "pattern"))[0]["head"]
    end = x + _LOOKS
    whole = end + _STREAM
    draw.box(x - 3, _TOP - 6, _LOOKS + 6, rows[-1] - _TOP + 22, "#ffffff", 6, f' stroke="{_LINE}" stroke-width="0.8"')
    _heading(draw, x, f"Block {layer}", f"head {head} looks")
    last = len(rows) - 1
    for index, y in enumerate(rows):
        mark = index == last
        draw.path(f"M{x:.0f} {y:.1f}H{whole:.0f}", _INK if mark else _LINE, 1.6 if mark else 1)
    if layer in window.patterns():
        triangle = window.patterns()[layer][head]
        early = int(window.first > 0)
        middle = (x + end) / 2
        for to, row in enumerate(triangle):
            for at, weight in enumerate(row[early:]):
                share = weight / 1000
                mark = to == last
                if share < (_LEAST_LAST if mark else _LEAST_OTHER) or at == to:
                    continue
                begin, target = rows[at], rows[to]
                draw.path(
                    f"M{x:.0f} {begin:.1f}C{middle:.0f} {begin:.1f} {middle:.0f} {target:.1f} {end:.0f} {target:.1f}",
                    _BLUE if mark else _MUTED,
                    0.6 + (4.2 if mark else 1.8) * share,
                    min(1.0, (0.3 if mark else 0.1) + (0.7 if mark else 0.4) * share),
                )
    hidden, after = window.block(layer, "hidden"), window.block(layer)
    center = end + _STREAM / 2 + 2
    for index, y in enumerate(rows):
        mark = index == last
        draw.made.append(
            f'<circle cx="{center:.1f}" cy="{y:.1f}" r="{7 if mark else 3}" fill="{_ORANGE if mark else _PAPER}" '
            f'stroke="{_ORANGE}" stroke-width="{1 if mark else 0.8}"/>'
        )
    turned = [window.block(layer, kind).summary["turned_degrees"][-1] for kind in ("attention", "mlp")]
    middle = (x + end) / 2
    y = rows[-1] + 34
    draw.text(middle, y, f"attention {degrees(turned[0])}", 11, _BLUE, "middle")
    draw.text(center, y + 15, f"{percent(hidden.summary['active'])} active", 9.5, "#a9531f", "middle")
    draw.text(center, y, f"MLP {degrees(turned[1])}", 11, "#a9531f", "middle")
    draw.text(middle, y + 15, f"length {number(after.summary['norms'][-1])}", 9.5, _MUTED, "middle")
    return whole


def _softmax(draw: _Drawing, window: Window, y: float, x: float) -> float:
    """The last vector's line into the bars of what may come next."""
    trace = window.trace
    told, drawn = trace.next, trace.drawn
    shown = [(one.id, one.probability) for one in told.top[:_BARS]]
    if drawn.id not in {id_ for id_, _ in shown}:
        shown = [*shown[: _BARS - 1], (drawn.id, drawn.probability)]
    left = max(0.0, 1 - sum(chance for _, chance in shown))
    labels = [_open_spaces(window.text(id_)) for id_, _ in shown]
    start = x + 44
    wide = max(90.0, max(map(_columns, labels)) * 8 + 8)
    top = max(_TOP, y - _BAR * (len(shown) + 0.5))  # beside the last token, where it is far below
    _heading(draw, start, "Softmax", f"temperature {told.temperature:g}, {told.entropy_bits:.2f} bits of entropy", top)
    most = max(chance for _, chance in shown)
    for index, ((id_, chance), label) in enumerate(zip(shown, labels, strict=True)):
        line = top + _BAR * (index + 0.5)
        is_drawn = id_ == drawn.id
        draw.path(
            f"M{x:.0f} {y:.1f}C{x + 24:.0f} {y:.1f} {start - 26:.0f} {line:.1f} {start - 6:.0f} {line:.1f}", _LINE, 1
        )
        if is_drawn:
            draw.box(start - 4, line - 11, wide + 2, 22, _GOLD, 5)
        draw.text(start + 3, line + 4.5, label, 13, font=_MONO, weight=600 if is_drawn else 400)
        draw.box(start + wide + 6, line - 6, 130 * chance / (most or 1), 12, _GOLD if is_drawn else _BLUE, 2)
        end = start + wide + 12 + 130 * chance / (most or 1)
        place = f", rank {drawn.rank + 1:,}" if drawn.rank >= _BARS else ""
        draw.text(end, line + 4, percent(chance), 12)
        if is_drawn:
            draw.text(end + len(percent(chance)) * 7 + 8, line + 4, f"drawn{place}", 12, weight=600)
    line = top + _BAR * (len(shown) + 0.5)
    others = window.config.vocab_size - len(shown)
    if others > 0:
        draw.text(start + 3, line + 4, f"{others:,} others", 12, _MUTED)
        draw.text(start + wide + 6, line + 4, percent(left), 12, _MUTED)
    return start + wide + 130 + 150


def _below(draw: _Drawing, window: Window, later: Sequence[Trace], bottom: float, right: float) -> float:
    """The text with what was drawn; the predictions after the first each add a token."""
    trace = window.trace
    y = bottom + 58
    x = float(_MARGIN)
    draw.path(f"M{_MARGIN} {y - 38:.0f}H{right - _MARGIN:.0f}", _LINE, 1)
    drawn = [one.drawn.id for one in (trace, *later)]
    said = "Appended, and once more: " if later else "Appended: "
    draw.text(x, y, said, 13, weight=600)
    x += len(said) * 7.2 + 6
    room = right - _MARGIN
    grown = [_open_spaces(window.text(id_)) for id_ in drawn]
    need = sum(_columns(text) * 8 + 16 for text in grown)
    begun: list[str] = []
    for token in reversed(window.tokens):
        text = _open_spaces(token.text)
        if need + x + _columns(text) * 8 + 40 > room:
            begun.insert(0, "…")
            break
        need += _columns(text) * 8 + 2
        begun.insert(0, text)
    for text in begun:
        draw.text(x, y, text, 13, _MUTED if text == "…" else _INK, font=_MONO)
        x += _columns(text) * 8 + 2
    for text in grown:
        if x + _columns(text) * 8 + 16 > room:
            x, y = float(_MARGIN), y + 30
        draw.box(x + 3, y - 16, _columns(text) * 8 + 8, 23, _GOLD, 5)
        draw.text(x + 7, y, text, 13, font=_MONO, weight=600)
        x += _columns(text) * 8 + 14
    return y + 34


def _open_spaces(text: str) -> str:
    return text.replace(" ", "␣")


def _columns(text: str) -> int:
    """How wide a text stands in a font of fixed width."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
