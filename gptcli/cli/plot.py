"""``gptcli plot``: the curves of training runs, in the terminal, in a file, or as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.curve import Point, human, paint, sensible_range, smoothed
from gptcli.cli.metrics import Event, read_events
from gptcli.cli.out import Output, harmless
from gptcli.errors import NotFoundError, UsageError

X_AXES = {"tokens": "tokens", "steps": "steps", "seconds": "time"}
Y_AXES = {
    "loss": ("loss", "loss, nats a token"),
    "bits-per-byte": ("bits_per_byte", "bits per byte"),
    "lr": ("lr", "learning rate"),
    "grad-norm": ("grad_norm", "gradient norm"),
    "tokens-per-second": ("tokens_per_second", "tokens a second"),
}
TRAINING, EVALUATION = "training", "evaluation"
_SUFFIXES = (".png", ".svg")
_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_PIPE_SIZE = (80, 20)


@dataclass(frozen=True)
class Run:
    """One run: how far it came, and the curves that were asked for."""

    name: str
    events: list[Event]
    points: list[Point]
    valid_points: dict[str, list[Point]]

    def last(self, kind: str, name: str) -> Any:
        """A field of the last event of a kind; None if there is none."""
        return next((event.get(name) for event in reversed(self.events) if event["event"] == kind), None)

    @property
    def best(self) -> float | None:
        """The lowest bits per byte."""
        return min((bits for event in self.events if (bits := event.get("bits_per_byte")) is not None), default=None)

    def as_json(self, points: Sequence[Point]) -> dict[str, Any]:
        """The documented object, with these as its training curve."""
        return {
            "run": self.name,
            "events": len(self.events),
            "steps": self.last("step", "step") or 0,
            "tokens": self.last("step", "tokens") or 0,
            "loss": self.last("step", "loss"),
            "best_bits_per_byte": self.best,
            "points": [list(point) for point in points],
            "valid_points": {name: [list(point) for point in line] for name, line in self.valid_points.items()},
        }


def plot(
    ctx: typer.Context,
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders that gptcli train wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Draw into a .png or .svg instead.")
    ] = None,
    x: Annotated[str, typer.Option("--x", metavar="|".join(X_AXES), help="The horizontal axis.")] = "tokens",
    y: Annotated[str, typer.Option("--y", metavar="|".join(Y_AXES), help="The vertical axis.")] = "loss",
    smooth: Annotated[
        int | None,
        typer.Option("--smooth", metavar="N", min=1, help="Mean over N steps. Default: 2% of them; JSON: 1."),
    ] = None,
    log_x: Annotated[bool, typer.Option("--log-x", help="A logarithmic x axis.")] = False,
) -> None:
    """Draw or compare the curves of training runs.

    Of one run, training and evaluation; of several, a curve each. A run that goes on, or was killed, can be drawn too.
    """
    said: Output = ctx.obj
    options.choice("--x", x, tuple(X_AXES))
    options.choice("--y", y, tuple(Y_AXES))
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--output {output} is neither .png nor .svg", "give it one of these endings")
    names = _names(runs)
    found = [read_run(path, name, x, y) for path, name in zip(runs, names, strict=True)]
    if said.json:
        for run in found:
            said.record(run.as_json(run.points if y == "bits-per-byte" else smoothed(run.points, smooth or 1)))
    series, marks = _curves(found, y)
    means = _means(series, marks, y, smooth)
    if not said.json and not any(series.values()):
        raise NotFoundError(f"there is no {y} to draw yet", "wait for the first, or draw another --y")
    if output is not None:
        _into_file(output, means, series, marks, x, y, log_x)
        if not said.json:
            said.data(str(output))
    elif not said.json:
        _in_terminal(said, found, means, marks, x, y, log_x)


def read_run(path: Path, name: str, x: str, y: str) -> Run:
    """A run with its curves; raises what ``read_events`` raises."""
    events = read_events(path)
    field, _ = Y_AXES[y]
    training: list[Point] = []
    together: list[Point] = []
    by_text: dict[str, list[Point]] = {}
    place = 0.0
    for event in events:
        if event["event"] == "step":
            place = float(event["step" if x == "steps" else x])
            if event.get(field) is not None:
                training.append((place, event[field]))
        elif event["event"] == "eval":
            together.append((place, event.get(field)))
            for text, value in event["valid"].items():
                by_text.setdefault(text, []).append((place, value))
    if y == "bits-per-byte":
        return Run(name, events, together, by_text)
    return Run(name, events, training, {EVALUATION: together} if y == "loss" and together else {})


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names for the runs, or the paths where two would have the same."""
    short = [(path.parent if path.is_file() else path).resolve().name or str(path) for path in runs]
    return [name if short.count(name) == 1 else str(path) for name, path in zip(short, runs, strict=True)]


def _curves(runs: Sequence[Run], y: str) -> tuple[dict[str, list[Point]], list[str]]:
    """What is drawn, by name, and which of it as marks."""
    if len(runs) > 1:
        series = {run.name: run.points for run in runs}
        return series, [name for name, line in series.items() if len(line) == 1]
    (run,) = runs
    if y == "bits-per-byte":
        series = dict(run.valid_points)
        return series, [name for name, line in series.items() if len(line) == 1]
    return {TRAINING: run.points, **run.valid_points}, list(run.valid_points)


def _means(
    series: Mapping[str, list[Point]], marks: Sequence[str], y: str, smooth: int | None
) -> dict[str, list[Point]]:
    """The curves of training smoothed; evaluations stay as they are."""
    if y == "bits-per-byte":
        return dict(series)
    return {
        name: points if name in marks else smoothed(points, smooth or len(points) // 50 | 1)
        for name, points in series.items()
    }


# --- In the terminal


def _in_terminal(
    said: Output,
    runs: Sequence[Run],
    series: Mapping[str, Sequence[Point]],
    marks: Sequence[str],
    x: str,
    y: str,
    log_x: bool,
) -> None:
    table = _table(runs)
    width, height = _PIPE_SIZE
    colored = said.colored()
    # Braille lines differ in their colours alone.
    unicode = said.on_terminal and (colored or len(series) - len(marks) <= 1)
    if said.on_terminal:
        size = said.console().size
        width, height = size.width, max(8, min(24, size.height - len(table) - 3))
    shown = {_line(name): points for name, points in series.items()}
    title = Y_AXES[y][1] if len(runs) > 1 else f"{_line(runs[0].name)}: {Y_AXES[y][1]}"
    lines = paint(
        shown,
        width,
        height,
        marks=[_line(name) for name in marks],
        unicode=unicode,
        log_x=log_x,
        seconds=x == "seconds",
        title=title,
        x_title=X_AXES[x],
    )
    if not colored:
        said.data("\n".join(["".join(piece.text for piece in line).rstrip() for line in lines]))
    else:
        from rich.text import Text

        console = said.console()
        for line in lines:
            text = Text()
            for piece in line:
                text.append(piece.text, "dim" if piece.series is None else _COLORS[piece.series % len(_COLORS)])
            console.print(text, soft_wrap=True)
    said.data("\n" + "\n".join(table))


def _table(runs: Sequence[Run]) -> list[str]:
    rows = [("run", "steps", "tokens", "loss", "best bits/byte")]
    for run in runs:
        loss, best = run.last("step", "loss"), run.best
        rows.append(
            (
                _line(run.name),
                f"{run.last('step', 'step') or 0:,}",
                human(run.last("step", "tokens") or 0),
                "-" if loss is None else f"{loss:.4f}",
                "-" if best is None else f"{best:.4f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _line(name: str) -> str:
    return harmless(name).replace("\n", " ").replace("\t", " ")


# --- Into a file


def _into_file(
    file: Path,
    series: Mapping[str, Sequence[Point]],
    single: Mapping[str, Sequence[Point]],
    marks: Sequence[str],
    x: str,
    y: str,
    log_x: bool,
) -> None:
    """The same picture by matplotlib, the single steps faint behind their means.

    The same data gives the same bytes, by the same matplotlib.
    """
    from gptcli.cli.figure import figure, need_matplotlib
    from gptcli.core.files import write_whole

    need_matplotlib("leave --output out to draw in the terminal")

    def draw(axes: Any) -> None:
        for number, (name, points) in enumerate(series.items()):
            xs, ys = [place for place, _ in points], [value or 0.0 for _, value in points]
            style: dict[str, Any] = {"color": f"C{number}"}
            style |= {"marker": "o", "markersize": 4, "linestyle": "none"} if name in marks else {}
            if series[name] != single[name]:
                axes.plot(*zip(*single[name], strict=True), color=f"C{number}", alpha=0.25, linewidth=0.7)
            label = _line(name)
            label = " " + label if label.startswith("_") else label  # matplotlib hides labels that begin so
            axes.plot(xs, ys, label=label, linewidth=1.4, **style)
        if log_x:
            axes.set_xscale("log")
        if span := sensible_range(single.values(), log_x=log_x):
            margin = 0.04 * (span[1] - span[0])
            axes.set_ylim(span[0] - margin, span[1] + margin)
        axes.set_xlabel("seconds" if x == "seconds" else X_AXES[x])
        axes.set_ylabel(Y_AXES[y][1])
        if x != "seconds":
            axes.xaxis.set_major_formatter(lambda value, _: human(value))
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    write_whole(file, figure(file.suffix.lower().removeprefix("."), (8, 4.5), draw))
