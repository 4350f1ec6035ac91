"""Curves in text: what is drawn where, in any size, of any data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptcli.cli.curve import Point, human, paint, sensible_range, smoothed

DOTS = {chr(code) for code in range(0x2801, 0x2900)}


def draw(series: Mapping[str, Sequence[Point]], width: int, height: int, **more: Any) -> list[str]:
    """What ``paint`` makes, as plain lines."""
    return ["".join(piece.text for piece in line) for line in paint(series, width, height, **more)]


def falling(count: int = 2000) -> list[Point]:
    """A loss that falls from 9 to 3, steeply at first."""
    return [
        (100.0 * step, 3 + 6 * math.exp(-step / (count / 50)) + math.exp(-3 * step / count)) for step in range(count)
    ]


def body(lines: list[str]) -> list[str]:
    """What stands right of the y axis."""
    return [line[at + 1 :] for line in lines for at in [max(line.find(wall) for wall in "┤│|+")] if at >= 0]


def y_labels(lines: list[str]) -> list[float]:
    return [float(line.split("┤")[0]) for line in lines if "┤" in line]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [5, 9, 24])
@pytest.mark.parametrize("unicode", [True, False])
def test_it_fits_and_uses_what_it_was_given(width: int, height: int, unicode: bool) -> None:
    series = {"training": falling(), "evaluation": [(50_000.0, 4.0), (100_000.0, 3.6), (199_000.0, 3.2)]}
    lines = draw(series, width, height, marks=["evaluation"], unicode=unicode, title="loss", x_title="tokens")
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) >= width - 1
    assert unicode or all(line.isascii() for line in lines)


def test_the_steep_start_does_not_press_the_rest_to_the_floor() -> None:
    lines = draw({"training": falling()}, 80, 14)
    labels = y_labels(lines)
    assert labels == sorted(labels, reverse=True)
    assert max(labels) < 5
    rows = [number for number, row in enumerate(body(lines)) if set(row) & DOTS]
    assert len(rows) >= 10


def test_a_logarithmic_x_shows_the_start_whole() -> None:
    lines = draw({"training": falling()}, 80, 14, log_x=True)
    assert max(y_labels(lines)) >= 8
    assert [label for label in ("1k", "10k", "100k") if label in lines[-1]] == ["1k", "10k", "100k"]


def test_a_spike_in_the_middle_is_cut_off_and_the_end_of_a_diverging_run_is_not() -> None:
    spiky = [(float(x), 3 - x / 2000 + (500 if x == 700 else 0)) for x in range(1000)]
    low, high = sensible_range([spiky]) or (0, 0)
    assert (low, high) == (pytest.approx(2.5, abs=0.01), pytest.approx(4.2, abs=0.3))
    diverging = [(float(x), 3.0 if x < 990 else 50.0) for x in range(1000)]
    assert sensible_range([diverging]) == (3.0, 50.0)


@pytest.mark.parametrize("unicode", [True, False])
def test_one_point_is_seen(unicode: bool) -> None:
    lines = draw({"a": [(16384, 9.01)]}, 60, 8, unicode=unicode)
    seen = "".join(body(lines[1:-2])).replace(" ", "")
    assert len(seen) == 1
    assert any(label in line for line in lines for label in ("9.0", "9 "))


def test_a_constant_is_a_level_line() -> None:
    rows = [row for row in body(draw({"a": [(x, 3.0) for x in range(100)]}, 60, 9)) if set(row) & DOTS]
    assert len(rows) == 1
    assert len(set(rows[0].strip())) == 1


@pytest.mark.parametrize("nothing", [[], [(1, None)], [(1, math.nan), (2, math.inf)], [(math.nan, 1)]])
def test_nothing_is_said_to_be_nothing(nothing: list[Point]) -> None:
    lines = draw({"a": nothing}, 40, 8)
    assert len(lines) == 8
    assert any("nothing to draw yet" in line for line in lines)


def test_values_that_are_none_leave_the_others_as_they_are() -> None:
    whole: list[Point] = [(x, math.sin(x / 9)) for x in range(100)]
    holes: list[Point] = [*whole[:50], (49.5, None), (49.6, math.nan), *whole[50:]]
    assert draw({"a": holes}, 60, 10) == draw({"a": whole}, 60, 10)


def test_many_points_are_means_of_their_column() -> None:
    noisy = [(float(x), x / 4000 + (1 if x % 2 else -1)) for x in range(40_000)]
    rows = body(draw({"a": noisy}, 60, 40, unicode=False)[1:-2])
    columns = ["".join(row.ljust(60)[column] for row in rows).strip() for column in range(5, 50)]
    assert set(columns) == {"*"}


def test_a_line_is_unbroken_where_it_is_steep() -> None:
    lines = draw({"a": [(0, 0.0), (10, 0.0), (11, 100.0), (20, 100.0)]}, 40, 20, unicode=False)
    assert all("*" in row for row in body(lines[1:-2]))


def test_marks_stand_over_lines_and_each_series_has_its_number() -> None:
    series = {"line": [(x, float(x)) for x in range(100)], "mark": [(50, 50.0)]}
    pieces = [piece for line in paint(series, 60, 12, marks=["mark"])[1:] for piece in line]
    assert [piece.text for piece in pieces if piece.series == 1] == ["●"]
    assert {piece.series for piece in pieces} == {None, 0, 1}
    plain = draw(series, 60, 12, marks=["mark"], unicode=False)
    assert sum(line.count("o") for line in plain[1:]) == 1


def test_the_legend_moves_below_the_title_where_it_is_narrow() -> None:
    series = {f"run number {number}": [(0, 1.0), (1, 2.0)] for number in range(5)}
    assert "loss" in draw(series, 120, 20, title="loss")[0]
    assert "run number 4" in draw(series, 120, 20, title="loss")[0]
    narrow = draw(series, 40, 20, title="loss")
    assert narrow[0] == "loss"
    assert sum(line.count("run number") for line in narrow) == 5
    assert max(map(len, narrow)) <= 40


def test_names_that_are_wide_or_long_are_cut_to_cells() -> None:
    from rich.cells import cell_len

    lines = draw({"東京" * 30: [(0, 1.0), (1, 2.0)]}, 40, 10)
    assert max(map(cell_len, lines)) <= 40
    assert "…" in lines[0]


@pytest.mark.parametrize(
    ("last", "labels"), [(90, ["0", "20s", "40s"]), (1500, ["0", "5m", "10m"]), (36000, ["0", "2h", "4h"])]
)
def test_seconds_are_times(last: int, labels: list[str]) -> None:
    foot = draw({"a": [(x * last / 50, 1.0 * x) for x in range(51)]}, 70, 10, seconds=True)[-1].split()
    assert foot[: len(labels)] == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (999.6, "1k"), (1234, "1.23k"), (16384, "16.4k"), (999_999, "1M"), (17_203_200, "17.2M")],
)
def test_counts_in_three_digits(value: float, text: str) -> None:
    assert human(value) == text


def test_small_values_have_short_labels() -> None:
    lines = draw({"lr": [(x, 1e-3 * (1 - x / 100)) for x in range(100)]}, 60, 12)
    assert any(line.lstrip().startswith("4e-4") for line in lines)


def test_smoothing_is_a_mean_and_keeps_levels_and_ends() -> None:
    assert smoothed([(x, 2.0) for x in range(9)], 5) == [(x, 2.0) for x in range(9)]
    assert smoothed([(0, 1.0), (1, None), (2, 4.0), (3, 7.0)], 3) == [(0, 1.0), (2, 4.0), (3, 5.5)]
    assert smoothed([(0, 1.0), (1, 3.0)], 1) == [(0, 1.0), (1, 3.0)]
    assert smoothed([], 7) == []


VALUES = st.one_of(st.none(), st.floats(-1e12, 1e12), st.just(math.nan), st.just(math.inf))
POINTS = st.lists(st.tuples(st.floats(-1e3, 1e12), VALUES), max_size=30)


@example([[(2.225073858507203e-309, 0.0)]], 12, 5, False, False)  # too small to be divided by
@given(st.lists(POINTS, min_size=1, max_size=3), st.integers(12, 90), st.integers(5, 30), st.booleans(), st.booleans())
def test_whatever_the_data_it_fits(
    lists: list[list[Point]], width: int, height: int, unicode: bool, log_x: bool
) -> None:
    series = {f"series {number}": points for number, points in enumerate(lists)}
    lines = draw(series, width, height, marks=["series 0"], unicode=unicode, log_x=log_x, title="t", x_title="x")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width + 12  # labels of twelve digits take their room
