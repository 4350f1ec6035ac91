"""What a shell is offered for the value of an option or argument that is being typed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.cli import COMMANDS, leaves
from gptcli.cli.values import choices_of
from tests.cli.conftest import Run
from tests.conftest import needs_encodings

Completed = Callable[..., list[str]]


@pytest.fixture
def completed(run: Run, monkeypatch: pytest.MonkeyPatch) -> Completed:
    """What bash is offered for the last of the words."""

    def ask(*words: str) -> list[str]:
        monkeypatch.setenv("_GPTCLI_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["gptcli", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        done = run()
        assert (done.code, done.err) == (0, b"")
        return done.out.decode().split()

    return ask


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("generate --quantize ", ["none", "int8", "int4"]),
        ("generate --quantize i", ["int8", "int4"]),
        ("generate x --color a", ["auto", "always"]),
        ("complete --until s", ["sentence"]),
        ("count-params gpt2 --format ", ["table", "json", "csv", "markdown"]),
        ("models list --format ", ["text", "json"]),
        ("tokenize --truncate 3 --keep ", ["head", "tail", "middle"]),
        ("models export --to g", ["gguf"]),
        ("shell-init ", ["zsh", "bash", "fish"]),
        ("shell-init f", ["fish"]),
        ("generate --truncate-prompt ", ["left"]),
        ("generate --device ", ["auto", "cpu", "cuda", "mps"]),
        ("train --device c", ["cpu", "cuda"]),
        ("generate --dtype b", ["bfloat16"]),
        ("train --dtype ", ["auto", "float32", "bfloat16"]),
        ("train --save-dtype ", ["float32", "bfloat16", "float16"]),
        ("models export --dtype b", ["bf16"]),
        ("count-params --dtype a", ["auto"]),
        ("train --optimizer m", ["muon"]),
        ("train --parallel f", ["fsdp"]),
        ("train --preset gpt2-", ["gpt2-medium", "gpt2-large", "gpt2-xl"]),
        ("generate --draft-model fa", ["fable"]),
        ("generate --draft-model n", ["none"]),
        ("train --init-from fa", ["fable"]),
        ("train --tokenizer fa", ["fable"]),
        ("models verify fa", ["fable"]),
        ("models export fa", ["fable"]),
        ("count-params fa", ["fable"]),
        ("bench -m fa", ["fable"]),
        ("generate --max-tokens ", []),  # a number
        ("generate ", []),  # a text, or the shell's files
        ("generate --file ", []),
        ("train --config ", []),
        ("help mod", ["models"]),
        ("help models ver", ["verify"]),
        ("hel", []),  # is no command
    ],
)
def test_values_are_offered(completed: Completed, line: str, offered: list[str]) -> None:
    assert completed(*line.split(" ")) == offered


@needs_encodings
def test_encodings_are_offered(completed: Completed) -> None:
    assert completed("tokenize", "-e", "o200k_b") == ["o200k_base"]


def test_folders_are_offered_where_a_model_is_wanted(completed: Completed, tiny_folder: Path) -> None:
    for line in (["train", "--init-from"], ["generate", "--draft-model"], ["models", "verify"]):
        assert completed(*line, f"{tiny_folder.parent}/ti") == [str(tiny_folder)]


def test_every_list_of_choices_is_offered(completed: Completed) -> None:
    asked = 0
    for command, entry in COMMANDS.items():
        for leaf in leaves(command, entry):
            path = [command] if leaf.name == command else [command, leaf.name]
            for param in leaf.params:
                if "|" in (param.metavar or ""):
                    assert choices_of(param) == tuple(param.metavar.split("|"))
                    if param.name not in ("format", "color"):  # every command has them
                        option = [max(param.opts, key=len)] if param.param_type_name == "option" else []
                        assert completed(*path, *option, "") == list(choices_of(param)), (path, option)
                        asked += 1
    assert asked >= 20


def test_values_are_offered_without_torch() -> None:
    script = """
import sys
from gptcli.cli import main
main([])
print({"torch", "numpy", "huggingface_hub"} & sys.modules.keys())
"""
    for words in ("generate --draft-model fa", "train --dtype b", "count-params fa"):
        env = {"_GPTCLI_COMPLETE": "complete_bash", "COMP_WORDS": f"gptcli {words}"}
        env |= {"COMP_CWORD": str(len(words.split()))}
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, check=True
        )
        assert len(done.stdout.splitlines()) == 2, done
        assert done.stdout.splitlines()[-1] == "set()"
