"""Files that are asked for before they are touched."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from gptcli.core import checkpoint, files
from gptcli.core.build import open_model
from gptcli.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system can't be asked")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where the system is asked to read, and how far; it is asked all the same."""
    found = []
    real = os.posix_fadvise

    def ask(handle: int, start: int, size: int, advice: int) -> None:
        found.append((start, size))
        real(handle, start, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", ask)
    return found


def done() -> None:
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and "_read_ahead" in thread.name:
            thread.join(60)


def test_all_of_every_file_is_asked_for(
    asked: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_AHEAD", 1000)
    for name, size in (("one", 2500), ("two", 10)):
        (tmp_path / name).write_bytes(b"x" * size)
    files.read_ahead([tmp_path / "one", tmp_path / "missing", tmp_path / "two"])
    done()
    assert asked == [(0, 1000), (1000, 1000), (2000, 1000), (0, 1000)]


def test_a_large_model_is_read_ahead(
    asked: list[tuple[int, int]], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    open_model(tiny_folder, tokenizer, device="cpu")
    done()
    assert not asked  # it is small
    monkeypatch.setattr(checkpoint, "_WORTH_AHEAD", 0)
    open_model(tiny_folder, tokenizer, device="cpu")
    done()
    assert asked
