"""``gptcli models``: what is here, shipped or in the Hub's cache, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """A Hub cache that holds the tiny model as ``someone/tiny--model``, in the layout of huggingface_hub."""
    hub = tmp_path / "hub"
    repo = hub / "models--someone--tiny--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    (repo / "blobs").mkdir()
    add_snapshot(repo, "c0ffee", tiny_folder)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    return hub


def add_snapshot(repo: Path, revision: str, folder: Path) -> Path:
    """Files linked to blobs named by SHA-256 (weights) or git's SHA-1 (the rest)."""
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        (repo / "blobs" / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.fixture
def copy(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder of one's own with its sums."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


def change(file: Path) -> None:
    """Turn one bit of the last byte."""
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# --- list


def test_list_shows_what_the_hub_cache_holds(run: Run, cache: Path, tiny_folder: Path) -> None:
    done = run("models", "list", "--json")
    assert (done.code, done.err) == (0, b"")
    entries = [json.loads(line) for line in done.out.splitlines()]
    (entry,) = [entry for entry in entries if entry["source"] == "cache"]
    assert entry == {
        "name": "someone/tiny--model",
        "source": "cache",
        "folder": str(cache / "models--someone--tiny--model" / "snapshots" / "c0ffee"),
        "revision": "c0ffee",
        "bytes": (tiny_folder / "model.safetensors").stat().st_size,
        "family": "gpt2",
        "parameters": 300 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32,
        "dtype": "float32",
        "problem": None,
    }
    table = run("models", "list").out.decode()
    assert table.startswith("NAME")
    (row,) = [line for line in table.splitlines() if line.startswith("someone/tiny--model")]
    assert f"{entry['parameters']:,}" in row


def test_list_names_what_can_not_be_run_and_why(run: Run, cache: Path) -> None:
    snapshot = cache / "models--other--family" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "mamba"}')
    (snapshot / "model.safetensors").write_bytes(b"")
    entries = [json.loads(line) for line in run("models", "list", "--json").out.splitlines()]
    (entry,) = [entry for entry in entries if entry["name"] == "other/family"]
    assert "mamba" in entry["problem"]
    assert "state-space" in entry["problem"]
    assert str(cache) not in entry["problem"]
    assert all(other.keys() == entry.keys() for other in entries)
    assert (entry["family"], entry["parameters"], entry["dtype"]) == (None, None, None)
    assert b"mamba" in run("models", "list").out


def test_list_passes_over_what_is_no_model(run: Run, cache: Path) -> None:
    snapshot = cache / "models--only--tokenizer" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "datasets--some--data").mkdir()
    done = run("models", "list")
    assert done.code == 0
    assert b"only/tokenizer" not in done.out
    assert b"some/data" not in done.out


# --- A name in the cache


def test_the_main_revision_counts(run: Run, cache: Path, tiny_folder: Path) -> None:
    repo = cache / "models--someone--tiny--model"
    newer = add_snapshot(repo, "abcdef", tiny_folder)
    os.utime(newer, (4e9, 4e9))
    assert run("models", "show", "someone/tiny--model", "--json").json["folder"].endswith("c0ffee")
    (repo / "refs" / "main").unlink()
    assert run("models", "show", "someone/tiny--model", "--json").json["folder"].endswith("abcdef")


def test_a_cached_model_is_opened_by_its_name(run: Run, cache: Path) -> None:
    done = run("generate", "-m", "someone/tiny--model", "Once", "-n", "2", "--seed", "1", "--json")
    assert done.code == 0
    assert done.json["model"] == "someone/tiny--model"
    assert run("tokenize", "-m", "someone/tiny--model", "a", "--json").json["count"] == 1
    assert run("count-params", "someone/tiny--model", "--json").json["tied"] is True


def test_an_alias_is_the_hub_id(run: Run, cache: Path, tiny_folder: Path) -> None:
    done = run("models", "show", "gpt2")
    assert done.code == 3
    assert b"openai-community/gpt2" in done.err
    repo = cache / "models--openai-community--gpt2"
    (repo / "blobs").mkdir(parents=True)
    add_snapshot(repo, "1", tiny_folder)
    assert run("models", "show", "gpt2", "--json").json["name"] == "openai-community/gpt2"


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_cache_is_where_the_hub_library_has_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, variable: str, below: str
) -> None:
    snapshot = tmp_path / "place" / below / "models--a--b" / "snapshots" / "1"
    shutil.copytree(tiny_folder, snapshot)
    monkeypatch.setenv(variable, str(tmp_path / "place"))
    assert run("models", "show", "a/b", "--json").json["folder"] == str(snapshot)


# --- show


def test_show(run: Run, tiny_folder: Path) -> None:
    value = run("models", "show", tiny_folder, "--json").json
    assert value.keys() == {
        *("name", "source", "folder", "revision", "card", "config", "parameters", "dtype", "tokenizer", "bytes"),
        "files",
    }
    assert (value["name"], value["source"], value["dtype"]) == ("tiny", "folder", "float32")
    sizes = {file.name: file.stat().st_size for file in tiny_folder.iterdir()}
    assert {file["name"]: file["bytes"] for file in value["files"]} == sizes
    assert value["bytes"] == sum(sizes.values())
    assert value["config"]["context"] == 64
    text = run("models", "show", tiny_folder).out.decode()
    assert f"{value['parameters']:,}" in text
    assert all(name in text for name in sizes)


# --- verify


def test_verify_a_whole_folder(run: Run, tiny_folder: Path, copy: Path) -> None:
    plain = run("models", "verify", tiny_folder, "--json").json
    assert (plain["ok"], plain["hashed"]) == (True, [])
    value = run("models", "verify", copy, "--json").json
    assert value.keys() == {"name", "ok", "hashed", "tensors"}
    assert (value["name"], value["ok"]) == ("copy", True)
    assert sorted(value["hashed"]) == sorted(file.name for file in tiny_folder.iterdir())
    assert value["tensors"] == 2 + 2 * 12 + 2
    assert b"ok" in run("models", "verify", copy).out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_verify_finds_a_changed_file(run: Run, copy: Path, name: str) -> None:
    if name == "model.safetensors":
        change(copy / name)
    else:
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    done = run("models", "verify", copy, "--json")
    assert (done.code, done.out) == (6, b"")
    error = json.loads(done.err)["error"]
    assert error["type"] == "check"
    assert name in error["message"]


def test_verify_finds_a_missing_file_and_bad_sums(run: Run, copy: Path) -> None:
    (copy / "tokenizer.json").rename(copy / "elsewhere.json")
    assert run("models", "verify", copy).code == 6
    for sums in (b"nonsense\n", b"\xff\n"):
        (copy / "SHA256SUMS").write_bytes(sums)
        done = run("models", "verify", copy)
        assert done.code == 6
        assert b"SHA256SUMS" in done.err


def test_verify_reads_the_hashes_in_the_cache(run: Run, cache: Path, tiny_folder: Path) -> None:
    value = run("models", "verify", "someone/tiny--model", "--json").json
    assert sorted(value["hashed"]) == sorted(file.name for file in tiny_folder.iterdir())
    snapshot = cache / "models--someone--tiny--model" / "snapshots" / "c0ffee"
    for name in ("tokenizer.json", "model.safetensors"):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        change(blob)
        done = run("models", "verify", "someone/tiny--model")
        assert done.code == 6
        assert name.encode() in done.err
        blob.write_bytes(data)
    assert run("models", "verify", "someone/tiny--model").code == 0


def test_verify_looks_beyond_the_hashes(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    assert run("models", "verify", folder).code == 6
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{")
    assert run("models", "verify", folder).code == 6
    (folder / "tokenizer.json").unlink()
    assert run("models", "verify", folder).code == 6


def test_verify_lets_added_tokens_be_without_a_row(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    """A token for padding, as many a model has, that was added behind the rows there are."""
    folder = tmp_path / "padded"
    shutil.copytree(tiny_folder, folder)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    raw = json.loads((folder / "tokenizer.json").read_text())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    pad = {"id": rows, "content": "<pad>", "special": True}
    pad |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    (folder / "tokenizer.json").write_text(json.dumps({**raw, "added_tokens": [*raw["added_tokens"], pad]}))
    done = run("models", "verify", folder)
    assert done.code == 0
    assert b"no row" in done.err
    assert b"<pad>" in done.err
    assert run("generate", "--no-stdin", "the", "-m", folder, "-n", "2").code == 0


def test_verify_of_what_is_not_there_is_3(run: Run, tmp_path: Path) -> None:
    assert run("models", "verify", "no-such-model").code == 3
    assert run("models", "verify", tmp_path).code == 3
