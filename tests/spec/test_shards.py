"""Many shards: counted through their headers alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli import main
from gptcli.spec.match import match_folder
from gptcli.spec.params import count_params
from gptcli.spec.presets import read_preset
from tests.spec.shards import hollow_folder

SHARDS = 100


class Counting(io.FileIO):
    """A file that adds up what is read of it, by the system call, and says where."""

    read_bytes = 0
    furthest = 0

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        size = super().readinto(buffer) or 0
        Counting.read_bytes += size
        Counting.furthest = max(Counting.furthest, start + size)
        return size

    def readall(self) -> bytes:
        raise AssertionError("a whole file was read")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    """Every safetensors file is opened as a ``Counting`` one."""
    plain = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.suffix != ".safetensors" or mode != "rb":
            return plain(self, mode, *args, **kwargs)
        return io.BufferedReader(Counting(self), 512)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Counting, "read_bytes", 0)
    monkeypatch.setattr(Counting, "furthest", 0)
    return Counting


def test_of_a_hundred_shards_only_headers_are_read(tmp_path: Path, counted: type[Counting]) -> None:
    config = read_preset("gpt3-13b")
    headers = hollow_folder(tmp_path / "many", config, SHARDS)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == SHARDS
    assert sum(file.stat().st_size for file in files) > 25e9
    matched = match_folder(tmp_path / "many", config)
    assert sum(info.parameters for _, info in matched.values()) == count_params(config).total_stored
    # A buffer's worth at most beyond each header.
    assert headers <= counted.read_bytes <= headers + 512 * SHARDS
    assert counted.furthest < 5_000


def test_the_command_counts_them_as_the_preset(tmp_path: Path, capfdbinary: Any) -> None:
    hollow_folder(tmp_path / "many", read_preset("gpt3"), SHARDS)
    assert main(["count-params", str(tmp_path / "many"), "gpt3", "--json"]) == 0
    many, preset = (json.loads(line) for line in capfdbinary.readouterr().out.splitlines())
    assert many["model"] == "many"
    assert {**many, "model": "", "config": {}} == {**preset, "model": "", "config": {}}
    assert main(["count-params", "gpt3", "--check", str(tmp_path / "many"), "--json"]) == 0
    assert json.loads(capfdbinary.readouterr().out)["tensors"] == 96 * 12 + 4
