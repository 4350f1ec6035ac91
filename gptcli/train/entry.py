"""An entry of the token cache: the shards of one file or a few, made where they are missing (see ``prepare``)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcli.core.files import sync
from gptcli.errors import CorruptError
from gptcli.text.bulk import cores
from gptcli.train.documents import is_held_out
from gptcli.train.encode import Encoder, Ids, utf8_length
from gptcli.train.inputs import Input
from gptcli.train.shards import map_shard
from gptcli.train.units import Place, Unit, documents_of_unit, read_units, text_of

# Text of one shard, in bytes: what an interruption costs at most.
_SHARD = 1 << 26
# Text that waits to be encoded or written, in bytes.
_AHEAD = 1 << 25
_MOST_WAITING = 1 << 10
# Of how the files are written; another number makes another key.
_VERSION = 1
_PARTS = ("train", "valid")


@dataclass(frozen=True)
class Recipe:
    """How text becomes tokens: all that a key holds besides the text."""

    encoder: Encoder
    tokenizer: str
    field: str
    held_out: float


@dataclass(frozen=True)
class Part:
    """What a shard, or a unit, holds of one part: tokens ``[N]``, each document behind the start token."""

    documents: int
    text_bytes: int
    tokens: Ids


@dataclass(frozen=True)
class Shard:
    """The two parts of a shard."""

    train: Part
    valid: Part


@dataclass(frozen=True)
class _Next:
    """Where the next shard begins: the number of an input, and the place in it. Past the last input, all is done."""

    number: int
    place: Place


class Entry:
    """The tokens of ``inputs`` in the cache; ``key`` names the entry, ``size`` is that of the inputs in bytes."""

    def __init__(self, cache: Path, inputs: Sequence[Input], recipe: Recipe) -> None:
        self.inputs, self.recipe = inputs, recipe
        self.size = sum(one.size for one in inputs)
        depends_on = {
            "version": _VERSION,
            "inputs": [(one.digest, one.is_json, one.packing) for one in inputs],
            "field": recipe.field if any(one.is_json for one in inputs) else None,
            "tokenizer": recipe.tokenizer,
            "start_id": recipe.encoder.start_id,
            "held_out": float(recipe.held_out),
        }
        self.key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        self.folder = cache / self.key
        self._dtype = recipe.encoder.dtype.newbyteorder("<")

    def shards(self, progress: Callable[[int], None], workers: int | None = None) -> list[Shard]:
        """All shards; those that are missing, damaged, or behind such a one are made. To be called under the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done, following = self._read()
        if following.number < len(self.inputs):
            for file in self.folder.iterdir():
                if not file.stem.isdecimal() or int(file.stem) >= len(done):
                    file.unlink()
            self._make(len(done), following, progress, workers)
            done, _ = self._read()
        os.utime(self.folder)  # when it was last used
        return done

    def _read(self) -> tuple[list[Shard], _Next]:
        """The shards up to the first that is not there or not whole, and where to go on."""
        shards: list[Shard] = []
        following = _Next(0, Place())
        while following.number < len(self.inputs):
            try:
                record = json.loads((self.folder / f"{len(shards):05d}.json").read_bytes())
                parts = [self._open(len(shards), part, record[part]) for part in _PARTS]
                number, place = record["next"]
                following = _Next(int(number), Place(**place))
            except (OSError, ValueError, LookupError, TypeError, CorruptError):
                break
            shards.append(Shard(*parts))
        return shards, following

    def _open(self, number: int, part: str, record: dict[str, int]) -> Part:
        tokens = record["tokens"]
        file = self.folder / f"{number:05d}.{part}"
        array = map_shard(file, self._dtype, tokens) if tokens else np.empty(0, self._dtype)
        return Part(record["documents"], record["text_bytes"], array)

    def _make(self, number: int, start: _Next, progress: Callable[[int], None], workers: int | None) -> None:
        shard = _Writer(self.folder, number, self._dtype)
        try:
            for work, encoded in self._encoded(start, workers):
                shard.add(work, encoded)
                progress(work.read)
                if shard.taken >= _SHARD or work.following.number == len(self.inputs):
                    for one in self.inputs:
                        one.check()
                    shard.close(work.following)
                    number += 1
                    shard = _Writer(self.folder, number, self._dtype)
        finally:
            shard.drop()

    def _encoded(self, start: _Next, workers: int | None) -> Iterator[tuple[_Work, list[Part]]]:
        """All work from ``start`` on with its result, in order, encoded by several threads a little ahead."""
        pool = ThreadPoolExecutor(workers or cores())
        waiting: deque[tuple[_Work, Future[list[Part]]]] = deque()
        ahead = 0
        try:
            for work in self._work(start):
                waiting.append((work, pool.submit(_encode, work, self.recipe)))
                ahead += work.size
                while ahead > _AHEAD or len(waiting) > _MOST_WAITING:
                    first, encoded = waiting.popleft()
                    ahead -= first.size
                    yield first, encoded.result()
            while waiting:
                first, encoded = waiting.popleft()
                yield first, encoded.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _work(self, start: _Next) -> Iterator[_Work]:
        before = sum(one.size for one in self.inputs[: start.number])
        for number in range(start.number, len(self.inputs)):
            one, begin = self.inputs[number], start.place if number == start.number else Place()
            name = "stdin" if one.path == "-" else one.path
            cut = self.recipe.encoder.tokenizer.safe_cut
            units = read_units(one.blocks(begin.offset), name, begin, lines=one.is_json, cut=cut)
            for unit in units:
                yield _Work(unit, name, one.is_json, _Next(number, unit.end), before + unit.read)
            before += one.size
            yield _Work(None, name, one.is_json, _Next(number + 1, Place()), before)


@dataclass(frozen=True)
class _Work:
    """A unit to encode (None: the end of an input), what follows it, and the bytes of the inputs read by then."""

    unit: Unit | None
    name: str
    is_json: bool
    following: _Next
    read: int

    @property
    def size(self) -> int:
        return len(self.unit.data) if self.unit else 0


def _encode(work: _Work, recipe: Recipe) -> list[Part]:
    """What a unit adds to each part."""
    if work.unit is None:
        return []
    if work.unit.is_part:
        return [_encode_part(work.unit, work.name, recipe.encoder)]
    parts: tuple[list[str], list[str]] = [], []
    for document in documents_of_unit(work.unit, work.name, recipe.field if work.is_json else None):
        parts[recipe.held_out > 0 and is_held_out(document, recipe.held_out)].append(document)
    return [Part(len(part), sum(map(utf8_length, part)), recipe.encoder.documents(part)) for part in parts]


def _encode_part(unit: Unit, name: str, encoder: Encoder) -> Part:
    """A part of a document that is too large to be held: the document is one to train on."""
    text = text_of(unit, name)
    text = text if unit.begin.inside else text.removeprefix("\n")
    text = text if unit.end.inside else text.removesuffix("\n")
    tokens = encoder.text(text)
    if not unit.begin.inside:
        tokens = np.concatenate([encoder.documents([""]), tokens])
    return Part(int(not unit.begin.inside), utf8_length(text), tokens)


class _Writer:
    """Writes one shard: its files beside, then renamed, its record last."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any]) -> None:
        self.taken = 0  # bytes of text, parted documents and all
        self._folder, self._number, self._dtype = folder, number, dtype
        self._files: dict[str, BinaryIO] = {}
        self._counts = {part: {"documents": 0, "text_bytes": 0, "tokens": 0} for part in _PARTS}

    def add(self, work: _Work, encoded: Sequence[Part]) -> None:
        self.taken += work.size
        for part, one in zip(_PARTS, encoded, strict=False):
            count = self._counts[part]
            count["documents"] += one.documents
            count["text_bytes"] += one.text_bytes
            count["tokens"] += len(one.tokens)
            if len(one.tokens):
                if part not in self._files:
                    self._files[part] = self._beside(part).open("wb")
                self._files[part].write(one.tokens.astype(self._dtype, copy=False).data)

    def close(self, following: _Next) -> None:
        for part, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._beside(part), self._folder / f"{self._number:05d}.{part}")
        self._files = {}
        record = {**self._counts, "next": [following.number, asdict(following.place)]}
        with self._beside("json").open("w") as text:
            json.dump(record, text)
            text.flush()
            os.fsync(text.fileno())
        os.replace(self._beside("json"), self._folder / f"{self._number:05d}.json")
        sync(self._folder)

    def drop(self) -> None:
        for part, file in self._files.items():
            with contextlib.suppress(OSError):
                file.close()
            self._beside(part).unlink(missing_ok=True)

    def _beside(self, part: str) -> Path:
        return self._folder / f"writing.{part}"


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock that ``file`` stands for, alone among all processes; the end of a process frees it.

    Without ``wait``, raises BlockingIOError where another holds it.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def trim(cache: Path, most_bytes: int, used: Set[str]) -> None:
    """Remove the entries used least recently until ``cache`` holds at most so many bytes; not those in ``used``.

    Who has an entry's shards mapped keeps them; one that is being made stays.
    """
    entries = []
    for lock in cache.glob("*.lock"):  # only what has a lock is an entry, whatever else stands there
        folder = lock.with_suffix("")
        with contextlib.suppress(OSError):  # gone since, or never made
            size = sum(file.stat().st_size for file in folder.iterdir())
            entries.append((folder.stat().st_mtime_ns, size, folder, lock))
    total = sum(size for _, size, _, _ in entries)
    for _, size, folder, lock in sorted(entries):
        if total > most_bytes and folder.name not in used:
            with contextlib.suppress(BlockingIOError), locked(lock, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
