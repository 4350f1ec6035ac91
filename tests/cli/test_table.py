"""Tables in text, Markdown and CSV; sizes for people."""

from __future__ import annotations

import csv
import io

import pytest

from gptcli.cli.out import Output
from gptcli.cli.table import Column, Table, as_csv, as_markdown, as_text, bars_of
from gptcli.cli.units import byte_text, scaled


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


TABLE = Table(
    (Column("name", right=False), Column("much", keep=2), Column("more", keep=1), Column("most")),
    (("a", "1", "22", "333"), ("long name", "4,444", "", "5")),
    title="A title that is long",
    notes=("A note that is longer than the terminal",),
)


def test_columns_line_up_and_nothing_is_broken_off_a_terminal() -> None:
    lines = as_text(TABLE, Output(io.StringIO(), io.StringIO()))
    assert lines == [
        "A title that is long",
        "name        much  more  most",
        "a              1    22   333",
        "long name  4,444           5",
        "A note that is longer than the terminal",
    ]


def test_what_matters_least_goes_first_where_it_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output(Terminal(), io.StringIO())
    out.color = "never"
    for columns, heading in (
        (28, "name        much  more  most"),
        (27, "name        much  most"),
        (20, "name       most"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = as_text(TABLE, out)
        assert heading in lines
        assert max(map(len, lines)) <= columns


def test_names_can_not_drive_a_terminal_or_break_a_table() -> None:
    table = Table((Column("x"),), (("\x1b[2Ja|b\n",),))
    out = Output(io.StringIO(), io.StringIO())
    assert "\x1b" not in "".join(as_text(table, out))
    assert as_markdown(table)[2] == "| \\x1b[2Ja\\|b  |"
    assert as_csv([["a,b", None, 1.5, "\x1b"]]) == '"a,b",,1.5,\\x1b\n'
    assert list(csv.reader(io.StringIO(as_csv([["a,b", 'q"']])))) == [["a,b", 'q"']]


def test_bars_are_as_long_as_their_shares() -> None:
    assert bars_of([50.0, 25.0, 0.0, 6.25], 16) == ["█" * 16, "█" * 8, "", "██"]
    assert bars_of([1.0], None) == bars_of([1.0], 7) == bars_of([0.0], 20) == [""]
    assert len(bars_of([1.0], 1000)[0]) == 60


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert byte_text(count) == text


def test_beyond_the_last_prefix_digits_go_on() -> None:
    assert scaled(3.14e23, "FLOPs", 2) == "314.00 ZFLOPs"
    assert scaled(1e30, "", 0) == "1,000,000 Y"
