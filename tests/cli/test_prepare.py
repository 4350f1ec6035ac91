"""``gptcli models prepare``: builds, checks, tells; and what was built is used."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.caches import native_cache
from gptcli.core import native
from tests.cli.conftest import Run


@pytest.fixture
def prepared(built: Path) -> Path:
    """The cache of this test's user, with the library in it."""
    shutil.copytree(built, native_cache())
    return native_cache()


def test_prepare_tells_what_was_built_and_checked(run: Run, tiny_folder: Path, prepared: Path) -> None:
    done = run("models", "prepare", tiny_folder, "--json", "--threads", "1")
    assert (done.code, done.err) == (0, b"")
    value = done.json
    (file,) = prepared.iterdir()
    assert value["library"] == str(file)
    assert value["build_seconds"] is None
    assert (value["model"], value["device"], value["dtype"]) == ("tiny", "cpu", "float32")
    assert value["threads"] == 1
    assert value["ok"] is True
    assert 0 < value["difference"] < value["limit"] == 1e-4
    weights = 300 * 32 + 2 * 12 * 32 * 32
    assert 4 * weights < value["packed_bytes"] < 5 * weights
    shown = run("models", "prepare", tiny_folder).out.decode()
    assert str(file) in shown
    assert "was there" in shown


def test_prepare_builds_what_is_not_there(run: Run, tiny_folder: Path, built: Path) -> None:
    """In a cache that does not exist yet; readable and writable by its owner alone."""
    value = run("models", "prepare", tiny_folder, "--json").json
    assert value["build_seconds"] > 0
    assert Path(value["library"]).parent == native_cache()
    assert native_cache().stat().st_mode & 0o077 == 0
    assert [file.name for file in native_cache().iterdir()] == [Path(value["library"]).name]


def test_what_was_prepared_is_used_and_verbose_says_so(run: Run, tiny_folder: Path, prepared: Path) -> None:
    asked: tuple[Any, ...] = ("generate", "Once", "-m", tiny_folder, "-n", "40", "--seed", "3", "--ignore-eos")
    ours = run(*asked, "-v")
    assert b"native step" in ours.err
    assert str(prepared).encode() in ours.err
    shutil.rmtree(prepared)
    theirs = run(*asked, "-v")
    assert b"PyTorch step" in theirs.err
    assert b"models prepare" in theirs.err
    assert ours.out == theirs.out != b""
    assert run(*asked).err == b""  # absent without a word


def test_a_short_answer_does_not_look_for_it(run: Run, tiny_folder: Path, prepared: Path) -> None:
    done = run("generate", "Once", "-m", tiny_folder, "-n", "2", "--seed", "3", "-v")
    assert b"PyTorch step: for 2 tokens" in done.err


@pytest.mark.parametrize("as_json", [False, True])
def test_a_step_that_computes_something_else_is_deleted(
    run: Run, tiny_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    step = native.NativeStep.step
    monkeypatch.setattr(native.NativeStep, "step", lambda self, *args: step(self, *args) * 1.01)
    done = run("models", "prepare", tiny_folder, *(["--json"] if as_json else []))
    assert done.code == 6
    assert b"differs" in done.err
    assert list(prepared.iterdir()) == []
    if as_json:
        assert done.json["ok"] is False


def test_without_a_compiler(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", os.devnull)
    done = run("models", "prepare", tiny_folder)
    assert done.code == 5
    assert b"there is no C++ compiler here" in done.err
    assert b"hint: install g++" in done.err


def test_a_model_that_is_not_there(run: Run) -> None:
    assert run("models", "prepare", "no/such--model").code == 3
