"""``gptcli shell-init``, and what a shell completes of gptcli's own command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.serve.place import Place, runtime_folder
from tests.cli.conftest import Run
from tests.conftest import Gptcli


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_what_is_asked_stands_in_the_script(run: Run, tiny_folder: Path, shell: str) -> None:
    done = run("shell-init", shell, "-m", tiny_folder, "--num", "7", "--min-prob", "0.25", "--key", "ctrl-g")
    assert done.code == 0
    text = done.out.decode()
    assert str(Place.of(runtime_folder(), tiny_folder).socket) in text
    assert "0.25" in text
    assert "gptcli-unload" in text
    assert run("shell-init", shell, "-m", tiny_folder, "--json").json["script"].startswith("# gptcli at")


def test_the_key_says_what_would_warm_the_model(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my model"
    folder.symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    named = run("shell-init", "fish", "-m", "my model").out.decode()
    assert f"the model is not warm; gptcli serve -m {tiny_folder} starts it" in named
    monkeypatch.delenv("GPTCLI_MODEL", raising=False)
    assert "gptcli: no model is warm; gptcli serve starts one" in run("shell-init", "zsh").out.decode()
    assert "gptcli serve -m fable starts it" in run("shell-init", "bash", "-m", "fable").out.decode()


@pytest.mark.parametrize("shell", ["zsh", "bash", "fish"])
def test_json_has_the_plain_path_of_the_socket(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    """Only the script needs the shell's quotes."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "a folder"))
    (tmp_path / "a folder").mkdir(mode=0o700)
    told = run("shell-init", shell, "-m", tiny_folder, "--json").json
    assert told.keys() == {"shell", "key", "socket", "script"}
    assert told["socket"] == str(Place.of(runtime_folder(), tiny_folder).socket)
    assert " " in told["socket"]
    assert f"'{told['socket']}'" in told["script"]


@pytest.mark.parametrize(
    "options",
    [("sh",), ("bash", "--ghost"), ("zsh", "--key", "F12"), ("zsh", "--key", "ctrl-c"), ("zsh", "--deadline", "soon")],
)
def test_wrong_use_is_told(run: Run, options: tuple[str, ...]) -> None:
    done = run("shell-init", *options)
    assert done.code == 2
    assert done.out == b""


def completed(gptcli: Gptcli, *words: str) -> list[str]:
    """What bash would offer for the last word."""
    env = {
        "_GPTCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["gptcli", *words]),
        "COMP_CWORD": str(len(words)),
    }
    return gptcli(env=env).stdout.decode().split()


def test_models_and_options_are_completed(gptcli: Gptcli, tiny_folder: Path) -> None:
    assert completed(gptcli, "generate", "-m", "fa") == ["fable"]
    assert "--max-tokens" in completed(gptcli, "generate", "--max")
    assert completed(gptcli, "models", "show", f"{tiny_folder.parent}/ti") == [str(tiny_folder)]
    assert "generate" in completed(gptcli, "gen")
