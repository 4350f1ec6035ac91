"""What to type instead: hints hold the command as it should have been."""

from __future__ import annotations

import shlex

import pytest

from tests.cli.conftest import Run


def hint(run: Run, line: str) -> str:
    done = run(*shlex.split(line))
    assert (done.code, done.out) == (2, b"")
    told = done.err.decode().splitlines()
    assert len(told) == 2
    return told[1].removeprefix("hint: ")


@pytest.mark.parametrize(
    ("line", "better"),
    [
        ("generate Once upon a time", "generate 'Once upon a time'"),
        (
            "generate Once -n 5 upon -mfable a --seed=1 time -qv",
            "generate 'Once upon a time' -n 5 -mfable --seed=1 -qv",
        ),
        ("generate Once --system 'be kind' upon --stop 'The end'", None),  # generate has no --system
        ("chat Hello there --system 'be kind'", "chat 'Hello there' --system 'be kind'"),
        ("complete Once upon", "complete 'Once upon'"),
        ("generate - milk", "generate -- '- milk'"),
        ("trace -- Once -5 -q", "trace -- 'Once -5 -q'"),
        ("models show a b", None),  # no text
    ],
)
def test_a_text_without_quotes(run: Run, line: str, better: str | None) -> None:
    told = hint(run, line)
    assert told.startswith("put the text in quotes: ") == (better is not None)
    if better:
        assert told == f"put the text in quotes: gptcli {better}"


@pytest.mark.parametrize(
    ("line", "better"),
    [
        ("generate '- milk'", "generate -- '- milk'"),
        ("generate -5", "generate -- -5"),
        ("generate -n 5 '- milk' and eggs -q", "generate -n 5 -q -- '- milk and eggs'"),
        ("generate '--- a line' --seed=3", "generate --seed=3 -- '--- a line'"),
        ("embed '- milk' '- eggs' --pool mean", "embed --pool mean -- '- milk' '- eggs'"),
        ("generate --tempreture", None),
        ("generate '--sytem=be kind'", None),
        ("generate --bogus '- milk'", None),  # the error speaks of --bogus
        ("generate '- milk' -x", "generate -x -- '- milk'"),
        ("generate '-quiet evening'", "generate -- '-quiet evening'"),
        ("generate -q '-s: loud'", "generate -q -- '-s: loud'"),
        ("models show '- milk'", None),
        ("train '- milk'", None),
    ],
)
def test_a_text_that_begins_with_a_dash(run: Run, line: str, better: str | None) -> None:
    told = hint(run, line)
    assert told.startswith("a text that begins with - goes behind --: ") == (better is not None)
    if better:
        assert told == f"a text that begins with - goes behind --: gptcli {better}"


def test_what_the_hint_says_is_taken(run: Run) -> None:
    """The command that is written out is read as it is meant."""
    for line in ("tokenize '- milk' --pieces", "tokenize -5 --ids"):
        better = hint(run, line).partition("gptcli ")[2]
        assert run(*shlex.split(better)).code == 0


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("-q generate x", "options go behind the command: gptcli generate -q"),
        ("-m fable -v generate x", "options go behind the command: gptcli generate -m fable -v"),
        ("-q models list", "options go behind the command: gptcli models list -q"),
        ("models -q list", "options go behind the command: gptcli models list -q"),
        ("--nonsense generate x", "gptcli --help lists the options"),
        ("-q models", "gptcli --help lists the options"),
        ("-q", "gptcli --help lists the options"),
    ],
)
def test_options_in_front_of_the_command(run: Run, line: str, told: str) -> None:
    assert hint(run, line) == told


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Once upon a time -n 5", "gptcli generate 'Once upon a time' continues it"),
        ("'Once upon' x", "gptcli generate 'Once upon' continues it"),
        ("Once upon", "gptcli --help lists them"),
        ("genrate upon a time", "did you mean generate?"),
        ("models Once upon a time", "gptcli models --help lists them"),
    ],
)
def test_a_text_in_the_place_of_a_command(run: Run, line: str, told: str) -> None:
    assert hint(run, line) == told


def test_a_long_text_is_not_all_written_out(run: Run) -> None:
    told = hint(run, f"generate {'word ' * 1000}")
    assert told.startswith("put the text in quotes: gptcli generate 'word word ")
    assert len(told) < 200
    assert hint(run, f"embed '- milk' {'word ' * 1000}") == "a text that begins with - goes behind --"


@pytest.mark.parametrize("path", [[], ["generate"], ["models"], ["models", "show"]], ids=" ".join)
def test_help_is_understood_as_a_command(run: Run, path: list[str]) -> None:
    assert run("help", *path) == run(*path, "--help")
    assert run("help", *path).code == 0
    if path[:1] == ["models"]:
        assert run("models", "help", *path[1:]) == run(*path, "--help")


def test_help_runs_nothing_and_is_not_listed(run: Run) -> None:
    assert run("help", "tokenize", "x", "--", "y").out == run("tokenize", "--help").out
    unknown = run("help", "nosuch")
    assert (unknown.code, unknown.out) == (2, b"")
    assert b"nosuch" in unknown.err
    assert b"\n  help " not in run("--help").out


def test_no_command_of_the_help_is_broken_over_two_lines(run: Run) -> None:
    lines = [line.strip() for line in run("--help").out.decode().splitlines()]
    assert lines[-2].endswith(": gptcli --install-completion")
    assert "GPTCLI_MODEL" in lines[-1]
    assert "config.toml" in lines[-1]
    assert max(map(len, lines)) <= 78
