"""``gptcli edit`` where it can't or won't begin: what it refuses, and how it says so."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "wrong",
    [
        ("--min-prob", "2"),
        ("--min-prob", "nan"),
        ("--max-tokens", "0"),
        ("--until", "page"),
        ("--delay", "soon"),
        ("--deadline", "0ms"),
        ("--quantize", "int2"),
    ],
)
def test_wrong_values_are_refused(run: Run, wrong: tuple[str, str]) -> None:
    done = run("edit", *wrong)
    assert (done.code, done.out) == (2, b"")
    assert wrong[0].encode() in done.err


def test_a_file_begins_with_itself(run: Run, tmp_path: Path) -> None:
    done = run("edit", tmp_path / "story.txt", "--initial", "Once")
    assert done.code == 2
    assert b"--initial is for a prompt line" in done.err


def test_without_a_terminal_it_says_what_to_do(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")
    for more in ([], [str(tmp_path / "new.txt")]):
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", "edit", "-m", str(tiny_folder), *more],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PYTHONPATH": str(ROOT), "TERM": "xterm", "HOME": str(tmp_path)},
            start_new_session=True,  # without the terminal of whoever runs the tests
            timeout=300,
        )
        assert (done.returncode, done.stdout) == (2, b"")
        assert b"there is no terminal to type at" in done.stderr
        assert b"gptcli complete" in done.stderr
    assert not (tmp_path / "new.txt").exists()


def test_on_a_terminal_that_can_do_nothing_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")
    monkeypatch.setenv("TERM", "dumb")
    done = run("edit")
    assert done.code == 2
    assert b"TERM is dumb" in done.err


def test_without_prompt_toolkit_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run("edit")
    assert done.code == 3
    assert b"pip install 'gptcli[edit]'" in done.err


def test_a_model_that_is_not_there_is_told_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit", reason="edit needs the extra 'edit'")
    monkeypatch.setenv("TERM", "xterm")
    done = run("edit", "-m", "no-such-model")
    assert done.code == 3
    assert b"no-such-model" in done.err


def test_a_file_that_is_no_text_is_told_with_the_offset(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    done = run("edit", tmp_path / "bad.txt", "--json")
    assert (done.code, done.out) == (3, b"")
    told = json.loads(done.err)["error"]
    assert told["type"] == "corrupt"
    assert "byte 0xff at offset 3" in told["message"]
    assert told["hint"]


def test_a_pipe_that_is_no_text_is_told_with_the_offset(run: Run) -> None:
    done = run("edit", stdin=b"ab\xff")
    assert done.code == 3
    assert b"offset 2" in done.err


def test_a_folder_is_no_file(run: Run, tmp_path: Path) -> None:
    done = run("edit", tmp_path)
    assert done.code == 2
    assert b"is a folder" in done.err
