"""From a model's name to its folder: shipped with gptcli, a local path, or the Hub's local cache; no connection."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from gptcli.errors import CheckError, CorruptError, NotFoundError
from gptcli.spec.index import FILE_NAME, INDEX_NAME

DEFAULT_MODEL = "fable"
ALIASES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
SUMS_NAME = "SHA256SUMS"

_HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A model on this machine."""

    name: str
    folder: Path
    source: Literal["shipped", "folder", "cache"]


def shipped_folder() -> Path:
    """Where the shipped models are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def hub_cache() -> Path:
    """The Hub's cache folder, which other tools share. Source: huggingface_hub's documented environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def hub_is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids the network, in the spellings that huggingface_hub takes."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def resolve(name: str) -> Found:
    """The folder of a model name; see the contract for what a name may be.

    Raises NotFoundError with the nearest names, or with the way to get a Hub model that is not cached.
    """
    shipped = shipped_folder() / name
    if "/" not in name and local_path(str(shipped)) and (shipped / "config.json").is_file() and name not in (".", ".."):
        return Found(name, shipped, "shipped")
    path = local_path(name)
    if path is not None and (path / "config.json").is_file():
        return Found(path.resolve().name, path, "folder")
    hub_id = ALIASES.get(name, name)
    for cached in (hub_id, name):  # transformers caches what was asked for as gpt2 under that name
        if _HUB_ID.fullmatch(cached) and (snapshot := _snapshot(cached)):
            return Found(cached, snapshot, "cache")
    if path is not None and path.is_dir() and name not in ALIASES:
        raise NotFoundError(f"the folder {name} holds no config.json", "name a folder in the Hugging Face layout")
    if name.startswith((".", "/", "~")):
        raise NotFoundError(f"there is no folder {name}", "check the path; `gptcli models list` shows what is here")
    if "/" in hub_id and _HUB_ID.fullmatch(hub_id) and path is not None and not path.is_file():
        raise NotFoundError(
            f"{hub_id} is not a folder and not in the Hub cache of this machine",
            f"get it with `hf download {hub_id}`, or see `gptcli models list`",
        )
    near = get_close_matches(name, [found.name for found in all_models()] + list(ALIASES), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise NotFoundError(f"there is no model {name!r}", f"{hint}`gptcli models list` shows what is here")


def local_path(name: str) -> Path | None:
    """The path that a name may stand for; None where it can be none: too long, a NUL in it, an unknown ``~user``."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return path


def all_models() -> Iterator[Found]:
    """The shipped models, then those in the Hub cache, by name."""
    shipped = shipped_folder()
    if shipped.is_dir():
        for folder in sorted(shipped.iterdir()):
            if (folder / "config.json").is_file():
                yield Found(folder.name, folder, "shipped")
    cache = hub_cache()
    if cache.is_dir():
        for repo in sorted(cache.glob("models--*")):
            hub_id = repo.name.removeprefix("models--").replace("--", "/", 1)
            cached = _snapshot(hub_id)
            if cached and any((cached / name).exists() for name in (FILE_NAME, INDEX_NAME)):
                yield Found(hub_id, cached, "cache")


def _snapshot(hub_id: str) -> Path | None:
    """The cached snapshot of a model's main revision, or its newest one; None when nothing is cached."""
    repo = hub_cache() / ("models--" + hub_id.replace("/", "--"))
    snapshots = repo / "snapshots"
    main = repo / "refs" / "main"
    if main.is_file():
        folder = snapshots / main.read_text().strip()
        if (folder / "config.json").exists():
            return folder
    if not snapshots.is_dir():
        return None
    whole = [folder for folder in snapshots.iterdir() if (folder / "config.json").exists()]
    return max(whole, key=lambda folder: folder.stat().st_mtime, default=None)


def verify_hashes(folder: Path) -> list[str]:
    """Check the files of a folder against the hashes that are known of them; returns the names checked.

    Known are the sums in ``SHA256SUMS`` and, in the Hub cache, the names of the blobs that the files link to (SHA-256
    for large files, git's SHA-1 for small ones). Raises CheckError that names the first file which differs or is
    missing, CorruptError for a sums file that can't be read.
    """
    checked = []
    sums = folder / SUMS_NAME
    for line in _lines(sums) if sums.is_file() else ():
        found = re.fullmatch(r"([0-9a-f]{64})(?:  | \*)(.+)", line)
        if not found or Path(found[2]).name != found[2]:
            raise CorruptError(f"{sums} has the line {line!r}", "it should be the output of sha256sum")
        digest, name = found[1], found[2]
        if not (folder / name).is_file():
            raise CheckError(f"{name} is missing", "download the model again")
        _compare(name, sha256(folder / name), digest)
        checked.append(name)
    for file in sorted(folder.iterdir()):
        blob = file.resolve().name if file.is_symlink() else ""
        if file.is_symlink() and not file.exists():
            raise CheckError(f"{file.name} is missing", "download the model again")
        if file.name not in checked and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob):
            _compare(file.name, sha256(file) if len(blob) == 64 else _git_sha1(file), blob)
            checked.append(file.name)
    return checked


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CorruptError(f"{file} can't be read: {error}", "get it again") from None


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    import hashlib

    return _digest(file, hashlib.sha256())


def _git_sha1(file: Path) -> str:
    import hashlib

    return _digest(file, hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False))


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _compare(name: str, real: str, wanted: str) -> None:
    if real != wanted:
        raise CheckError(f"{name} has the hash {real[:16]}..., not {wanted[:16]}...", "download the model again")
