"""Settings that several commands could take: each is for the command that it fits, and actions have none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.cli import COMMANDS, leaves
from gptcli.cli.settings import is_for_another, is_setting, name_of, variable_of
from tests.cli.conftest import Run


def is_passed_over(command: str, name: str, value: object) -> bool:
    (leaf,) = leaves(command, COMMANDS[command])
    (param,) = (param for param in leaf.params if name_of(param) == name)
    return is_for_another(leaf, param, value)


@pytest.mark.parametrize(
    ("command", "name", "value", "passed_over"),
    [
        ("train", "keep", "tail", True),  # tokenize's
        ("tokenize", "keep", "tail", False),
        ("tokenize", "keep", "3", True),  # train's
        ("tokenize", "keep", 3, True),
        ("train", "keep", 3, False),
        ("train", "keep", "0", False),  # fits neither, so it is told
        ("tokenize", "keep", "tial", False),
        ("generate", "batch", "1,8", True),  # bench's, though it might be a file
        ("generate", "batch", 8, True),
        ("bench", "batch", "1,8", False),
        ("bench", "batch", "prompts.jsonl", True),
        ("generate", "batch", "prompts.jsonl", False),
        ("generate", "format", "csv", True),
        ("count-params", "format", "csv", False),
        ("count-params", "format", "text", True),
        ("generate", "format", "cvs", False),
        ("generate", "temperature", "0.2,1", True),  # predict's
        ("predict", "temperature", "0.2,1", False),
        ("predict", "temperature", "0.5", False),
        ("generate", "temperature", 0.5, False),
        ("predict", "temperature", 0.5, False),
        ("generate", "max_tokens", "many", False),
        ("generate", "stop", ".", False),
        ("generate", "stop", "1", False),  # serve's is none
        ("chat", "system", "7", False),
        ("generate", "quantize", "int3", False),
    ],
)
def test_a_value_is_for_the_command_that_it_fits(command: str, name: str, value: object, passed_over: bool) -> None:
    assert is_passed_over(command, name, value) == passed_over


def test_what_has_to_be_typed_is_listed() -> None:
    """Every option of every command is a setting, but for these: think before this list grows or shrinks."""
    no_settings = {
        f"{command} {name_of(param)}"
        for command, entry in COMMANDS.items()
        for leaf in leaves(command, entry)
        for param in leaf.params
        if not is_setting(param)
    }
    assert no_settings == {
        "serve status",
        "serve stop",
        "serve ready_fd",
        "complete widget",
        "models force",  # export's; that of pull is a setting
    }


def test_the_variable_of_a_setting_is_its_option() -> None:
    for command, entry in COMMANDS.items():
        for leaf in leaves(command, entry):
            for param in leaf.params:
                if param.param_type_name == "option":
                    assert param.envvar == (variable_of(param) if is_setting(param) else None)
                    assert f"--{variable_of(param)[len('GPTCLI_') :].lower().replace('_', '-')}" in param.opts


def test_actions_are_not_in_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (".", "1"):
        monkeypatch.setenv("GPTCLI_STOP", value)
        done = run("serve", "--status")
        assert (done.code, b"no model is warm" in done.err) == (3, True), done.err
    monkeypatch.setenv("GPTCLI_STATUS", "1")
    monkeypatch.setenv("GPTCLI_READY_FD", "1")
    done = run("serve", "--http", "nonsense")  # the server's own first check: it was about to start
    assert (done.code, b"--http" in done.err) == (2, True), done.err


def test_actions_are_not_in_the_file(run: Run, settings: Callable[[str], Path], tiny_folder: Path) -> None:
    settings("stop = '.'\n")  # generate's
    assert b"no model is warm" in run("serve", "--status").err
    assert run("generate", "a", "-m", tiny_folder, "-n", "1").code == 0
    for text in ("[serve]\nstop = true\n", "status = true\n"):
        settings(text)
        done = run("serve")
        assert done.code == 2
        assert b"has to be typed" in done.err
        assert b"type --st" in done.err


def test_what_is_for_another_command_is_passed_over(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: Callable[[str], Path]
) -> None:
    cut = ("tokenize", "-m", tiny_folder, "--truncate", "1", "Once upon")
    head, tail = run(*cut), run(*cut, "--keep", "tail")
    assert head.out != tail.out
    monkeypatch.setenv("GPTCLI_KEEP", "3")
    assert run(*cut) == head
    assert b"GPTCLI_KEEP is for another command" in run(*cut, "-v").err
    monkeypatch.setenv("GPTCLI_KEEP", "tail")
    assert run(*cut) == tail
    monkeypatch.setenv("GPTCLI_KEEP", "tial")
    assert run(*cut).code == 2
    monkeypatch.delenv("GPTCLI_KEEP")
    settings("keep = 3\nformat = 'csv'\n")
    assert run(*cut) == head
    assert run("count-params", "gpt2").out.startswith(b"model,")
    settings("keep = 3\n[tokenize]\nkeep = 'tail'\n")
    assert run(*cut) == tail


def test_a_table_is_strict(run: Run, settings: Callable[[str], Path], tiny_folder: Path) -> None:
    settings("[tokenize]\nkeep = 3\n")
    done = run("tokenize", "-m", tiny_folder, "--truncate", "1", "Once upon")
    assert (done.code, b"keep" in done.err) == (2, True), done.err


def test_a_flag_is_never_passed_over(run: Run) -> None:
    assert run("tokenize", "--truncate", "1", "--keep", "3", "x").code == 2
    assert run("models", "list", "--format", "csv").code == 2


def test_names_in_the_file_are_those_of_the_options(
    run: Run, settings: Callable[[str], Path], tiny_folder: Path, tmp_path: Path
) -> None:
    settings("[tokenize]\nmax = 1\n")
    assert run("tokenize", "-m", tiny_folder, "Once upon").code == 4
    settings(f"[models]\noutput = '{tmp_path / 'out'}'\nto = 'hf'\nforce = true\n")  # force: pull's
    assert run("models", "export", tiny_folder).code == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert run("models", "export", tiny_folder).code != 0  # is there, and --force was not typed
    assert run("models", "export", tiny_folder, "--force").code == 0


def test_numbers_in_the_file_may_be_text_for_an_option(
    run: Run, settings: Callable[[str], Path], tiny_folder: Path
) -> None:
    settings("temperature = 0.5\n")
    assert run("predict", "a", "-m", tiny_folder, "--json").json["temperature"] == 0.5
    settings("[bench]\nbatch = 1000000\n")
    done = run("bench", "-m", tiny_folder)
    assert (done.code, b"'1000000'" in done.err) == (2, True), done.err


def test_cards_for_a_plan_are_none_of_a_run(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCLI_GPUS", "2x80GB")
    done = run("score", "a b", "-m", tiny_folder, "--json")
    assert (done.code, "total_bits" in done.json) == (0, True), done.err
    assert b"2 cards of 80 GB" in run("generate", "-m", tiny_folder, "--plan").out
    assert run("score", "a b", "-m", tiny_folder, "--gpus", "2x80GB").code == 2


def test_a_common_option_costs_no_loading_of_all_commands(run: Run, tiny_folder: Path) -> None:
    import subprocess

    script = (
        "import sys; from gptcli.cli import main; main(['tokenize', 'a']);"
        "print([name for name in ('train', 'bench', 'serve') if f'gptcli.cli.{name}' in sys.modules])"
    )
    env = {**os.environ, "GPTCLI_MODEL": str(tiny_folder), "GPTCLI_MAX": "5", "GPTCLI_COLOR": "never"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
