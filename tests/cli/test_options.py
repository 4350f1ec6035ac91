"""Where an option's value comes from: the flag, then the environment, then config.toml, then the default."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.cli.options import choice
from gptcli.errors import UsageError
from tests.cli.conftest import Done, Run


@pytest.fixture
def generate(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``gptcli generate`` in JSON; the tiny model comes from the environment."""
    monkeypatch.setenv("GPTCLI_MODEL", str(tiny_folder))
    return lambda *args, **more: run("generate", "Once", "--json", "--seed", "1", *args, **more)


def made(done: Done) -> int:
    """How many tokens were made; none of these runs ends of itself."""
    assert done.code == 0, done.err
    return done.json["usage"]["completion_tokens"]


def test_flag_beats_environment_beats_file_beats_default(
    generate: Run, settings: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = ("--ignore-eos", "--slide")
    assert made(generate(*forever)) == 128
    settings("max_tokens = 5\n")
    assert made(generate(*forever)) == 5
    settings("max_tokens = 5\n[generate]\nmax-tokens = 4\n[tokenize]\ncount = true\n")
    assert made(generate(*forever)) == 4
    monkeypatch.setenv("GPTCLI_MAX_TOKENS", "3")
    assert made(generate(*forever)) == 3
    assert made(generate(*forever, "-n", "2")) == 2


def test_every_option_is_in_the_environment(generate: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = generate("-n", "5", "-t", "0").json["tokens"]
    assert generate("-n", "5").json["tokens"] != greedy
    monkeypatch.setenv("GPTCLI_TEMPERATURE", "0")
    assert generate("-n", "5").json["tokens"] == greedy
    monkeypatch.setenv("GPTCLI_LOGPROBS", "2")
    assert len(generate("-n", "5").json["logprobs"]) == 5
    monkeypatch.setenv("GPTCLI_NUM_SAMPLES", "2")
    assert len(generate("-n", "5").out.splitlines()) == 2
    monkeypatch.setenv("GPTCLI_JSON", "1")
    assert run("tokenize", "a").json["count"] == 1


def test_options_of_every_command_are_in_the_environment(
    generate: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_COLOR", "always")
    assert b"\x1b[" in run("models", "show", os.environ["GPTCLI_MODEL"]).out
    monkeypatch.setenv("GPTCLI_COLOR", "sometimes")
    assert run("count-params", "gpt2").code == 2


def test_a_bad_value_in_the_environment_is_wrong_use(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCLI_MAX_TOKENS", "many")
    done = generate()
    assert (done.code, done.out) == (2, b"")
    assert json.loads(done.err)["error"]["type"] == "usage"


def test_the_model_may_be_named_in_the_file(run: Run, settings: Callable[[str], Path], tiny_folder: Path) -> None:
    settings(f"model = {json.dumps(str(tiny_folder))}\n")
    assert run("tokenize", "a", "--json").json["tokenizer"] == "tiny"
    # Commands that have no such option are not troubled by it.
    assert run("count-params", "gpt2", "--json").code == 0
    assert run("models", "list").code == 0


def test_a_key_at_the_top_is_for_every_command(run: Run, settings: Callable[[str], Path], tiny_folder: Path) -> None:
    settings("json = true\n")
    assert run("tokenize", "-m", tiny_folder, "a").json["count"] == 1
    assert run("count-params", "gpt2").json["model"] == "gpt2"
    assert run("models", "show", tiny_folder).json["name"] == "tiny"


def test_a_table_is_for_its_command(run: Run, settings: Callable[[str], Path], tiny_folder: Path) -> None:
    settings("[count-params]\njson = true\n[tokenize]\ncount = true\n")
    assert run("count-params", "gpt2").json["model"] == "gpt2"
    assert run("tokenize", "-m", tiny_folder, "a").out == b"1\n"
    settings("[count-params]\nformat = 'csv'\n")
    assert run("count-params", "gpt2").out.startswith(b"model,")
    assert run("count-params", "gpt2", "--format", "json").json["model"] == "gpt2"


def test_a_list_in_the_file(generate: Run, settings: Callable[[str], Path]) -> None:
    settings('[generate]\nlogit_bias = ["77:1000"]\ntemperature = 0\nmax_tokens = 2\n')
    assert generate().json["tokens"] == [77, 77]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[generate]\ntemprature = 1\n", "temprature"),
        ("temprature = 1\n", "temprature"),
        ("[genrate]\ntemperature = 1\n", "genrate"),
        ("[generate]\ntop_k = 'many'\n", "top-k"),
        ("this is no TOML\n", "config.toml"),
        ("color = 'sometimes'\n", "sometimes"),
    ],
)
def test_what_is_wrong_in_the_file_is_wrong_use(
    generate: Run, settings: Callable[[str], Path], text: str, named: str
) -> None:
    settings(text)
    done = generate("-n", "1")
    assert (done.code, done.out) == (2, b"")
    assert named in json.loads(done.err)["error"]["message"]


def test_what_is_not_utf8_in_the_file_is_wrong_use(generate: Run, settings: Callable[[str], Path]) -> None:
    settings("").write_bytes(b"model = '\xff'\n")
    assert generate("-n", "1").code == 2


@pytest.mark.parametrize("command", ["generate", "tokenize", "train", "count-params", "models list", "models verify"])
def test_every_command_has_the_options_of_every_command(run: Run, command: str) -> None:
    help_text = run(*command.split(), "--help").out.decode()
    for option in ("--json", "--quiet", "-q", "--verbose", "-v", "--color", "--format", "--help", "-h"):
        assert option in help_text


def test_the_many_options_of_train_stand_under_headings(run: Run) -> None:
    shown = run("train", "--help").out.decode()
    headings = re.findall(r"^(\w[\w ]*):$", shown, flags=re.MULTILINE)
    groups = ["Run", "Data", "Model", "Length and schedule", "Evaluate and save", "Machine"]
    assert headings == ["Arguments", *groups, "Every command"]
    # What has no heading of its own is what every command has, each option once.
    every = run("models", "list", "--help").out.decode()
    assert options_in(shown.split("Every command:")[1]) == options_in(every)
    listed = options_in(shown.split("Arguments:")[1])
    assert len(listed) == len(set(listed))
    begins = {
        line.find(told) for line in shown.splitlines() for told in ("The model folder", "CPU threads") if told in line
    }
    assert len(begins) == 1


def options_in(shown: str) -> list[str]:
    return re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, flags=re.MULTILINE)


def test_choice() -> None:
    assert choice("--keep", "head", ("head", "tail")) == "head"
    with pytest.raises(UsageError, match="'middle'") as error:
        choice("--keep", "middle", ("head", "tail"))
    assert error.value.hint == "use head, tail"


def test_a_flag_beats_another_option_from_the_environment(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-e`` and ``-m`` name the same thing, and so do ``--json`` and ``--format``."""
    monkeypatch.setenv("GPTCLI_ENCODING", "no-such-encoding")
    monkeypatch.setenv("GPTCLI_JSON", "1")
    done = run("tokenize", "--count", "a", "-m", tiny_folder, "--format", "text")
    assert (done.code, done.out) == (0, b"1\n")
    monkeypatch.setenv("GPTCLI_FORMAT", "text")
    monkeypatch.delenv("GPTCLI_JSON")
    assert run("tokenize", "--count", "a", "-m", tiny_folder, "--json").json["count"] == 1
    monkeypatch.setenv("GPTCLI_MODEL", str(tiny_folder))
    assert run("tokenize", "--count", "a").code == 2  # both from the environment: nobody can tell
