"""From a model's name to its folder: shipped with gptcli, a local path, or the Hub's local cache; no connection."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
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
_REVISION = re.compile(r"\w[\w./-]{0,199}", re.ASCII)


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


def is_hub_id(name: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, ``owner/name`` or, for old ones, ``name``."""
    return _HUB_ID.fullmatch(name) is not None


def hub_name(name: str) -> tuple[str, str | None]:
    """A Hub id and the revision behind its ``@``, if there is one; aliases are spelled out."""
    hub_id, _, revision = name.partition("@")
    return ALIASES.get(hub_id, hub_id), revision or None


def repo_folder(hub_id: str) -> Path:
    """Where the Hub's cache keeps a model's blobs, refs and snapshots; it may not be there."""
    return hub_cache() / ("models--" + hub_id.replace("/", "--"))


def resolve(name: str) -> Found:
    """The folder of a model name; see the contract for what a name may be.

    Behind a Hub id ``@REVISION`` names another revision than main: a branch, a tag, or the beginning of a commit.

    Raises NotFoundError with the nearest names, or with the way to get a Hub model that is not cached.
    """
    shipped = shipped_folder() / name
    if "/" not in name and local_path(str(shipped)) and (shipped / "config.json").is_file() and name not in (".", ".."):
        return Found(name, shipped, "shipped")
    path = local_path(name)
    if path is not None and (path / "config.json").is_file():
        return Found(path.resolve().name, path, "folder")
    hub_id, revision = hub_name(name)
    suffix = f"@{revision}" if revision else ""
    for cached in (hub_id, name.partition("@")[0]):  # transformers caches what was asked for as gpt2 under that name
        if is_hub_id(cached) and (snapshot := _snapshot(cached, revision)):
            return Found(cached + suffix, snapshot, "cache")
    if path is not None and path.is_dir() and name not in ALIASES:
        raise NotFoundError(f"the folder {name} holds no config.json", "name a folder in the Hugging Face layout")
    if name.startswith((".", "/", "~")):
        raise NotFoundError(f"there is no folder {name}", "check the path; `gptcli models list` shows what is here")
    if "/" in hub_id and is_hub_id(hub_id) and path is not None and not path.is_file():
        told = f" --revision {revision}" if revision else ""
        raise NotFoundError(
            f"{hub_id}{suffix} is not a folder and not in the Hub cache of this machine",
            f"get it with `gptcli models pull {hub_id}{told}`, or see `gptcli models list`",
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
            if cached and _has_weights(cached):
                yield Found(hub_id, cached, "cache")
            for snapshot in sorted((repo / "snapshots").glob("*/config.json")):
                if snapshot.parent != cached and _has_weights(snapshot.parent):
                    yield Found(f"{hub_id}@{_revision_name(repo, snapshot.parent.name)}", snapshot.parent, "cache")


def unfinished() -> Iterator[tuple[str, Path, int]]:
    """Models of which only a part has come: the Hub id, the folder of its repository, and the bytes that are here."""
    for repo in sorted(hub_cache().glob("models--*")):
        parts = list((repo / "blobs").glob("*.incomplete"))
        hub_id = repo.name.removeprefix("models--").replace("--", "/", 1)
        if parts and not _snapshot(hub_id):
            yield hub_id, repo, sum(file.stat().st_size for file in (repo / "blobs").iterdir())


def revision_of(found: Found) -> str | None:
    """The commit of a model in the Hub's cache; None for any other."""
    return found.folder.name if found.source == "cache" else None


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (FILE_NAME, INDEX_NAME))


def _revision_name(repo: Path, commit: str) -> str:
    """A branch or tag that stands for a commit, or the commit's first digits."""
    refs = repo / "refs"
    for ref in sorted(refs.rglob("*")) if refs.is_dir() else ():
        if ref.is_file() and ref.read_text().strip() == commit:
            return ref.relative_to(refs).as_posix()
    return commit[:8]


def _snapshot(hub_id: str, revision: str | None = None) -> Path | None:
    """The cached snapshot of a revision, or of main, or else the newest one; None when nothing is cached."""
    repo = repo_folder(hub_id)
    snapshots = repo / "snapshots"
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    ref = repo / "refs" / (revision or "main")
    if ref.is_file():
        folder = snapshots / ref.read_text().strip()
        if (folder / "config.json").exists():
            return folder
    if not snapshots.is_dir():
        return None
    whole = [folder for folder in snapshots.iterdir() if (folder / "config.json").exists()]
    if revision is not None:
        begun = [folder for folder in whole if len(revision) >= 7 and folder.name.startswith(revision)]
        return begun[0] if len(begun) == 1 else None
    return max(whole, key=lambda folder: folder.stat().st_mtime, default=None)


def verify_hashes(folder: Path, again: str = "download the model again") -> list[str]:
    """Check the files of a folder against the hashes that are known of them; returns the names checked.

    Known are the sums in ``SHA256SUMS`` and, in the Hub cache, the names of the blobs that the files link to (SHA-256
    for large files, git's SHA-1 for small ones). Raises CheckError that names the first file which differs or is
    missing, with ``again`` as its hint, CorruptError for a sums file that can't be read.
    """
    checked = []
    sums = folder / SUMS_NAME
    for line in _lines(sums) if sums.is_file() else ():
        found = re.fullmatch(r"([0-9a-f]{64})(?:  | \*)(.+)", line)
        if not found or Path(found[2]).name != found[2]:
            raise CorruptError(f"{sums} has the line {line!r}", "it should be the output of sha256sum")
        digest, name = found[1], found[2]
        if not (folder / name).is_file():
            raise CheckError(f"{name} is missing", again)
        _compare(name, sha256(folder / name), digest, again)
        checked.append(name)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        # One link only: a blob may itself be a link into a store that names its files otherwise.
        blob = Path(os.readlink(file)).name if file.is_symlink() else ""
        if file.is_symlink() and not file.exists():
            raise CheckError(f"{name} is missing", again)
        if name not in checked and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob):
            _compare(name, blob_digest(file, blob), blob, again)
            checked.append(name)
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


def blob_digest(file: Path, blob: str, between: Callable[[], object] = lambda: None) -> str:
    """The hash of a file, in hex, of the kind that names ``blob``: SHA-256 has 64 digits, git's SHA-1 40.

    ``between`` is called between two blocks; what it raises goes through.
    """
    import hashlib

    if len(blob) == 64:
        return _digest(file, hashlib.sha256(), between)
    begun = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    return _digest(file, begun, between)


def _digest(file: Path, digest: Any, between: Callable[[], object] = lambda: None) -> str:
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            between()
            digest.update(block)
    return digest.hexdigest()


def _compare(name: str, real: str, wanted: str, again: str) -> None:
    if real != wanted:
        raise CheckError(f"{name} has the hash {real[:16]}..., not {wanted[:16]}...", again)
