"""What a review of the commands found once: a folder ruined by a failed run, smuggled escapes, lost answers."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli.spec.index import FILE_NAME
from tests.cli.conftest import Run
from tests.conftest import PATIENCE, ROOT, tiny_tokenizer

SIZE = (
    "--layers",
    "1",
    "--width",
    "16",
    "--context",
    "16",
    "--batch-tokens",
    "32",
    "--steps",
    "2",
    "--dtype",
    "float32",
)


def sums(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_a_forced_run_that_fails_leaves_the_old_model_alone(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    story, short = tmp_path / "story.txt", tmp_path / "short.txt"
    story.write_text("Once upon a time there was a king. " * 300)
    short.write_text("Once.")
    out = tmp_path / "out"
    assert run("train", story, "-o", out, "--vocab-size", "280", *SIZE).code == 0
    before = sums(out)
    assert run("train", short, "-o", out, "--force", "--tokenizer", tiny_folder, *SIZE).code == 2
    assert sums(out) == before
    assert run("train", short, "-o", tmp_path / "new", "--tokenizer", tiny_folder, *SIZE).code == 2
    assert not list((tmp_path / "new").iterdir())


def test_another_kind_of_tokenizer_replaces_the_old_one(run: Run, tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time there was a king. " * 300)
    raw = json.loads(tiny_tokenizer())["model"]
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (other / "merges.txt").write_text("\n".join(" ".join(merge) for merge in raw["merges"]))
    assert run("train", story, "-o", out, "--vocab-size", "270", *SIZE).code == 0
    assert run("train", story, "-o", out, "--force", "--tokenizer", other, *SIZE).code == 0
    assert json.loads((out / "config.json").read_bytes())["vocab_size"] == 300
    assert not (out / "tokenizer.json").exists()
    assert run("models", "verify", out).code == 0


def test_one_long_document_is_evaluated_on_its_end(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Once upon a time there was a king who had a daughter. " * 400)
    done = run("train", book, "-o", tmp_path / "out", "--tokenizer", tiny_folder, "--json", *SIZE)
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [event["valid"].keys() for event in events if event["event"] == "eval"] == [{"held out": 0}.keys()]
    assert b"the end of the text is held out" in done.err
    assert run("train", book, "-o", tmp_path / "half", "--dtype", "float16").code == 2


@pytest.mark.parametrize("more", [["--json"], ["--no-stream"], ["--num-samples", "2"]])
def test_ctrl_c_keeps_what_was_made(tiny_folder: Path, more: list[str]) -> None:
    """The signal goes out when the first note past the context shows that there is text."""
    command = ["generate", "Once", "-m", str(tiny_folder), "-n", "-1", "--slide", "--ignore-eos", "--seed", "1", *more]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stderr is not None
    assert b"past the context" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if "--json" in more:
        value = json.loads(out)
        assert value["finish_reason"] is None
        assert len(value["tokens"]) == value["usage"]["completion_tokens"] > 30
    else:
        assert len(out) > 30


def on_terminal(*args: str | Path, env: dict[str, str] | None = None) -> bytes:
    """What a command shows on a terminal, stdout and stderr together."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "gptcli", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **(env or {})}
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                block = os.read(leader, 1 << 16)
            except OSError:  # how Linux says that the other side has closed
                break
            if not block:
                break
            shown += block
        process.wait(timeout=PATIENCE)
    os.close(leader)
    return shown


def test_names_from_outside_can_not_move_the_cursor(tmp_path: Path, tiny_folder: Path) -> None:
    evil = "\x1b[2J\x1b]0;pwn\x07"
    repo = tmp_path / "hub" / "models--o--m"
    folder = repo / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    save_file(load_file(tiny_folder / FILE_NAME) | {evil: torch.zeros(1)}, folder / FILE_NAME)
    listed = on_terminal("models", "list", env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert b"\\x1b[2J" in listed
    assert b"\x1b[2J" not in listed
    assert b"\x07" not in listed
    for file in tiny_folder.iterdir():
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "a\x1b[2Jb.txt").write_text("")
    assert b"\x1b[2J" not in on_terminal("models", "show", tmp_path / "m")


def test_notes_stand_above_the_progress_bar(tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a king. " * 300)
    more = ("--tokenizer", tiny_folder, "--valid", text, "--eval-every", "1", "--seed", "1")
    shown = on_terminal("train", text, "-o", tmp_path / "out", *more, *SIZE)
    assert b"bits per byte" in shown  # how often it is drawn is up to the clock
    assert b"tokens to train on" in shown
    for line in shown.replace(b"\r", b"\n").split(b"\n"):
        assert not (b"tokens/s" in line and b"note:" in line)


def test_the_model_of_the_environment_counts_where_it_is_an_argument(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_MODEL", str(tiny_folder))
    assert run("count-params", "--json").json["config"]["vocab_size"] == 300
    assert run("models", "show", "--json").json["config"]["vocab_size"] == 300
    assert run("count-params", "gpt2", "--json").json["config"]["vocab_size"] == 50257
    monkeypatch.setenv("GPTCLI_MODEL", "no-such-model")
    assert run("models", "verify").code == 3
    assert run("count-params", "-m", tiny_folder, "--json").json["config"]["vocab_size"] == 300


def test_a_model_that_transformers_cached_by_its_short_name(
    run: Run, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--gpt2" / "snapshots" / "1"
    folder.mkdir(parents=True)
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert run("models", "show", "gpt2", "--json").json["folder"] == str(folder)
    assert b"\ngpt2 " in run("models", "list").out
    astray = run("models", "show", "./nope")
    assert astray.code == 3
    assert b"hf download" not in astray.err


def test_one_value_from_the_environment_or_the_settings_is_one(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = ("generate", "Once", "-m", tiny_folder, "-n", "60", "--seed", "4", "--json", "--dtype", "float32")
    whole = run(*args).json["text"]
    stop = next(whole[i : i + 3] for i in range(5, len(whole) - 3) if " " in whole[i : i + 3])
    wanted = run(*args, "--stop", stop).json
    assert wanted["finish_reason"] == "stop"
    monkeypatch.setenv("GPTCLI_STOP", stop)
    assert run(*args).json["text"] == wanted["text"]
    monkeypatch.delenv("GPTCLI_STOP")
    settings = tmp_path / "config" / "gptcli"
    settings.mkdir(parents=True)
    (settings / "config.toml").write_text(f"[generate]\nstop = {json.dumps(stop)}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(settings.parent))
    if sys.platform != "darwin":
        assert run(*args).json["text"] == wanted["text"]


def test_damaged_weights_are_told(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = load_file(tiny_folder / FILE_NAME)
    tensors["transformer.ln_f.weight"] = torch.full_like(tensors["transformer.ln_f.weight"], float("nan"))
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / FILE_NAME)
    done = run("generate", "Once", "-m", tmp_path, "-n", "3")
    assert (done.code, done.out) == (3, b"")
    assert b"not finite" in done.err


def test_a_number_that_is_no_id(run: Run, tiny_folder: Path) -> None:
    assert run("tokenize", "--decode", "9" * 5000, "-m", tiny_folder).code == 3


def test_a_file_that_is_not_there_is_counted_as_text_and_said(run: Run, tiny_folder: Path) -> None:
    done = run("tokenize", "--count", "no_such_file.txt", "-m", tiny_folder)
    assert done.code == 0
    assert b"no such file" in done.err
    assert run("tokenize", "--count", "Once upon", "-m", tiny_folder).err == b""


def test_only_the_named_command_is_loaded(tmp_path: Path) -> None:
    """However many commands there are, help pays for one; a config.toml does not change that."""
    (tmp_path / "gptcli").mkdir()
    (tmp_path / "gptcli" / "config.toml").write_text("temperature = 0.5\n[train]\nsteps = 3\n")
    code = (
        "import sys\nfrom gptcli.cli import main\nmain(sys.argv[1:])\n"
        "print(sorted(name for name in sys.modules if name.startswith('gptcli.cli.')), file=sys.stderr)"
    )
    for args, extra in (([], set()), (["generate"], {"generate", "input", "options", "placing", "ranks", "warm"})):
        done = subprocess.run(
            [sys.executable, "-c", code, *args, "--help"],
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(tmp_path)},
            check=True,
        )
        loaded = {name.removeprefix("gptcli.cli.") for name in json.loads(done.stderr.decode().replace("'", '"'))}
        assert loaded == {"out", "settings", "values"} | extra
