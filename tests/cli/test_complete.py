"""``gptcli complete``: what it shows in a pipe, as JSON and on a terminal, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli import complete as command
from gptcli.cli.out import Output
from gptcli.serve.place import Place, claim, runtime_folder
from gptcli.spec.library import resolve
from gptcli.text.ends import UNTIL
from tests.cli.conftest import Run

FIELDS = {"model", "completions", "tokens", "known", "truncated", "late", "device", "dtype", "quantize"}


@pytest.fixture
def complete(run: Run, tiny_folder: Path) -> Run:
    """``gptcli complete`` with the tiny model in float32."""
    return lambda *args, **more: run("complete", "-m", tiny_folder, "--dtype", "float32", *args, **more)


def test_json_has_the_fields_of_the_contract(complete: Run) -> None:
    done = complete("Once upon a", "--json", "--num", "2")
    assert done.code == 0, done.err
    assert done.json.keys() == FIELDS
    assert (done.json["model"], done.json["device"], done.json["dtype"]) == ("tiny", "cpu", "float32")
    assert len(done.json["completions"]) == 2
    for each in done.json["completions"]:
        assert each.keys() == {"text", "probability"}
        assert 0 < each["probability"] <= 1


def test_in_a_pipe_a_suggestion_is_a_line_of_its_text_alone(complete: Run) -> None:
    told = complete("Once upon a", "--json", "--num", "5")
    done = complete("Once upon a", "--num", "5")
    assert done.out.decode().split("\n")[:-1] == [each["text"] for each in told.json["completions"]]
    assert done.err == b""


def test_silence_is_no_error(complete: Run) -> None:
    done = complete("Once upon a", "--min-prob", "1")
    assert (done.code, done.out, done.err) == (0, b"", b"")
    assert complete("Once upon a", "--min-prob", "1", "--json").json["completions"] == []


def test_a_pipe_comes_before_the_argument_and_keeps_its_line_end(complete: Run) -> None:
    one = complete("Once upon a", "--json").json
    assert complete(" upon a", "--json", stdin=b"Once").json == one
    assert complete("--json", "--strip", stdin=b"Once upon a\n").json == one
    assert complete("--json", stdin=b"Once upon a\n").json != one
    assert complete(" upon a", "--json", "--no-stdin", stdin=b"Once").json != one


def test_an_empty_text_starts_from_the_start_token(complete: Run) -> None:
    assert complete("", "--json").json["tokens"] == 1


def test_options_reach_the_search(complete: Run) -> None:
    word = complete("Once upon a", "--until", "word", "--json").json["completions"]
    suffix = complete("Once upon a", "--until", "word", "--json", "--suffix", " the").json["completions"]
    assert all(len(each["text"].split()) == 1 for each in word)
    assert suffix
    short = complete("Once upon a", "--max-tokens", "1", "--json").json["completions"]
    assert all(len(each["text"]) <= 14 for each in short)
    marked = [complete("a<|endoftext|>b", "--special", how, "--json").json["tokens"] for how in ("text", "parse")]
    assert marked[0] > marked[1]


@pytest.mark.parametrize(("word", "seconds"), [("150ms", 0.15), ("0.2s", 0.2), ("2", 2.0), (".5 s", 0.5)])
def test_a_time_is_read_as_it_is_written(word: str, seconds: float) -> None:
    assert command.seconds(word) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--deadline", "soon"),
        ("--deadline", "0ms"),
        ("--deadline", "-1s"),
        ("--num", "0"),
        ("--max-tokens", "0"),
        ("--until", "page"),
        ("--min-prob", "2"),
        ("--min-prob", "nan"),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_loaded(run: Run, wrong: tuple[str, str]) -> None:
    done = run("complete", "a", "-m", "no-such-model", *wrong)
    assert done.code == 2
    assert wrong[0].encode() in done.err


def test_the_choices_are_those_of_the_search() -> None:
    assert command.UNTIL == UNTIL


def test_a_deadline_answers(complete: Run) -> None:
    done = complete("Once upon a", "--deadline", "1ms", "--json")
    assert done.code == 0
    assert isinstance(done.json["late"], bool)


def test_a_warm_process_that_is_late_leaves_an_answer_of_all_fields(run: Run) -> None:
    silent = claim(Place.of(runtime_folder(), resolve("fable").folder))
    assert silent is not None
    try:
        done = run("complete", "a", "--deadline", "1ms", "--json")
    finally:
        silent.release()
    assert (done.code, done.err) == (0, b"")
    assert done.json.keys() == FIELDS
    assert (done.json["model"], done.json["late"], done.json["completions"]) == ("fable", True, [])
    assert [done.json[name] for name in ("device", "dtype", "quantize")] == [None] * 3


def test_a_line_end_within_a_text_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output.standard()
    command._show(out, result(" a\nb", "c\x1b[31m"))
    out.close()
    assert capsys.readouterr().out == " a\\nb\nc\x1b[31m\n"


def test_on_a_terminal_suggestions_are_numbered_and_harmless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "on_terminal", property(lambda self: True))
    monkeypatch.setattr(Output, "colored", lambda self, stream=None: False)
    out = Output.standard()
    command._show(out, result(" time", "c\x1b[31m", probability=0.25))
    out.close()
    assert capsys.readouterr().out == "1   25.0%   time\n2   25.0%  c\\x1b[31m\n"


def test_the_answer_in_json_is_one_object(complete: Run) -> None:
    assert len([json.loads(line) for line in complete("a", "--json", "--num", "4").out.splitlines()]) == 1


def result(*texts: str, probability: float = 0.5) -> dict[str, Any]:
    completions = [{"text": text, "probability": probability} for text in texts]
    return {"completions": completions, "tokens": 1, "truncated": False, "late": False}
