"""``gptcli plot``: runs read again, drawn in a pipe, in a file and as data."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.metrics import read_events, settled
from gptcli.errors import CorruptError, NotFoundError
from tests.cli.conftest import Run
from tests.cli.test_train_view import evaluation, events, start, step
from tests.test_docs import documented

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A run's folder with these events, and a text behind them: ``write("name", events, "{half a li")``."""

    def call(name: str, told: Any, rest: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(event) + "\n" for event in told)
        (folder / "metrics.jsonl").write_text(lines + rest)
        return folder

    return call


def steps_of(told: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in told if event["event"] == "step"]


# --- Reading


def test_a_line_that_was_cut_off_is_left_out(write: Write) -> None:
    whole = read_events(write("whole", events()))
    cut = write("cut", events(), '{"event": "step", "step": 61, "tok')
    assert read_events(cut) == read_events(cut / "metrics.jsonl") == whole == list(events())


def test_an_event_behind_a_cut_line_counts(write: Write) -> None:
    again = "".join(json.dumps(event) + "\n" for event in (start(step=60, resumed=True), step(61)))
    found = read_events(write("run", events(), '{"event": "step", "step": 61, "tok' + again))
    assert steps_of(found) == list(range(1, 62))
    assert found[-2]["resumed"]


def test_what_a_resume_repeated_counts_once_as_it_was_last(write: Write) -> None:
    first, second = list(events(60)), [start(step=40, resumed=True), *(step(n, loss=1.5) for n in range(41, 51))]
    found = read_events(write("run", [*first, *second]))
    assert steps_of(found) == list(range(1, 51))
    assert [event["loss"] for event in found if event["event"] == "step"][-10:] == [1.5] * 10
    assert [event["step"] for event in found if event["event"] == "eval"] == [20, 40]
    assert len([event for event in found if event["event"] == "start"]) == 2


def test_a_step_that_comes_again_without_a_start_takes_back_what_followed() -> None:
    found = settled([start(), step(1), step(2), step(3), evaluation(3, 2.0), step(2, loss=1.0)])
    assert steps_of(found) == [1, 2]
    assert found[-1]["loss"] == 1.0
    assert not [event for event in found if event["event"] == "eval"]


def test_a_rollback_takes_back_what_came_after_its_step() -> None:
    back = {"event": "rollback", "step": 5, "to_step": 3, "lr_scale": 0.5}
    found = settled([start(), *(step(n) for n in range(1, 6)), evaluation(5, 2.0), back])
    assert steps_of(found) == [1, 2, 3]
    assert found[-1] == back
    assert steps_of(settled([*found, step(4), step(5)])) == [1, 2, 3, 4, 5]


def test_of_two_evaluations_at_a_step_the_later_counts() -> None:
    found = settled([start(), step(1), evaluation(1, 3.0), {"event": "save", "step": 1}, evaluation(1, 2.0)])
    assert [event["bits_per_byte"] for event in found if event["event"] == "eval"] == [2.0]
    assert [event["event"] for event in found] == ["start", "step", "save", "eval"]


def test_reading_a_long_run_is_linear() -> None:
    told = [event for n in range(1, 40_001) for event in ([step(n), evaluation(n, 2.0)] if n % 10 == 0 else [step(n)])]
    assert len(settled(told)) == len(told)


def test_what_is_no_run_is_refused(tmp_path: Path, write: Write) -> None:
    with pytest.raises(NotFoundError, match=r"has no metrics\.jsonl"):
        read_events(tmp_path)
    with pytest.raises(NotFoundError):
        read_events(tmp_path / "missing")
    with pytest.raises(CorruptError, match="holds no events"):
        read_events(write("bad", [], 'hello\n["event"]\n{"event": 3}\n'))


# --- As data


def test_json_has_the_documented_fields_and_the_curve(run: Run, write: Write) -> None:
    folder = write("fable", events())
    told = run("plot", folder, "--json").json
    assert documented("plot") == set(told)
    assert (told["run"], told["steps"], told["tokens"]) == ("fable", 60, 60 * 16384)
    assert told["events"] == len(list(events()))
    assert told["loss"] == step(60)["loss"]
    assert told["best_bits_per_byte"] == 1.4
    assert told["points"] == [[n * 16384.0, step(n)["loss"]] for n in range(1, 61)]
    assert told["valid_points"] == {"evaluation": [[n * 16384.0, 2 * (2 - n / 100)] for n in (20, 40, 60)]}


@pytest.mark.parametrize("y", ["loss", "bits-per-byte", "lr", "grad-norm", "tokens-per-second"])
@pytest.mark.parametrize(("x", "last"), [("tokens", 60 * 16384), ("steps", 60), ("seconds", 24.0)])
def test_every_axis(run: Run, write: Write, x: str, last: float, y: str) -> None:
    told = run("plot", write("fable", events()), "--json", "--x", x, "--y", y).json
    assert told["points"][-1][0] == pytest.approx(last)
    values = {"lr": 1e-3, "grad-norm": 0.5, "tokens-per-second": 41_000.0, "bits-per-byte": 1.4}
    assert told["points"][-1][1] == pytest.approx(values.get(y, told["loss"]))
    if y == "bits-per-byte":
        assert list(told["valid_points"]) == ["novels.valid", "stories.valid", "tinystories.valid"]
        assert told["valid_points"]["novels.valid"][-1] == [pytest.approx(last), 1.5]


def test_steps_that_were_not_finite_are_gaps(run: Run, write: Write) -> None:
    folder = write("fable", [start(), step(1), step(2, loss=None), step(3), step(4, loss=None)])
    told = run("plot", folder, "--json", "--x", "steps", "--smooth", "3").json
    assert [x for x, _ in told["points"]] == [1.0, 3.0]
    assert told["loss"] is None
    assert told["best_bits_per_byte"] is None
    assert run("plot", folder).code == 0


def test_several_runs_are_a_line_each(run: Run, write: Write) -> None:
    folders = [write("a", events()), write("b/run", events()), write("c/run", events())]
    done = run("plot", *folders, "--json")
    names = [json.loads(line)["run"] for line in done.out.splitlines()]
    assert names == ["a", str(folders[1]), str(folders[2])]


# --- In the terminal


def test_in_a_pipe_the_curve_is_plain_and_80_wide(run: Run, write: Write) -> None:
    done = run("plot", write("fable", events()))
    assert (done.code, done.err) == (0, b"")
    lines = done.out.decode("ascii").splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("fable: loss, nats a token")
    assert lines[0].endswith("* training  o evaluation")
    assert sum(line.count("*") for line in lines[1:]) > 30
    assert sum(line.count("o") for line in lines[1:18]) == 3
    assert lines[-1].split() == ["fable", "60", "983k", "3.2987", "1.4000"]


def test_runs_are_compared(run: Run, write: Write) -> None:
    slow = [event | ({"loss": event["loss"] + 1} if event["event"] == "step" else {}) for event in events()]
    done = run("plot", write("quick", events()), write("slow", slow), "--log-x", "--y", "loss")
    lines = done.out.decode("ascii").splitlines()
    assert lines[0].endswith("* quick  o slow")
    for column in range(10, 79):
        rows = [line.ljust(80)[column] for line in lines[1:18]]
        if "*" in rows and "o" in rows:
            assert rows.index("o") < rows.index("*")
    assert [line.split()[0] for line in lines[-2:]] == ["quick", "slow"]


def test_a_name_can_not_drive_the_terminal(run: Run, write: Write) -> None:
    done = run("plot", write("\x1b[31mred", events()))
    assert b"\x1b" not in done.out
    assert b"\\x1b[31mred" in done.out


def test_colour_is_used_where_it_is_wanted(run: Run, write: Write) -> None:
    assert b"\x1b[" in run("plot", write("fable", events()), "--color", "always").out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--x", "epochs"), 2),
        (("--y", "accuracy"), 2),
        (("--smooth", "0"), 2),
        (("--output", "loss.pdf"), 2),
        (("no-such-run",), 3),
        (("--output", "no/such/folder.svg"), 1),
    ],
)
def test_wrong_use(run: Run, write: Write, args: tuple[str, ...], code: int) -> None:
    done = run("plot", write("fable", events()), *args)
    assert done.code == code
    assert done.out == b""
    assert done.err.startswith(b"error: ")


def test_nothing_to_draw_is_said(run: Run, write: Write) -> None:
    folder = write("fable", [start()])
    done = run("plot", folder)
    assert done.code == 3
    assert b"no loss to draw yet" in done.err
    assert run("plot", folder, "--json").json["points"] == []


# --- Into a file


@pytest.mark.parametrize("name", ["loss.svg", "loss.png", "LOSS.SVG"])
def test_a_file_is_drawn_the_same_each_time(run: Run, write: Write, tmp_path: Path, name: str) -> None:
    folders = [write("fable", events()), write("_$hidden$", events())]
    made = []
    for _ in range(2):
        done = run("plot", *folders, "--output", tmp_path / name)
        assert (done.code, done.out) == (0, f"{tmp_path / name}\n".encode())
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    assert made[0].startswith(b"<?xml" if name.lower().endswith("svg") else b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(
    run: Run, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    done = run("plot", write("fable", events()), "--output", tmp_path / "loss.svg")
    assert done.code == 2
    assert b"gptcli[plot]" in done.err
    assert not (tmp_path / "loss.svg").exists()
