"""From a name to a folder: shipped, local, the Hub's cache; and files held against their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from gptcli.errors import CheckError, CorruptError, NotFoundError
from gptcli.spec import library
from gptcli.spec.library import Found, all_models, hub_cache, resolve, sha256, verify_hashes

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shipped models of our own: fable and parable, and a folder that is no model."""
    folder = tmp_path / "shipped"
    for name in ("fable", "parable"):
        _model(folder / name)
    (folder / "notes").mkdir()
    monkeypatch.setattr(library, "shipped_folder", lambda: folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    return folder


def _model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _cached(cache: Path, hub_id: str, revision: str = REVISION, *, main: bool = True, weights: bool = True) -> Path:
    """A model in the Hub's cache as huggingface_hub lays it out: blobs by hash, and links to them."""
    repo = cache / ("models--" + hub_id.replace("/", "--"))
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    config, data = b'{"model_type": "gpt2"}', b"weights of " + hub_id.encode()
    blobs = {"config.json": (_git_sha1(config), config)}
    if weights:
        blobs["model.safetensors"] = (hashlib.sha256(data).hexdigest(), data)
    for name, (digest, content) in blobs.items():
        (repo / "blobs" / digest).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / digest)
    if main:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(revision)
    return snapshot


# --- resolve --------------------------------------------------------------------------------------------------------


def test_shipped_name(shipped: Path, cache: Path) -> None:
    assert resolve("fable") == Found("fable", shipped / "fable", "shipped")


def test_folder_by_path(shipped: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _model(tmp_path / "mine" / "model")
    assert resolve(str(folder)) == Found("model", folder, "folder")
    monkeypatch.chdir(folder.parent)
    assert resolve("model") == Found("model", Path("model"), "folder")
    assert resolve("./model").source == "folder"
    monkeypatch.chdir(folder)
    assert resolve(".") == Found("model", Path("."), "folder")


def test_folder_in_the_home(shipped: Path, cache: Path) -> None:
    folder = _model(Path(os.environ["HOME"]) / "model")
    assert resolve("~/model").folder == folder


def test_shipped_goes_before_a_folder_and_a_folder_before_the_cache(
    shipped: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model(tmp_path / "here" / "fable")
    _model(tmp_path / "here" / "owner" / "name")
    _cached(cache, "owner/name")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("fable").source == "shipped"
    assert resolve("./fable").source == "folder"
    assert resolve("owner/name").source == "folder"
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").source == "cache"


def test_folder_without_a_config(shipped: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"no config\.json") as caught:
        resolve(str(tmp_path / "empty"))
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_shipped_folder_without_a_config_is_no_model(shipped: Path, cache: Path) -> None:
    with pytest.raises(NotFoundError, match="notes"):
        resolve("notes")


@pytest.mark.parametrize(("name", "meant"), [("fabel", "fable"), ("gtp2-xl", "gpt2-xl"), ("parabel", "parable")])
def test_unknown_name_hints_at_the_nearest(name: str, meant: str, shipped: Path, cache: Path) -> None:
    with pytest.raises(NotFoundError, match=name) as caught:
        resolve(name)
    assert meant in caught.value.hint
    assert "gptcli models list" in caught.value.hint


def test_unknown_name_near_to_nothing(shipped: Path, cache: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        resolve("zzzzzz")
    assert "did you mean" not in caught.value.hint


def test_cached_model_is_among_the_nearest(shipped: Path, cache: Path) -> None:
    _cached(cache, "stories/tiny")
    with pytest.raises(NotFoundError) as caught:
        resolve("stories-tiny")
    assert "stories/tiny" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    ["", "..", "x" * 300, "o/" + "x" * 300, "~nobody-of-this-name/model", "a\0b", "a b/c d", "a/b/c", "\ud800", "x\n"],
)
def test_names_that_are_none(
    name: str, shipped: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    with pytest.raises(NotFoundError):
        resolve(name)


def test_weight_file_is_not_a_model_name(shipped: Path, cache: Path, tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    with pytest.raises(NotFoundError):
        resolve(str(folder / "model.safetensors"))


# --- the Hub's cache ------------------------------------------------------------------------------------------------


def test_cached_model(shipped: Path, cache: Path) -> None:
    snapshot = _cached(cache, "owner/name")
    assert resolve("owner/name") == Found("owner/name", snapshot, "cache")
    assert (resolve("owner/name").folder / "model.safetensors").read_bytes() == b"weights of owner/name"


def test_main_goes_before_a_newer_revision(shipped: Path, cache: Path) -> None:
    main = _cached(cache, "owner/name")
    newer = _cached(cache, "owner/name", "f" * 40, main=False)
    os.utime(main, (1_000, 1_000))
    os.utime(newer, (2_000, 2_000))
    assert resolve("owner/name").folder == main


def test_without_main_the_newest_whole_revision(shipped: Path, cache: Path) -> None:
    first = _cached(cache, "owner/name", "a" * 40, main=False)
    second = _cached(cache, "owner/name", "b" * 40, main=False)
    broken = cache / "models--owner--name" / "snapshots" / ("c" * 40)
    broken.mkdir()
    os.utime(first, (2_000, 2_000))
    os.utime(second, (1_000, 1_000))
    assert resolve("owner/name").folder == first


def test_main_that_points_to_nothing(shipped: Path, cache: Path) -> None:
    snapshot = _cached(cache, "owner/name")
    (cache / "models--owner--name" / "refs" / "main").write_text("d" * 40 + "\n")
    assert resolve("owner/name").folder == snapshot
    shutil.rmtree(snapshot)
    with pytest.raises(NotFoundError):
        resolve("owner/name")


def test_hub_id_that_is_not_cached(shipped: Path, cache: Path) -> None:
    with pytest.raises(NotFoundError, match="owner/name") as caught:
        resolve("owner/name")
    assert "owner/name" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_gpt2_aliases(name: str, shipped: Path, cache: Path) -> None:
    with pytest.raises(NotFoundError, match=f"openai-community/{name} "):
        resolve(name)
    snapshot = _cached(cache, f"openai-community/{name}")
    assert resolve(name) == Found(f"openai-community/{name}", snapshot, "cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(os.environ["HOME"])
    assert hub_cache() == Path(os.environ["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub_cache() == home / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert hub_cache() == home / "hf" / "hub"
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "old"))
    assert hub_cache() == tmp_path / "old"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "new"))
    assert hub_cache() == tmp_path / "new"
    monkeypatch.setenv("HF_HUB_CACHE", "")
    assert hub_cache() == tmp_path / "old"


def test_hf_home_is_honoured(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    snapshot = _cached(tmp_path / "hf" / "hub", "owner/name")
    assert resolve("owner/name").folder == snapshot


def test_list_of_all_models(shipped: Path, cache: Path) -> None:
    _cached(cache, "owner/name-b")
    _cached(cache, "owner/name-a")
    _cached(cache, "owner/tokenizer-only", weights=False)
    (cache / "datasets--owner--data").mkdir()
    (cache / "models--broken--model").mkdir()
    assert [(found.name, found.source) for found in all_models()] == [
        ("fable", "shipped"),
        ("parable", "shipped"),
        ("owner/name-a", "cache"),
        ("owner/name-b", "cache"),
    ]


def test_list_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "shipped_folder", lambda: tmp_path / "none")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    assert list(all_models()) == []


# --- hashes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def summed(tmp_path: Path) -> Path:
    """A model folder with the sums of its two files."""
    folder = _model(tmp_path / "model")
    names = ("config.json", "model.safetensors")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder


def test_sha256_is_sha256(tmp_path: Path) -> None:
    data = b"x" * (3 << 20) + b"y"
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_good_sums(summed: Path) -> None:
    (summed / "README.md").write_text("not in the sums")
    assert sorted(verify_hashes(summed)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_changed_file(name: str, summed: Path) -> None:
    data = bytearray((summed / name).read_bytes())
    data[-1] ^= 1
    (summed / name).write_bytes(data)
    with pytest.raises(CheckError, match=name) as caught:
        verify_hashes(summed)
    assert caught.value.exit_code == 6
    assert caught.value.hint


def test_missing_file(summed: Path) -> None:
    (summed / "config.json").unlink()
    with pytest.raises(CheckError, match=r"config\.json is missing"):
        verify_hashes(summed)


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"0123 config.json", b"", b"0" * 64 + b"  ../config.json", b"  ", b"\xff\xfe", b"zz  config.json"],
)
def test_bad_line(line: bytes, summed: Path) -> None:
    sums = summed / "SHA256SUMS"
    sums.write_bytes(sums.read_bytes() + line + b"\n")
    with pytest.raises(CorruptError, match="SHA256SUMS") as caught:
        verify_hashes(summed)
    assert caught.value.exit_code == 3


def test_folder_without_known_hashes(tmp_path: Path) -> None:
    assert verify_hashes(_model(tmp_path / "model")) == []


def test_links_that_are_no_blobs_are_left_alone(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    (tmp_path / "elsewhere.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    assert verify_hashes(folder) == []


def test_good_blobs(cache: Path) -> None:
    assert sorted(verify_hashes(_cached(cache, "owner/name"))) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_changed_blob(name: str, cache: Path) -> None:
    """The small file is known by git's SHA-1, the large one by SHA-256."""
    snapshot = _cached(cache, "owner/name")
    (snapshot / name).resolve().write_bytes(b"changed")
    with pytest.raises(CheckError, match=name):
        verify_hashes(snapshot)


def test_missing_blob(cache: Path) -> None:
    """A link into nothing: the download is not whole."""
    snapshot = _cached(cache, "owner/name")
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckError, match=r"model\.safetensors"):
        verify_hashes(snapshot)
