"""gptcli in this process, as most of its tests run it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptcli.cli import main


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
