"""A model from the Hub into its cache on this machine, which other tools share: what is to be done, then doing it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue

from gptcli.errors import CorruptError, OutputError, UnsupportedError
from gptcli.hub.choose import choose, is_pickle, read_config_of
from gptcli.hub.fetch import MOST_OVER_HTTP, Stopped, digest_of, fetch, refuse
from gptcli.hub.headers import read_tensors
from gptcli.hub.reach import Hub, Listing, RemoteFile
from gptcli.spec.library import repo_folder

_AT_ONCE = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MARGIN = 50_000_000  # bytes that stay free on the disk
_LAST = "config.json"  # with it the folder becomes a model; without, whoever looks for one is told to pull

# Told a file's name and how many more of its bytes are here.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Wanted:
    """A file that is to be in the cache, and how many of its bytes are."""

    file: RemoteFile
    here: int
    whole: bool


@dataclass(frozen=True)
class Plan:
    """What a pull will do."""

    listing: Listing
    repo: Path
    files: tuple[Wanted, ...]
    left_out: tuple[str, ...]  # pickles that matched

    @property
    def folder(self) -> Path:
        return self.repo / "snapshots" / self.listing.commit

    @property
    def bytes(self) -> int:
        return sum(wanted.file.size or 0 for wanted in self.files)

    @property
    def bytes_to_fetch(self) -> int:
        return sum((wanted.file.size or 0) - wanted.here for wanted in self.files)

    @property
    def files_to_fetch(self) -> int:
        return sum(not wanted.whole for wanted in self.files)


def plan_pull(
    hub: Hub,
    name: str,
    revision: str | None,
    *,
    include: Sequence[str] = (),
    force: bool = False,
    repair: bool = False,
) -> Plan:
    """Look at a repository and at the cache: what is to be fetched.

    A model that gptcli can't run is refused now, by its configuration and the headers of its weights, unless
    ``force``. ``repair`` hashes what is here, and takes away what is wrong. Raises as Hub.listing and ``choose`` do,
    UnsupportedError for such a model, and OutputError when the disk is too small.
    """
    listing = hub.listing(name, revision)
    repo = repo_folder(name)

    @cache
    def read(file: str) -> bytes:
        state = _state(repo, listing, listing.files[file])
        return _place(repo, listing, state.file).read_bytes() if state.whole else hub.read(listing, file)[0]

    if repair:
        for file in listing.files.values():
            _discard_if_wrong(repo, listing, file)
    chosen = choose(listing, include, read)
    plan = Plan(
        listing,
        repo,
        tuple(_state(repo, listing, listing.files[file]) for file in chosen),
        tuple(file for file in listing.files if include and is_pickle(file) and file not in chosen),
    )
    if plan.files_to_fetch and not force and any(file.endswith(".safetensors") for file in chosen):
        _refuse_what_does_not_run(hub, listing, read)
    _check_room(plan)
    return plan


def run_plan(hub: Hub, plan: Plan, progress: Progress) -> Path:
    """Fetch what is missing, several files at once; returns the folder.

    What has come stays, whatever happens: KeyboardInterrupt goes through. Raises NetworkError, CorruptError,
    OutputError when the disk is full, and what Hub.failures knows.
    """
    stop = threading.Event()
    first = [wanted for wanted in plan.files if wanted.file.name != _LAST]
    last = [wanted for wanted in plan.files if wanted.file.name == _LAST]
    for part in (first, last):
        try:
            _run_at_once(part, lambda wanted: _bring(hub, plan, wanted, stop, progress), stop)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            message = f"there is no more room in {plan.repo}: {error.strerror}"
            raise OutputError(message, "make room: what is there stays, and the same command goes on from it") from None
    ref = plan.repo / "refs" / plan.listing.revision
    if plan.listing.revision != plan.listing.commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        beside = ref.with_name(f"{ref.name}.{os.getpid()}")
        beside.write_text(plan.listing.commit)
        beside.replace(ref)
    return plan.folder


def _run_at_once(items: Sequence[Wanted], work: Callable[[Wanted], None], stop: threading.Event) -> None:
    """Do ``work`` on all items, a few at a time; the first failure stops the others and is raised.

    The threads are daemons: a Ctrl-C need not wait for a connection that says nothing.
    """
    waiting: Queue[Wanted | None] = Queue()
    ended: Queue[BaseException | None] = Queue()
    workers = min(_AT_ONCE, len(items))
    for item in (*items, *(None for _ in range(workers))):
        waiting.put(item)

    def serve() -> None:
        try:
            while (item := waiting.get()) is not None:
                work(item)
            ended.put(None)
        except BaseException as error:
            stop.set()
            ended.put(error)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
    try:
        for thread in threads:
            thread.start()
        failures = [failure for _ in threads if (failure := ended.get()) is not None]
    except BaseException:
        stop.set()
        raise
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Stopped)):
        raise failure


def _bring(hub: Hub, plan: Plan, wanted: Wanted, stop: threading.Event, progress: Progress) -> None:
    file, name = wanted.file, wanted.file.name
    if stop.is_set():
        raise Stopped
    pointer = plan.folder / name
    if pointer.exists() and wanted.whole:
        return
    ours = file.digest is not None and (file.size or 0) <= MOST_OVER_HTTP
    if ours and not wanted.whole:
        blob = plan.repo / "blobs" / str(file.digest)
        lock = plan.repo.parent / ".locks" / plan.repo.name / f"{file.digest}.lock"
        credit = [wanted.here]  # counted already

        def moved(count: int) -> None:
            known = min(count, credit[0]) if count > 0 else 0
            credit[0] -= known
            progress(name, count - known)

        fetch(hub, plan.listing, file, blob, lock=lock, stop=stop, progress=moved)
    hub.link(plan.listing, name, str(plan.repo.parent))
    if not wanted.whole and not ours:  # it came through huggingface_hub
        progress(name, (file.size or 0) - wanted.here)
        if file.digest and (digest := digest_of(file, pointer, stop)) != file.digest:
            pointer.resolve().unlink()
            pointer.unlink(missing_ok=True)
            raise refuse(file, digest)


def _state(repo: Path, listing: Listing, file: RemoteFile) -> Wanted:
    """How much of a file is here. One of another size than the Hub's is not it."""
    place = _place(repo, listing, file)
    if place.is_file() and (file.size is None or place.stat().st_size == file.size):
        return Wanted(file, file.size or 0, True)
    partial = place.with_name(place.name + ".incomplete")
    here = partial.stat().st_size if file.digest and partial.is_file() else 0
    return Wanted(file, here if here <= (file.size or 0) else 0, False)


def _place(repo: Path, listing: Listing, file: RemoteFile) -> Path:
    """The blob of a file; where there are no links, or no hash is known, the file in its snapshot."""
    pointer = repo / "snapshots" / listing.commit / file.name
    blob = repo / "blobs" / (file.digest or "")
    return pointer if not file.digest or (pointer.is_file() and not pointer.is_symlink()) else blob


def _discard_if_wrong(repo: Path, listing: Listing, file: RemoteFile) -> None:
    place = _place(repo, listing, file)
    if not file.digest or not place.is_file():
        return
    if digest_of(file, place) != file.digest:
        place.unlink()


def _refuse_what_does_not_run(hub: Hub, listing: Listing, read: Callable[[str], bytes]) -> None:
    from gptcli.spec.match import match

    try:
        config = read_config_of(listing, read)
        match(read_tensors(hub, listing, read), config, listing.name)
    except (UnsupportedError, CorruptError) as error:
        hint = f"{error.hint.rstrip('.')}; --force gets it anyway, for other tools"
        raise type(error)(error.message, hint) from None


def _check_room(plan: Plan) -> None:
    place = plan.repo
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if (need := plan.bytes_to_fetch) and need + _MARGIN > free:
        raise OutputError(
            f"{plan.listing.name} needs {need / 1e6:,.1f} MB more and {_MARGIN / 1e6:.0f} MB to spare, and {place} "
            f"has room for {free / 1e6:,.1f} MB",
            "make room (`gptcli models rm`), or set HF_HUB_CACHE to a folder on a larger disk",
        )
