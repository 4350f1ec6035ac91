"""Option values taken without pydantic are what Typer makes of them; what it refuses is refused in its words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from gptcli.cli.values import take_plainly
from tests.conftest import ROOT


def command(taken: list[Any]) -> Any:
    app = typer.Typer(add_completion=False)

    @app.command()
    def run(
        texts: Annotated[list[str] | None, typer.Argument()] = None,
        whole: Annotated[int, typer.Option()] = 3,
        few: Annotated[int | None, typer.Option(min=1, max=9)] = None,
        part: Annotated[float, typer.Option()] = 0.5,
        name: Annotated[str | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option()] = False,
        path: Annotated[Path | None, typer.Option()] = None,
        paths: Annotated[list[Path] | None, typer.Option()] = None,
    ) -> None:
        taken.append((texts, whole, few, part, name, flag, path, paths))

    return typer.main.get_command(app)


def outcome(args: list[str], *, plainly: bool) -> Any:
    """What the command was given, or what was said instead."""
    taken: list[Any] = []
    made = command(taken)
    for param in made.params if plainly else ():
        take_plainly(param)
    try:
        made.main(args, standalone_mode=False)
    except typer.TyperException as error:
        return type(error).__name__, error.format_message()
    return taken


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["a", "", "ü"],
        ["--whole", "7"],
        ["--whole", "-7"],
        ["--whole", "007"],
        ["--whole", " 7"],
        ["--whole", "7.0"],
        ["--whole", "1_000"],
        ["--whole", "seven"],
        ["--whole", "9" * 30],
        ["--few", "9"],
        ["--few", "10"],
        ["--few", "0"],
        ["--part", "1"],
        ["--part", "-0.25"],
        ["--part", "1e-3"],
        ["--part", "inf"],
        ["--part", "half"],
        ["--name", ""],
        ["--name", "x y", "--flag"],
        ["--path", "/", "--paths", "a", "--paths", "/dev/null"],
        ["--path", "no such file"],
        ["--path", ""],
    ],
    ids=" ".join,
)
def test_values_are_what_typer_makes_of_them(args: list[str]) -> None:
    assert outcome(args, plainly=True) == outcome(args, plainly=False)


def test_a_file_that_may_not_be_read_is_refused_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("x")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read all
    args = ["--path", str(tmp_path / "secret")]
    plain = outcome(args, plainly=True)
    assert plain == outcome(args, plainly=False)
    assert "not readable" in plain[1]


def test_an_older_typer_is_left_as_it_is() -> None:
    class Older:
        name = "x"

    take_plainly(Older())


def test_pydantic_is_not_imported_for_plain_values() -> None:
    script = """
import sys
from gptcli.cli import main
code = main(["tokenize", "--split", "2", "--strip", "-f", "/dev/null", "a b c"])
assert code == 0
assert "pydantic" not in sys.modules
code = main(["tokenize", "--split", "two", "a b c"])
assert code == 2
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()
    assert b"'--split': " in done.stderr
