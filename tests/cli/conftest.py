"""gptcli in this process, as most of its tests run it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptcli.cli import main
from gptcli.train.data import Batches


class Done(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: bytes
    err: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A command line in this process: ``run("generate", "x", stdin=b"...")``; without ``stdin`` it is /dev/null."""

    def call(*args: str | Path, stdin: bytes | None = None) -> Done:
        source = Path(os.devnull)
        if stdin is not None:
            source = tmp_path / "stdin"
            source.write_bytes(stdin)
        with source.open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            code = main([str(arg) for arg in args])
        return Done(code, *capfdbinary.readouterr())

    return call


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write config.toml into the user's config folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    if sys.platform == "darwin":
        monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ("Library/Application Support" if sys.platform == "darwin" else "config") / "gptcli"
    folder.mkdir(parents=True)

    def write(text: str) -> Path:
        (folder / "config.toml").write_text(text)
        return folder / "config.toml"

    return write


SIZE = ("--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-tokens", "64")
_OWN_SIZE = {"--config", "--preset", "--init-from"}
_OWN_TOKENIZER = {"--tokenizer", "--vocab-size", "--init-from"}


@pytest.fixture
def train(run: Run, tmp_path: Path, tiny_folder: Path) -> Run:
    """``gptcli train`` of a very small model into ``tmp_path/out``; all in JSON, ``quiet`` or not.

    A ``bare`` one is given no size and no tokenizer.
    """

    def call(*args: str | Path, bare: bool = False, quiet: bool = True, **more: Any) -> Done:
        fixed: list[str | Path] = ["--json", *(["-q"] if quiet else [])]
        fixed += [] if "-o" in args else ["-o", tmp_path / "out"]
        if not bare:
            fixed += [] if _OWN_TOKENIZER & set(args) else ["--tokenizer", tiny_folder]
            fixed += SIZE[-2:] if _OWN_SIZE & set(args) else SIZE
            fixed += ["--dtype", "float32"]
        return run("train", *fixed, *args, **more)

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of three documents."""
    from tests.cli.training import TEXT

    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Ctrl-C in the middle of the step behind so many whole ones; None: no more."""
    at = Batches.at

    def set_(step: int | None) -> None:
        def interrupting(self: Batches, number: int, *ranks: int) -> Any:
            if number - 1 == step:
                signal.raise_signal(signal.SIGINT)
            return at(self, number, *ranks)

        monkeypatch.setattr(Batches, "at", interrupting)

    return set_
