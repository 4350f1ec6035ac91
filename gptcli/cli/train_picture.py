"""What a person sees of a training run: the state that its events make, and a picture of it in any size."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gptcli.cli.curve import Point, human, paint, smoothed
from gptcli.cli.metrics import Event, settled
from gptcli.cli.out import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

TRAINING, EVALUATION = "training", "evaluation"
_COLORS = {TRAINING: "cyan", EVALUATION: "magenta"}
_MOST_POINTS = 1024
_GAP = 3  # between cells that stand side by side
_CELL = 20
_LEAST_CURVE = 6
_STILL = 0.9  # how much of the old value stays in a number that is shown smoothed


class Trace:
    """A curve that takes any number of points and keeps about a thousand: means of 1, 2, 4, ... neighbours."""

    def __init__(self) -> None:
        self._points: list[tuple[int, float, float]] = []  # last step, mean x, mean y
        self._open: list[tuple[int, float, float]] = []
        self._every = 1

    def add(self, step: int, x: float, y: float) -> None:
        """One more point, at a later step than those before."""
        self._open.append((step, x, y))
        if len(self._open) >= self._every:
            self._points.append(_mean(self._open))
            self._open = []
        if len(self._points) >= _MOST_POINTS:
            pairs = range(0, len(self._points) - 1, 2)
            self._points = [_mean(self._points[first : first + 2]) for first in pairs]
            self._every *= 2

    def back_to(self, step: int) -> None:
        """Forget what came after a step."""
        self._points = [point for point in self._points if point[0] <= step]
        self._open = [point for point in self._open if point[0] <= step]

    def points(self) -> list[Point]:
        """The curve, smoothed a little."""
        kept = [(x, y) for _, x, y in self._points]
        if self._open:
            kept.append(_mean(self._open)[1:])
        return smoothed(kept, 2 * (len(kept) // 80) + 1)


def _mean(points: Sequence[tuple[int, float, float]]) -> tuple[int, float, float]:
    count = len(points)
    return points[-1][0], sum(x for _, x, _ in points) / count, sum(y for _, _, y in points) / count


class TrainPicture:
    """The state of a run; a renderable of rich that fits the terminal. ``show`` may be called beside the drawing."""

    def __init__(self, name: str, *, unicode: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.unicode, self._clock = name, unicode, clock
        self.ended: str | None = None  # how the run ended; then the picture is a summary
        self.start: Event | None = None
        self.step: Event | None = None
        self.saved: int | None = None
        self.skipped = 0
        self._lock = threading.RLock()
        self._trace = Trace()
        self._evals: list[Event] = []
        self._sample: Event | None = None
        self._still: dict[str, float] = {}
        self._heard = 0.0
        self._began: tuple[float, float] | None = None  # seconds and progress at the first step of this process
        self._painted: tuple[Any, list[Text]] | None = None

    def recall(self, history: Iterable[Event]) -> None:
        """Take in what was told before this process began."""
        for event in settled(history):
            self.show(event)
        with self._lock:
            self._began = None

    def show(self, event: Event) -> None:
        """Take in an event; it is drawn when the terminal's turn comes."""
        with self._lock:
            kind = event["event"]
            if kind == "start":
                self.start = event
                self._back_to(event.get("step") or 0)
                self._began = None
            elif kind == "step":
                self._take_step(event)
            elif kind == "eval":
                tokens = self.step["tokens"] if self.step else 0  # at first, evaluations did not tell it
                self._evals.append({"tokens": tokens, **event})
            elif kind == "sample":
                self._sample = event
            elif kind == "save":
                self.saved = event["step"]
            elif kind == "rollback":
                self._back_to(event["to_step"])

    def _take_step(self, event: Event) -> None:
        self.step = event
        self._heard = self._clock()
        self.skipped += bool(event.get("skipped"))
        if self._began is None:
            self._began = (event["seconds"], event["progress"])
        if event["loss"] is not None:
            self._trace.add(event["step"], event["tokens"], event["loss"])
        for name in ("loss", "tokens_per_second", "utilization"):
            if (value := event.get(name)) is not None:
                self._still[name] = value + _STILL * (self._still.get(name, value) - value)

    def _back_to(self, step: int) -> None:
        self._trace.back_to(step)
        self._evals = [event for event in self._evals if event["step"] <= step]
        self._still.clear()

    # --- Numbers

    @property
    def seconds(self) -> float:
        """How long the run takes so far; it goes on between two events."""
        if self.step is None:
            return 0.0
        passed: float = self.step["seconds"]
        return passed if self.ended else passed + self._clock() - self._heard

    @property
    def seconds_left(self) -> float | None:
        """By the pace since this process began."""
        if self.step is None or self._began is None:
            return None
        seconds, progress = self._began
        done = self.step["progress"] - progress
        if done <= 0:
            return None
        left = (self.step["seconds"] - seconds) / done * (1 - self.step["progress"])
        return max(0.0, left - (self._clock() - self._heard))

    @property
    def steps(self) -> str:
        """``1,240/20,000``."""
        whole = (self.start or {}).get("steps")
        done = self.step["step"] if self.step else 0
        return f"{done:,}/{whole:,}" if whole else f"{done:,}"

    def bests(self) -> list[tuple[str, float, float]]:
        """Bits per byte now and at best, of all texts together where there are several, then of each."""
        if not self._evals:
            return []
        last = self._evals[-1]
        names = list(last["valid"])
        rows = []
        if len(names) > 1:
            every = [_or_inf(event["bits_per_byte"]) for event in self._evals]
            rows.append(("together", every[-1], min(every)))
        for name in names:
            every = [_or_inf(event["valid"].get(name)) for event in self._evals]
            rows.append((name, every[-1], min(every)))
        return rows

    def best_step(self) -> int | None:
        """The step of the best evaluation."""
        best: Event | None = min(self._evals, key=lambda event: _or_inf(event["bits_per_byte"]), default=None)
        return best["step"] if best else None

    # --- The picture

    def __rich_console__(self, console: Console, options: Any) -> Any:
        try:
            yield from self.frame(console, options.max_width, options.size.height)
        except Exception as error:  # a fault of the picture must not end the hours of work that it shows
            yield _text(f"the picture can't be drawn: {type(error).__name__}: {error}"[: options.max_width])

    def frame(self, console: Console, width: int, height: int) -> list[Text]:
        """At most ``height - 1`` lines of at most ``width`` cells: the terminal keeps one for what is typed."""
        with self._lock:
            return self._frame(console, width, height - 1) if self.start is not None else []

    def _frame(self, console: Console, width: int, height: int) -> list[Text]:
        inner = width - 2  # a column free at either side
        roomy = height >= 23
        head = self._head(inner)[: 2 if height >= 17 else 1]
        numbers = self._numbers(inner, most=max(4, min(12, height // 4)))
        last = [self._last_line(inner - 2)]  # behind it the terminal writes ^C, and must not begin another line
        gap = 1 if roomy else 0
        rest = height - len(head) - len(numbers) - len(last) - gap
        sample: list[Text] = []
        if self._sample is not None and not self.ended:
            sample = self._sample_lines(console, inner, min(10, max(3, height // 6)))
            if rest - len(sample) - 2 * gap < _LEAST_CURVE + 2:
                sample = []
        if sample:
            rest -= len(sample) + gap
        curve = self._curve(inner, min(rest - gap, 12 if self.ended else 22)) if rest - gap >= _LEAST_CURVE else []
        parts = [part for part in (head, curve, numbers, sample, last) if part]
        lines: list[Text] = []
        for part in parts:
            if lines and gap and len(lines) + 1 < height:
                lines.append(_text(""))
            lines += part
        for line in lines:
            line.pad_left(1)
            line.truncate(width - 1, overflow="ellipsis")
            line.no_wrap = True
        return lines[max(0, len(lines) - height) :]

    def _head(self, width: int) -> list[Text]:
        assert self.start is not None
        start, config = self.start, self.start.get("config") or {}
        first = [f"{human(start['parameters'])} parameters"]
        if "layers" in config:
            first.append(f"{config['layers']} layers of {config['width']}")
        if "context" in config:
            first.append(f"context {config['context']:,}")
        if "vocab_size" in config:
            first.append(f"vocabulary {config['vocab_size']:,}")
        place = [start["device"], start["dtype"]]
        if start.get("compile"):
            place.append("compiled")
        second = [", ".join(place)]
        if (start.get("ranks") or 1) > 1:
            second.append(f"{start['ranks']} ranks, {start.get('parallel')}")
        if start.get("optimizer"):
            second.append(start["optimizer"])
        batch = f"{start['batch_tokens']:,} tokens a step"
        if start.get("micro_batch"):
            batch += f", {start.get('accumulate') or 1} x {start['micro_batch']} rows"
        second.append(batch)
        if start.get("train_tokens"):
            second.append(f"{human(start['train_tokens'])} in the data")
        title = _text(harmless(self.name).replace("\n", " "), "bold")
        title.truncate(max(10, width // 2), overflow="ellipsis")
        return [
            _fitting([title, *(_text(part) for part in first)], width),
            _fitting([_text(part, "dim") for part in second], width),
        ]

    def _numbers(self, width: int, most: int) -> list[Text]:
        """The numbers in a grid, with the evaluations beside it where the terminal is wide."""
        step = self.step or {}
        loss = "-" if "loss" not in self._still else f"{self._still['loss']:.3f}"
        if step and step["loss"] is None:
            loss = "not finite"
        used, rate = self._still.get("utilization"), self._still.get("tokens_per_second")
        norm = step.get("grad_norm")
        best = self.best_step()
        cells = [
            ("step", self.steps, ""),
            ("tokens", human(step["tokens"]) if step else "-", ""),
            ("loss", loss, "bold" if loss != "not finite" else "bold red"),
            ("tokens/s", "-" if rate is None else f"{rate:,.0f}", ""),
            ("lr", f"{step['lr']:.2e}" if step else "-", ""),
            ("utilized", "-" if used is None else f"{100 * used:.0f} %", ""),
            ("grad norm", "-" if norm is None else f"{norm:.2f}", ""),
            ("skipped", f"{self.skipped:,}", "bold yellow" if self.skipped else ""),
            ("saved at", "-" if self.saved is None else f"{self.saved:,}", ""),
            ("best at", "-" if best is None else f"{best:,}", ""),
        ]
        if width >= 2 * _CELL + 2 * _GAP + 32:
            left = _grid(cells, 2, _CELL)
            room = min(48, width - 2 * _CELL - 2 * _GAP)
            right = self._evaluations(room, max(most, len(left)))
            lines = []
            for row in range(max(len(left), len(right))):
                line = left[row].copy() if row < len(left) else _text("")
                if row < len(right):
                    line.pad_right(2 * _CELL + 2 * _GAP - line.cell_len)
                    line.append_text(right[row])
                lines.append(line)
            return lines
        # Evaluations below; where it is low, without the numbers that can wait.
        short = most <= 4
        columns = 3 if width >= 3 * 18 + 2 * _GAP else 2
        cell = (width - (columns - 1) * _GAP) // columns
        grid = _grid(cells[: 9 if columns == 3 else 8 if short else 10], columns, cell)
        return grid + self._evaluations(width, 2 if short else most)

    def _evaluations(self, width: int, most: int) -> list[Text]:
        """A table of bits per byte, with its titles if there is more than one line for it."""
        rows = self.bests()
        if not rows:
            return []
        name_width = min(max(13, *(len(harmless(name)) for name, _, _ in rows)), width - 18)
        lines = [_table_line("bits per byte", "now", "best", name_width, "dim", "dim")]
        for number, (name, now, best) in enumerate(rows[: most - 1]):
            style = "bold" if number == 0 else ""
            lines.append(_table_line(name, shown(now), shown(best), name_width, "", style))
        if len(rows) > most - 1:
            lines[-1].append(f"  +{len(rows) - most + 1}", "dim")
        return lines

    def _curve(self, width: int, height: int) -> list[Text]:
        points = self._trace.points()
        evals = [(event["tokens"], event["loss"]) for event in self._evals]
        key = (width, height, len(points), points[-1:], len(evals))
        if self._painted is None or self._painted[0] != key:
            series = {TRAINING: points, **({EVALUATION: evals} if evals else {})}
            options = {"marks": [EVALUATION], "unicode": self.unicode}
            titles = {"title": "loss, nats a token", "x_title": "tokens"}
            lines = []
            for pieces in paint(series, width, height, **options, **titles):  # type: ignore[arg-type]
                line = _text("")
                for text, number in pieces:
                    line.append(text, "dim" if number is None else _COLORS[list(series)[number]])
                lines.append(line)
            self._painted = (key, lines)
        return [line.copy() for line in self._painted[1]]

    def _sample_lines(self, console: Console, width: int, most: int) -> list[Text]:
        assert self._sample is not None
        sample = self._sample
        text = _text(_compact(sample["prompt"]), "bold").append(_compact(sample["text"]))
        text.no_wrap = False
        across = min(width - 2, 100)
        wrapped = list(text.wrap(console, across, tab_size=4))
        kept = [line for line in wrapped if line.plain.strip()][: most - 1]
        if len(wrapped) > len(kept) and kept:
            kept[-1].rstrip()
            kept[-1].truncate(across - 2)
            kept[-1].append(" …", "dim")
        for line in kept:
            line.rstrip()
            line.pad_left(2)
        return [_text(f"sample at step {sample['step']:,}", "dim"), *kept]

    def _last_line(self, width: int) -> Text:
        """How far the run is; of a run that ended, how it went."""
        if self.ended:
            tokens = self.step["tokens"] if self.step else 0
            pace = f", {tokens / self.seconds:,.0f} tokens/s" if self.seconds else ""
            return _text(f"{self.ended}: {tokens:,} tokens in {clock(self.seconds)}{pace}", "bold")
        progress = self.step["progress"] if self.step else 0.0
        left = self.seconds_left
        told = f"{100 * progress:3.0f} %   {clock(self.seconds)} passed   {'-' if left is None else clock(left)} left"
        length = width - len(told) - _GAP
        filled = round(length * progress)
        full, empty = ("━", "─") if self.unicode else ("=", "-")
        bar = _text(full * filled, _COLORS[TRAINING]).append(empty * (length - filled), "dim")
        return bar.append(" " * _GAP).append(told)


def clock(seconds: float) -> str:
    """A duration: 0:42, 1:02:10, 3 days 4:05:06."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    text = f"{hours}:{minutes:02}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"
    return f"{days} day{'s' if days > 1 else ''} {text}" if days else text


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text

    made = Text(no_wrap=True, end="\n")
    return made.append(text, style or None)


def _compact(text: str) -> str:
    return "\n".join(line.rstrip() for line in harmless(text).split("\n") if line.strip() or "\n" not in text)


def _fitting(parts: Sequence[Text], width: int) -> Text:
    """Parts with dots between; as many as fit."""
    line = _text("")
    for number, part in enumerate(parts):
        if number and line.cell_len + 3 + part.cell_len > width:
            break
        if number:
            line.append(" · ", "dim")
        line.append_text(part)
    return line


def _grid(cells: Sequence[tuple[str, str, str]], columns: int, cell: int) -> list[Text]:
    lines = []
    for first in range(0, len(cells), columns):
        line = _text("")
        for number, (label, value, style) in enumerate(cells[first : first + columns]):
            line.append(" " * (_GAP if number else 0)).append(label, "dim")
            line.append(f"{value:>{max(1, cell - len(label))}}", style or None)
        lines.append(line)
    return lines


def shown(bits: float | None) -> str:
    """Bits per byte as text; an evaluation may not have been a number."""
    return "-" if bits is None or math.isinf(bits) else f"{bits:.4f}"


def _or_inf(bits: float | None) -> float:
    return math.inf if bits is None else bits


def _table_line(name: str, now: str, best: str, width: int, label: str, style: str) -> Text:
    title = _text(harmless(name).replace("\n", " "), label)
    title.truncate(width, overflow="ellipsis", pad=True)
    return title.append(f"{now:>9}", style or None).append(f"{best:>9}", label or None)
