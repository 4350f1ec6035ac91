"""Models taken out of the Hub's cache, by huggingface_hub's own scan: it knows which blobs other revisions share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gptcli.errors import NotFoundError
from gptcli.spec.library import hub_cache, repo_folder


@dataclass(frozen=True)
class Removal:
    """What would go: commits, bytes, and the way to do it."""

    name: str
    commits: tuple[str, ...]
    bytes: int
    execute: Callable[[], None]


def plan_removal(hub_id: str, commit: str | None) -> Removal:
    """What removing a model would free: one commit of it, or (None) all, parts of broken downloads included.

    Raises NotFoundError when nothing of it is here, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import scan_cache_dir
    except ImportError:
        message = "the Hub's cache is managed by huggingface_hub, which is not installed"
        raise NotFoundError(message, "pip install 'gptcli[hub]'") from None
    folder = repo_folder(hub_id)
    if not folder.is_dir():
        raise NotFoundError(f"{hub_id} is not in the Hub cache of this machine", "`gptcli models list` shows what is")
    found = scan_cache_dir(hub_cache())
    known = {repo.repo_path: repo for repo in found.repos}.get(folder)
    here = sorted(revision.commit_hash for revision in known.revisions) if known else []
    # A commit can be here under several names, as gpt2 and openai-community/gpt2: whatever has another name stays.
    found = replace(found, repos=frozenset([known] if known else []))
    if commit is None or here == [commit]:
        strategy = found.delete_revisions(*here)
        freed = max(strategy.expected_freed_size, _size(folder))
        return Removal(hub_id, tuple(here), freed, lambda: _remove_all(strategy.execute, folder))
    if commit not in here:
        raise NotFoundError(f"the commit {commit} of {hub_id} is not here", "`gptcli models list` shows what is")
    strategy = found.delete_revisions(commit)
    return Removal(hub_id, (commit,), strategy.expected_freed_size, strategy.execute)


def _size(folder: Path) -> int:
    blobs = folder / "blobs"
    return sum(file.lstat().st_size for file in blobs.glob("*") if file.is_file() and not file.is_symlink())


def _remove_all(execute: Callable[[], None], folder: Path) -> None:
    """First the revisions, then what the scan does not know: a download that broke off, and its locks."""
    execute()
    if folder.exists():
        shutil.rmtree(folder)
    shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
