"""The native step's library: how it is built, found, and not trusted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gptcli.core import native_build, runtime
from gptcli.core.native_build import build, load
from gptcli.errors import CorruptError, NotFoundError, OutputError, ResourceError


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copied")
    return tmp_path / "copied"


def test_nothing_is_found_where_nothing_was_built(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not there"):
        with pytest.raises(NotFoundError, match="no native step") as error:
            load(folder)
        assert "models prepare" in error.value.hint


def test_what_was_built_is_not_built_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file: file.stat().st_mtime_ns for file in copied.iterdir()}
    library = build(copied)
    assert library.seconds is None
    assert {file: file.stat().st_mtime_ns for file in copied.iterdir()} == before


@pytest.mark.parametrize("what", ["cpu_features", "source", "flags"])
def test_another_cpu_source_or_flag_needs_another_library(
    copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str
) -> None:
    (file,) = copied.iterdir()
    if what == "cpu_features":
        monkeypatch.setattr(runtime, "cpu_features", lambda: "x86_64 fpu")
    elif what == "flags":
        monkeypatch.setattr(native_build, "flags", lambda: ("-O0",))
    else:
        newer = tmp_path / "step.cpp"
        newer.write_bytes(native_build.SOURCE.read_bytes() + b"\n")
        monkeypatch.setattr(native_build, "SOURCE", newer)
    with pytest.raises(NotFoundError):
        load(copied)
    # Nor is it taken under the other's name: what it was built for stands in it.
    file.rename(file.with_name(f"step-{native_build.key()}-{file.stem.rpartition('-')[2]}.so"))
    with pytest.raises(CorruptError, match="something else"):
        load(copied)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "text", "writable"])
def test_a_library_that_can_not_be_trusted_is_not_loaded(copied: Path, damage: str) -> None:
    (file,) = copied.iterdir()
    data = file.read_bytes()
    changed = {"cut": data[: len(data) // 2], "changed": data[:-9] + b"?" + data[-8:], "empty": b"", "text": b"no ELF"}
    if damage == "writable":
        file.chmod(0o777)
    else:
        file.write_bytes(changed[damage])
    with pytest.raises(CorruptError):
        load(copied)
    if damage == "text":  # under the name of its content
        file.rename(file.with_name(f"step-{native_build.key()}-{native_build._digest(file)}.so"))
        with pytest.raises(CorruptError, match="can't be loaded"):
            load(copied)


def fake_compiler(folder: Path, script: str) -> str:
    file = folder / "my-c++"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_without_a_compiler_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="no C\\+\\+ compiler") as error:
        build(tmp_path / "native")
    assert "g++" in error.value.hint
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(ResourceError, match="no-such-compiler"):
        build(tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_compilers_last_words_are_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        'if [ "$1" = --version ]; then echo "my c++ 1.0"; else echo "step.cpp:1: error: no such thing" >&2; exit 1; fi'
    )
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, said))
    with pytest.raises(ResourceError, match="no such thing"):
        build(tmp_path / "native")
    assert list((tmp_path / "native").iterdir()) == []


def test_a_compiler_that_makes_nonsense_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = """if [ "$1" = --version ]; then echo "my c++ 1.0"; exit; fi
while [ "$1" != -o ]; do shift; done; echo nonsense > "$2" """
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, said))
    with pytest.raises(CorruptError):
        build(tmp_path / "native")


def test_a_folder_that_can_not_be_written_is_told(tmp_path: Path, built: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        build(tmp_path / "file")
