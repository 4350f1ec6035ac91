"""Curves in text: braille dots, or plain characters, with axes, ticks and a legend; no colours."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gptcli.cli.cells import cells, cut

Point = tuple[float, "float | None"]
_Dots = list[tuple[int, float]]  # column of dots, value

_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille character: by column, then by row
_MARKS = "●◆■▲▼★"
_PLAIN = "*ox+#@%&"
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400)

# The start of a run falls from what nothing is learnt at: it would press the rest to the floor.
_START = 0.05


class Piece(NamedTuple):
    """Some characters of a line, and the number of the series that they show; None for axes and labels."""

    text: str
    series: int | None = None


def paint(
    series: Mapping[str, Sequence[Point]],
    width: int,
    height: int,
    *,
    marks: Collection[str] = (),
    unicode: bool = True,
    log_x: bool = False,
    seconds: bool = False,
    title: str = "",
    x_title: str = "",
) -> list[list[Piece]]:
    """``height`` lines of at most ``width`` cells: the title and the legend, the curves, the axis, its labels.

    A point whose value is None or not finite is left out, and so is one at x <= 0 where x is logarithmic. Points that
    share a column are averaged. The y range is that of the values behind the start (the first 5 % of x; all where x is
    logarithmic) and without rare spikes; what lies outside is cut off at the border. The series named in ``marks`` are
    single marks, the others lines; ``seconds`` labels x as times. Without ``unicode`` only ASCII is used.
    """
    lines = [_clean(points, log_x) for points in series.values()]
    symbols = _symbols(list(series), marks, unicode)
    more = "…" if unicode else "~"
    names = [cut(name, width - 4, end=more) for name in series]
    head = _head(cut(title, width, end=more), names, symbols, width, max(1, height // 4), more)
    rows = max(1, height - len(head) - 2)
    if not any(lines):
        text = "nothing to draw yet"[: max(0, width)]
        blank: list[list[Piece]] = [[] for _ in range(max(0, height - len(head)))]
        if blank:
            blank[len(blank) // 2] = [Piece(" " * ((width - len(text)) // 2) + text)]
        return (head + blank)[:height]
    span = _x_span([x for line in lines for x, _ in line], log_x)
    guess = max(1, width - 8)
    low, high = _y_span([_binned(line, span, guess) for line in lines], guess, whole=log_x)
    y_ticks = _ticks(low, high, max(2, rows // 2))
    y_labels = _labels(y_ticks)
    gutter = max(map(len, y_labels), default=0)
    columns = max(1, width - gutter - 2)
    canvas = _Canvas(columns, rows, unicode, (low, high))
    for number, (name, line) in enumerate(zip(series, lines, strict=True)):
        dots = _binned(line, span, columns if name in marks or not unicode else 2 * columns)
        if name in marks:
            canvas.mark(dots, number, symbols[number])
        else:
            canvas.line(dots, number, symbols[number])
    beside = {canvas.row_of(tick): label for tick, label in zip(y_ticks, y_labels, strict=True)}
    tick, wall = ("┤", "│") if unicode else ("+", "|")
    body = []
    for row in range(rows):
        edge = f"{beside[row]:>{gutter}} {tick}" if row in beside else f"{'':>{gutter}} {wall}"
        body.append(_trimmed([Piece(edge), *canvas.pieces(row)]))
    foot = _foot(span, gutter, columns, unicode=unicode, log_x=log_x, seconds=seconds, x_title=x_title)
    return (head + body + foot)[:height]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over ``window`` points around each (an even one counts as one less); points without a value go.

    Over fewer at the ends: at the start, where a run falls steeply, as many on either side; at the end, where a few
    would make it tremble, those that are there.
    """
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    if window < 3:
        return list(kept)
    sums = [0.0]
    for _, y in kept:
        sums.append(sums[-1] + y)
    result: list[Point] = []
    for place, (x, _) in enumerate(kept):
        reach = min((window - 1) // 2, place)
        first, last = place - reach, min(place + reach + 1, len(kept))
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result


def human(value: float) -> str:
    """A count in three digits: 950, 1.2k, 17.2M."""
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            number = value / size
            digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
            return (f"{number:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{number:.0f}") + unit
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}"


def sensible_range(series: Iterable[Sequence[Point]], *, log_x: bool = False) -> tuple[float, float] | None:
    """The y range by the rules of ``paint``, of the points one by one; None if there is nothing to draw."""
    lines = [_clean(points, log_x) for points in series]
    if not any(lines):
        return None
    span, columns = _x_span([x for line in lines for x, _ in line], log_x), 100_000
    return _y_span([_binned(line, span, columns) for line in lines], columns, whole=log_x)


# --- Ranges


def _clean(points: Sequence[Point], log_x: bool) -> list[tuple[float, float]]:
    """The points that can be drawn, from left to right; a logarithmic x is its logarithm from here on."""
    kept = [
        (math.log10(x) if log_x else float(x), float(y))
        for x, y in points
        if y is not None and math.isfinite(y) and math.isfinite(x) and (x > 0 or not log_x)
    ]
    return sorted(kept, key=lambda point: point[0])


def _x_span(xs: Sequence[float], log_x: bool) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    if low == high:
        pad = 0.5 if log_x else abs(low) / 2 or 1.0
        return low - pad, high + pad
    if not log_x and 0 < low <= 0.1 * high:
        low = 0.0
    return low, high


def _y_span(lines: Sequence[_Dots], columns: int, *, whole: bool) -> tuple[float, float]:
    values = [y for line in lines for x, y in line if whole or x >= _START * columns]
    if len(values) < 5:
        values = [y for line in lines for _, y in line]
    low, high = min(values), max(values)
    if len(values) >= 20:
        values.sort()
        bottom, top = values[len(values) // 10], values[-len(values) // 10]
        if reach := 3 * (top - bottom):
            low, high = max(low, bottom - reach), min(high, top + reach)
    last = [line[-1][1] for line in lines if line]  # where a run is now is always in sight
    low, high = min(low, *last), max(high, *last)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 1.0
        return low - pad, high + pad
    return low, high


def _binned(line: Sequence[tuple[float, float]], span: tuple[float, float], columns: int) -> _Dots:
    """One point a column: the mean of those that fall into it."""
    low, high = span
    sums: dict[int, tuple[float, int]] = {}
    for x, y in line:
        column = int((x - low) / (high - low) * (columns - 1) + 0.5)
        total, count = sums.get(column, (0.0, 0))
        sums[column] = (total + y, count + 1)
    return [(column, total / count) for column, (total, count) in sums.items()]


# --- Ticks


def _ticks(low: float, high: float, most: int, *, least: float = 0.0, seconds: bool = False) -> list[float]:
    """At most ``most`` round numbers from ``low`` to ``high``, ``least`` or more apart."""
    for step in _steps((high - low) / max(1, most), seconds):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if step >= least and last - first + 1 <= most:
            return [step * number for number in range(first, last + 1)]
    return []


def _steps(least: float, seconds: bool) -> Iterator[float]:
    if seconds:
        yield from (float(step) for step in _SECONDS if step >= least)
        yield from (86400.0 * step for step in _steps(max(1.0, least / 86400), False))
        return
    exponent = math.floor(math.log10(least)) if least > 0 else 0
    for power in range(exponent, exponent + 30):
        for digit in (1, 2, 5):
            yield digit * 10.0**power


def _labels(ticks: Sequence[float]) -> list[str]:
    """The ticks of one axis, in one unit and with as many digits as tell them apart."""
    if not ticks:
        return []
    big = max(map(abs, ticks))
    step = ticks[1] - ticks[0] if len(ticks) > 1 else big or 1.0
    if 0 < big < 0.01:
        return [_scientific(tick) for tick in ticks]
    size, unit = next(((size, unit) for size, unit in _UNITS if big >= size), (1.0, ""))
    digits = next((digits for digits in range(9) if _is_whole(step / size * 10**digits)), 9)
    return [f"{tick / size:.{digits}f}{unit}" if tick or not unit else "0" for tick in ticks]


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-6 * max(1.0, abs(value)) and round(value) != 0


def _scientific(value: float) -> str:
    if not value:
        return "0"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def _time_labels(ticks: Sequence[float]) -> list[str]:
    longest = max(ticks, default=0)
    size, unit = (1, "s") if longest < 180 else (60, "m") if longest < 3 * 3600 else (3600, "h")
    if longest >= 4 * 86400:
        size, unit = 86400, "d"
    return [f"{round(tick / size, 2):g}{unit}" if tick else "0" for tick in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and their double and half where there are few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if sum(low <= power <= high for power in powers) > 2 else (1, 2, 5)
    ticks = [power + math.log10(digit) for power in powers for digit in digits]
    return [tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


# --- Characters


class _Canvas:
    """Rows of characters; in braille each is two dots wide and four high."""

    def __init__(self, columns: int, rows: int, unicode: bool, span: tuple[float, float]) -> None:
        self.across, self.down = (2, 4) if unicode else (1, 1)
        self.low, self.high = span
        self.height = rows * self.down
        self.cells: list[list[tuple[str | int, int] | None]] = [[None] * columns for _ in range(rows)]

    def _y(self, value: float) -> int:
        """The row of dots of a value; beyond the canvas it is the one just outside."""
        place = (self.high - value) / (self.high - self.low) * (self.height - 1)
        return int(min(max(place, -1.0), float(self.height)) + 0.5) if place > -0.5 else -1

    def row_of(self, value: float) -> int:
        """The row of characters of a value within the range."""
        return self._y(value) // self.down

    def _dot(self, x: int, y: int, series: int, symbol: str) -> None:
        if not 0 <= y < self.height:
            return
        row, column = self.cells[y // self.down], x // self.across
        if self.across == 1:
            row[column] = (symbol, series)
            return
        old = row[column]
        bits = old[0] if old is not None and isinstance(old[0], int) else 0
        row[column] = (bits | _BITS[x % 2][y % 4], series)

    def line(self, dots: _Dots, series: int, symbol: str) -> None:
        """A line through the dots, unbroken also where it is steep."""
        before = None
        for x, value in dots:
            y = self._y(value)
            if before is None:
                self._dot(x, y, series, symbol)
            else:
                from_x, from_y = before
                last = from_y
                for between in range(from_x + 1, x + 1):
                    now = round(from_y + (y - from_y) * (between - from_x) / (x - from_x))
                    way = range(last, now) if now > last else range(last, now, -1)
                    for part in [*way[1:], now]:
                        self._dot(between, part, series, symbol)
                    last = now
            before = (x, y)

    def mark(self, dots: _Dots, series: int, symbol: str) -> None:
        """A mark at each of the dots, over whatever is there; x is in characters."""
        for column, value in dots:
            if 0 <= (y := self._y(value)) < self.height:
                self.cells[y // self.down][column] = (symbol, series)

    def pieces(self, row: int) -> Iterator[Piece]:
        """The characters of a row, those of one series together."""
        text, owner = "", None
        for cell in self.cells[row]:
            content, series = (" ", None) if cell is None else cell
            if text and series != owner:
                yield Piece(text, owner)
                text = ""
            owner = series
            text += chr(0x2800 + content) if isinstance(content, int) else content
        if text:
            yield Piece(text, owner)


def _symbols(names: Sequence[str], marks: Collection[str], unicode: bool) -> list[str]:
    if not unicode:
        return [_PLAIN[number % len(_PLAIN)] for number in range(len(names))]
    order = iter(range(len(names)))
    return [_MARKS[next(order) % len(_MARKS)] if name in marks else "━" for name in names]


def _head(
    title: str, names: Sequence[str], symbols: Sequence[str], width: int, most: int, more: str
) -> list[list[Piece]]:
    """The title with the legend at its right; where that is too narrow, the legend on lines of its own."""
    items = [(f"{symbol} {name}", number) for number, (symbol, name) in enumerate(zip(symbols, names, strict=True))]
    lengths = [cells(text) for text, _ in items]
    room = width - cells(title) - sum(lengths) - 2 * max(0, len(items) - 1)
    if items and room >= (3 if title else 0):
        line = [Piece(title + " " * room)]
        for text, number in items:
            line += [Piece(text, number), Piece("  ")]
        return [line[:-1]]
    lines: list[list[Piece]] = [[Piece(title)]] if title else []
    used = width
    for (text, number), length in zip(items, lengths, strict=True):
        if used + 2 + length > width:
            if len(lines) >= max(most, 1 + bool(title)):
                lines[-1].append(Piece(f" {more}" if used + 2 <= width else ""))
                break
            lines.append([Piece(text, number)])
            used = length
        else:
            lines[-1] += [Piece("  "), Piece(text, number)]
            used += 2 + length
    return lines


def _foot(
    span: tuple[float, float],
    gutter: int,
    columns: int,
    *,
    unicode: bool,
    log_x: bool,
    seconds: bool,
    x_title: str,
) -> list[list[Piece]]:
    """The axis with its ticks, and their labels below."""
    low, high = span
    if log_x:
        ticks = _log_ticks(low, high)
        labels = _time_labels([10**tick for tick in ticks]) if seconds else [human(10**tick) for tick in ticks]
    else:
        ticks = _ticks(low, high, min(12, max(2, columns // 9)), least=1.0, seconds=seconds)
        labels = _time_labels(ticks) if seconds else _labels(ticks)
    corner, rule, tick = ("└", "─", "┬") if unicode else ("+", "-", "+")
    axis, below = [rule] * columns, ""
    before = gutter + 2  # the cells left of the first column
    whole = before + columns
    shown_title = x_title if columns >= 30 and len(x_title) < columns // 3 else ""
    free = whole - (len(shown_title) + 2 if shown_title else 0)
    for place, label in zip(ticks, labels, strict=True):
        column = int((place - low) / (high - low) * (columns - 1) + 0.5)
        start = max(0, before + column - len(label) // 2)
        if start + len(label) <= free and (not below or start >= len(below) + 2):
            below = below.ljust(start) + label
            axis[column] = tick
    if shown_title:
        below = below.ljust(whole - len(shown_title)) + shown_title
    return [[Piece(" " * (gutter + 1) + corner + "".join(axis))], [Piece(below)]]


def _trimmed(line: list[Piece]) -> list[Piece]:
    while line and line[-1].series is None and not line[-1].text.strip():
        line.pop()
    return line
