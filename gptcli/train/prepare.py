"""Files to tokens in a cache: encoded once on all cores, mapped ever after; memory is bounded whatever their size.

A file, or a run of small files of a folder, has an entry of its own: a folder named by what the tokens depend on, the
content of the files and the tokenizer foremost. In it stand shards, ``00000.train`` and ``00000.valid`` (the tokens,
little-endian uint16 or uint32) with ``00000.json``: what they hold, and where in the text the next shard begins. Each
file is written beside and renamed, the record last, so what has a record is whole, and whoever comes next goes on
behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gptcli.errors import OutputError, UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.data import Corpus
from gptcli.train.documents import files_of
from gptcli.train.encode import Encoder, Ids
from gptcli.train.entry import Entry, Part, Recipe, Shard, locked, trim
from gptcli.train.inputs import Input, open_input
from gptcli.train.shards import ShardedTokens

Progress = Callable[[int, int | None], None]

# Files of a folder below this many bytes share an entry ...
_SMALL = 1 << 23
# ... of about so many: a folder of many small files is not to become as many entries.
_BUNDLE = 1 << 26


def prepare(
    name: str,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    files: Mapping[str, bytes],
    start_id: int,
    *,
    cache: Path,
    field: str = "text",
    held_out: float = 0.0,
    progress: Progress | None = None,
    workers: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[Corpus | None, Corpus | None]:
    """The documents of files, folders and standard input as tokens: those to train on, and those held out.

    Equal to ``encode_documents`` of ``documents_of``, but in memory that doesn't grow with the data, and done only
    once: ``cache`` keeps it for the next time, an interrupted preparation for its rest. Several processes may prepare
    the same at once; one does it, the others wait for it. A file named twice counts twice in training only. Of a text
    document above 16 MiB (``units.LARGEST``) only a part is held at a time, and it is never held out; a line of
    ``.jsonl``, or a text in which no place is safe to cut, is held whole.

    ``files`` are the tokenizer's, by which the cache knows it. ``progress(done, total)`` is called with bytes of the
    files as they are, packed or not; ``total`` is None while standard input is still being read. ``workers`` threads
    encode (default: one for each core). With ``keep_bytes`` the entries used least recently go until the cache holds
    no more, but none of this call.

    None stands for a part without documents. Raises UsageError when both are, NotFoundError and CorruptError as
    ``read_documents`` does, OutputError when the cache can't be written.
    """
    recipe = Recipe(Encoder(tokenizer, start_id), _hash_of(files), field, held_out)
    told = progress or (lambda done, total: None)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        named = _entries(paths, cache, recipe, told)
        entries = {entry.key: entry for group in named.values() for entry in group}
        meter = _Meter(told, sum(entry.size for entry in entries.values()))
        shards: dict[str, list[Shard]] = {}
        for key, entry in entries.items():
            with locked(cache / f"{key}.lock"):
                shards[key] = entry.shards(meter, workers)
            meter.passed(entry.size)
        if keep_bytes is not None:
            trim(cache, keep_bytes, set(entries))
    except OSError as error:
        message = f"the token cache {cache} can't be written: {error.strerror or error}"
        raise OutputError(message, "make room on the disk, or have it elsewhere with XDG_CACHE_HOME") from None
    order = [entry.key for path in paths for entry in named[path]]
    train = _corpus(name, [shard.train for key in order for shard in shards[key]], recipe.encoder)
    valid = _corpus("held out", [shard.valid for key in entries for shard in shards[key]], recipe.encoder)
    if train is None and valid is None:
        raise UsageError(f"there is no text in {name}", "name files that hold some")
    return train, valid


class _Meter:
    """Adds up what entries tell of themselves."""

    def __init__(self, told: Progress, total: int) -> None:
        self._told, self._total, self._passed = told, total, 0

    def __call__(self, done: int) -> None:
        self._told(self._passed + done, self._total)

    def passed(self, size: int) -> None:
        self._passed += size
        self(0)


def _hash_of(files: Mapping[str, bytes]) -> str:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _entries(paths: Iterable[str], cache: Path, recipe: Recipe, told: Progress) -> dict[str, list[Entry]]:
    """The entries of each path; one named again, or holding the same, has the same."""
    known: dict[str, Entry] = {}
    found: dict[str, list[Entry]] = {}
    for path in dict.fromkeys(paths):
        found[path] = []
        for bundle in _bundles([open_input(file, cache, lambda done: told(done, None)) for file in files_of(path)]):
            entry = Entry(cache, bundle, recipe)
            found[path].append(known.setdefault(entry.key, entry))
    return found


def _bundles(inputs: Iterable[Input]) -> Iterator[list[Input]]:
    """Inputs in runs that share an entry."""
    bundle: list[Input] = []
    for one in inputs:
        if bundle and (one.size >= _SMALL or sum(other.size for other in bundle) >= _BUNDLE):
            yield bundle
            bundle = []
        bundle.append(one)
        if one.size >= _SMALL:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _corpus(name: str, parts: Sequence[Part], encoder: Encoder) -> Corpus | None:
    """Parts as one stream, closed by the start token; None without a document."""
    documents = sum(part.documents for part in parts)
    if not documents:
        return None
    end: Ids = np.array([encoder.start_id], encoder.dtype)
    tokens = ShardedTokens([*(part.tokens for part in parts), end])
    return Corpus(name, tokens, documents, sum(part.text_bytes for part in parts), encoder.start_id)
