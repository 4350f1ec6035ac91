"""What is seen of a training run: the picture in any size, the lines off a terminal, the NDJSON, the summary."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from gptcli.cli.live import keep_drawn
from gptcli.cli.out import Output
from gptcli.cli.train_picture import Trace, TrainPicture, clock
from gptcli.cli.train_view import TrainView

TEXTS = {"novels.valid": 0.1, "stories.valid": 0.0, "tinystories.valid": -0.3}
SAMPLE = " there was a [red]king[/red]\x1b[2J who had a daughter.\n\n東京の王様は 🙂 " + "and so on " * 60


def start(steps: int | None = 100, **more: Any) -> dict[str, Any]:
    config = {"layers": 12, "width": 384, "heads": 6, "context": 512, "vocab_size": 8192}
    batch = {"batch_tokens": 16384, "micro_batch": 8, "accumulate": 4, "steps": steps, "minutes": None, "seed": 1}
    place = {"device": "cpu", "dtype": "bfloat16", "optimizer": "muon", "compile": True, "ranks": 1}
    counts = {"step": 0, "tokens": 0, "parameters": 17_203_200, "train_tokens": 312_000_000, "train_bytes": 10**9}
    return {"event": "start", **counts, "config": config, **batch, **place, "parallel": "none", **more}


def step(number: int, steps: int = 100, **more: Any) -> dict[str, Any]:
    numbers = {"step": number, "tokens": number * 16384, "loss": 3 + 6 * math.exp(-number / 20), "lr": 1e-3}
    pace = {"grad_norm": 0.5, "tokens_per_second": 41_000.0, "seconds": number * 0.4, "progress": number / steps}
    return {"event": "step", **numbers, **pace, "utilization": 0.58, "skipped": False, **more}


def evaluation(number: int, bits: float) -> dict[str, Any]:
    valid = {name: bits + more for name, more in TEXTS.items()}
    told = {"step": number, "tokens": number * 16384, "loss": 2 * bits, "bits_per_byte": bits, "best": bits}
    return {"event": "eval", **told, "valid": valid}


def events(last: int = 60) -> Iterator[dict[str, Any]]:
    """A run of 100 steps up to ``last``."""
    yield start()
    for number in range(1, last + 1):
        yield step(number)
        if number % 20 == 0:
            yield evaluation(number, 2 - number / 100)
            tokens = number * 16384
            yield {"event": "sample", "step": number, "tokens": tokens, "prompt": "Once", "text": SAMPLE, "seed": 3}
    yield {"event": "save", "step": last, "tokens": last * 16384, "path": "out", "checkpoint": "c"}


DONE = {"event": "done", "step": 60, "tokens": 60 * 16384, "seconds": 24.0, "skipped": 0, "bits_per_byte": 1.4}


def console(width: int = 80, height: int = 24) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system="standard")


def picture(told: Iterator[dict[str, Any]] | None = None, name: str = "fable") -> TrainPicture:
    made = TrainPicture(name, clock=lambda: 0.0)
    for event in told or events():
        made.show(event)
    return made


def lines_of(shown: TrainPicture, width: int = 80, height: int = 24) -> list[str]:
    return [line.plain for line in shown.frame(console(), width, height)]


# --- The picture


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120, 200])
@pytest.mark.parametrize("height", [10, 15, 24, 40, 60])
def test_it_fits_in_any_terminal(width: int, height: int) -> None:
    for last in (0, 1, 2, 60):
        told = [event for event in events(60) if event["step"] <= last and (last or event["event"] == "start")]
        lines = lines_of(picture(iter(told)), width, height)
        assert 0 < len(lines) < height
        assert max(map(cell_len, lines)) < width


def test_it_tells_what_matters() -> None:
    text = "\n".join(lines_of(picture(), 120, 40))
    for part in (
        "fable · 17.2M parameters · 12 layers of 384 · context 512",
        "cpu, bfloat16, compiled · muon · 16,384 tokens a step, 4 x 8 rows",
        "loss, nats a token",
        "60/100",
        "983k",
        "41,000",
        "58 %",
        "1.00e-03",
        "novels.valid        1.5000   1.5000",
        "together            1.4000   1.4000",
        "60 %   0:24 passed   0:16 left",
        "sample at step 60",
        "Once there was a [red]king[/red]\\x1b[2J who had a daughter.",
    ):
        assert part in text


def test_now_and_best_differ_after_a_worse_evaluation() -> None:
    shown = picture()
    shown.show(step(61))
    shown.show(evaluation(61, 1.9))
    text = "\n".join(lines_of(shown))
    assert "together         1.9000   1.4000" in text
    assert "best at           60" in text


def test_a_low_terminal_loses_the_sample_first_then_the_curve() -> None:
    def has(height: int) -> tuple[bool, bool]:
        text = "\n".join(lines_of(picture(), 80, height))
        assert "60/100" in text
        assert "passed" in text
        return "sample" in text, "nats a token" in text

    seen = [has(height) for height in range(40, 7, -1)]
    assert seen[0] == (True, True)
    assert seen[-1] == (False, False)
    assert (False, True) in seen
    assert (True, False) not in seen
    assert seen == sorted(seen, reverse=True)


def test_text_from_outside_can_not_drive_the_terminal() -> None:
    nasty = "\x1b[31m[bold]x[/bold]\n\u202e"
    told = list(events())
    for event in told:
        if event["event"] == "eval":
            event["valid"] = {nasty: 1.0, **event["valid"]}
        if event["event"] == "sample":
            event.update(prompt=nasty, text=nasty)
    lines = lines_of(picture(iter(told), name=nasty), 120, 40)
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert sum("\\x1b[31m[bold]x[/bold]" in line for line in lines) == 4  # the name, the text, the sample's two


def test_what_is_not_finite_or_skipped_is_said() -> None:
    shown = picture()
    shown.show(step(61, loss=None, grad_norm=None, skipped=True, utilization=None))
    text = "\n".join(lines_of(shown))
    assert "not finite" in text
    assert "skipped            1" in text


def test_old_metrics_without_the_newer_fields_are_drawn_too() -> None:
    keep = {"event", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "progress"}
    base = {"event", "parameters", "config", "batch_tokens", "steps", "minutes", "seed", "device", "dtype"}
    valid = {"event", "step", "loss", "bits_per_byte", "valid"}
    fields = {"start": base, "step": keep, "eval": valid}
    told = [{name: event[name] for name in fields[event["event"]]} for event in events() if event["event"] in fields]
    assert any("60/100" in line for line in lines_of(picture(iter(told))))


def test_a_rollback_takes_the_curve_back() -> None:
    shown = picture()
    shown.show({"event": "rollback", "step": 60, "to_step": 30, "lr_scale": 0.5})
    assert shown.bests()[0][1] == 1.8
    shown.show(step(31))
    assert any("31/100" in line for line in lines_of(shown))


def test_the_curve_of_a_resumed_run_goes_on() -> None:
    history = [*events(60), start(step=40, resumed=True)]
    shown = TrainPicture("fable", clock=lambda: 0.0)
    shown.recall(history[:-1])
    shown.show(history[-1])
    assert shown.bests()[0][1] == 1.6
    shown.show(step(41, seconds=1000.0))
    assert shown.seconds_left is None  # the pace of this machine is not known yet
    shown.show(step(42, seconds=1002.0))
    assert shown.seconds_left == pytest.approx(2.0 * 58)
    assert any(line.lstrip().startswith("0") for line in lines_of(shown))  # x begins at 0, not at step 41


def test_a_trace_keeps_any_number_of_points_in_bounded_room() -> None:
    trace = Trace()
    for number in range(100_001):
        trace.add(number, float(number), 2.0)
    points = trace.points()
    assert len(points) <= 1024
    assert {y for _, y in points} == {2.0}
    assert points[-1][0] == pytest.approx(100_000, rel=0.01)
    trace.back_to(50_000)
    assert trace.points()[-1][0] <= 50_000


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (3730, "1:02:10"), (90_000, "1 day 1:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# --- On a terminal


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Output:
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    return Output(Stream(True), Stream(True))


def written(said: Output) -> tuple[str, str]:
    assert isinstance(said.stdout, Stream)
    assert isinstance(said.stderr, Stream)
    return said.stdout.getvalue(), said.stderr.getvalue()


def test_a_person_is_left_with_a_summary_and_the_folder(terminal: Output, tmp_path: Path) -> None:
    with TrainView(terminal, tmp_path / "fable") as view:
        for event in [*events(), DONE]:
            view.show(event)
        terminal.note("above the picture")
    out, err = written(terminal)
    assert out == f"{tmp_path / 'fable'}\n"
    assert "note: above the picture" in err
    assert "note: step" not in err
    after = err.rsplit("\x1b[?25h", 1)[1]  # the cursor is shown again: what follows stays
    assert "done: 983,040 tokens in 0:24, 40,960 tokens/s" in after
    assert "nats a token" in after
    assert "sample" not in after
    assert "\x1b[2J" not in err


def test_a_run_that_is_stopped_says_so_and_gives_no_answer(terminal: Output, tmp_path: Path) -> None:
    view = TrainView(terminal, tmp_path / "fable")

    def run() -> None:
        with view:
            for event in events():
                view.show(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    out, err = written(terminal)
    assert view.saved
    assert out == ""
    assert "stopped: 983,040 tokens" in err


def test_a_rollback_is_said_above_the_picture(terminal: Output, tmp_path: Path) -> None:
    with TrainView(terminal, tmp_path / "fable") as view:
        for event in events():
            view.show(event)
        view.show({"event": "rollback", "step": 60, "to_step": 30, "lr_scale": 0.5})
    assert "back to step 30, the learning rate times 0.5" in written(terminal)[1]


def test_a_fault_of_the_picture_does_not_end_the_run(terminal: Output, tmp_path: Path) -> None:
    with TrainView(terminal, tmp_path / "fable") as view:
        view.show(start(parameters=None))
        terminal.note("still here")
    err = written(terminal)[1]
    assert "the picture can't be drawn: TypeError" in err
    assert "still here" in err


def test_lines_that_a_narrower_window_folded_are_taken_back() -> None:
    class Window(Console):
        @property
        def width(self) -> int:
            return now[0]

    now = [80]
    screen = Window(file=io.StringIO(), height=24, force_terminal=True, legacy_windows=False)
    live = keep_drawn("x" * 70 + "\n" + "y" * 20, screen, 2.0)
    live.start(refresh=True)
    stream = screen.file
    assert isinstance(stream, io.StringIO)
    for width, ups in ((80, 1), (40, 2), (40, 2)):
        now[0] = width
        before = len(stream.getvalue())
        live.refresh()
        assert stream.getvalue()[before:].count("\x1b[1A") == ups
    live.stop()


@pytest.mark.parametrize(("options", "terminal_there"), [({"json_": True}, True), ({"quiet": True}, True), ({}, False)])
def test_there_is_no_picture_for_scripts(tmp_path: Path, options: dict[str, bool], terminal_there: bool) -> None:
    said = Output(Stream(terminal_there), Stream(terminal_there))
    said.configure(**options, color="auto")  # type: ignore[arg-type]
    with TrainView(said, tmp_path / "fable") as view:
        for event in events():
            view.show(event)
    assert "\x1b[" not in "".join(written(said)).replace("\\x1b", "").replace("\\u001b", "")


def test_a_dumb_terminal_gets_lines(terminal: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with TrainView(terminal, tmp_path / "fable") as view:
        for event in events():
            view.show(event)
    err = written(terminal)[1]
    assert "\x1b" not in err
    assert "note: step 20: bits per byte" in err


# --- Off a terminal


def test_lines_come_every_ten_seconds_and_for_what_is_rare(tmp_path: Path) -> None:
    said, now = Output(Stream(False), Stream(False)), [0.0]
    with TrainView(said, tmp_path / "fable", now=lambda: now[0]) as view:
        for event in [*events(), {"event": "rollback", "step": 60, "to_step": 30, "lr_scale": 0.5}, DONE]:
            now[0] += 0.25 if event["event"] == "step" else 0
            view.show(event)
    out, err = written(said)
    assert out == f"{tmp_path / 'fable'}\n"
    lines = err.splitlines()
    assert lines[0] == "note: 17,203,200 parameters, cpu, bfloat16, muon, 16,384 tokens a step"
    told = [line for line in lines if line.startswith("note: step") and "loss" in line]
    assert [line.split()[2] for line in told] == ["1/100", "41/100"]
    assert told[1].endswith("lr 1.00e-03  41,000 tokens/s  58 % used  0:24 left")
    assert sum("bits per byte novels.valid" in line for line in lines) == 3
    samples = [line for line in lines if "sample: Once there was a [red]king[/red]\\x1b[2J who" in line]
    assert len(samples) == 3
    assert max(map(len, samples)) < 360
    assert "note: step 60: saved" in lines
    assert any(line.startswith("warning: step 60") for line in lines)
    assert lines[-1] == "note: 983,040 tokens in 24 s"
    assert all(line.startswith(("note: ", "warning: ")) for line in lines)


def test_in_json_the_events_are_the_data_and_nothing_is_said(tmp_path: Path) -> None:
    said = Output(Stream(False), Stream(False), json=True)
    told = [*events(), {"event": "rollback", "step": 60, "to_step": 30, "lr_scale": 0.5}, DONE]
    with TrainView(said, tmp_path / "fable") as view:
        for event in told:
            view.show(event)
    out, err = written(said)
    assert [json.loads(line) for line in out.splitlines()] == told
    assert err == ""


def test_quiet_leaves_the_answer_alone(tmp_path: Path) -> None:
    said = Output(Stream(True), Stream(True))
    said.configure(quiet=True, color="auto")
    with TrainView(said, tmp_path / "fable") as view:
        for event in [*events(), DONE]:
            view.show(event)
    assert written(said) == (f"{tmp_path / 'fable'}\n", "")


def test_the_recording_is_the_same_each_time_and_has_the_curve() -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    try:
        from record_view import record
    finally:
        sys.path.pop(0)
    first, second = (record(list(events()), "fable", 0.5, 100, 34) for _ in range(2))
    assert first == second
    assert "30/100" in first
    assert any(0x2800 < ord(letter) < 0x2900 for letter in first)
