"""Training data: files to documents, documents to one stream of tokens, the stream to batches.

Documents are parted by ``<|endoftext|>`` and packed one after the other, each behind the start token. The batch of a
step is a pure function of (seed, step): nothing to store, nothing to lose.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptcli.errors import CorruptError, NotFoundError, UsageError
from gptcli.text.tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
_READ = 1 << 20


def read_documents(path: str) -> Iterator[str]:
    """The documents of a text file, of one packed as ``.xz`` or ``.gz``, or of stdin (``-``), one at a time.

    The line break on either side of a separator belongs to it. Documents of white space alone are passed over. Raises
    NotFoundError without the file, CorruptError for bytes that are not UTF-8 (with their offset) or a broken archive.
    """
    parts: list[str] = []  # of the document that is being read
    for text in _read_text(path):
        # A separator may stand across two pieces, so the end of the last one is looked at again.
        seam = parts.pop() if parts else ""
        first, *others = (seam + text).split(SEPARATOR)
        parts += _with_seam(first) if not others else [first]
        for following in others:
            yield from _document("".join(parts))
            parts = [following]
    yield from _document("".join(parts))


def _with_seam(text: str) -> list[str]:
    """A text in two: what can hold no part of a separator that goes on, and the few characters that can."""
    place = max(0, len(text) - len(SEPARATOR) + 1)
    return [text[:place], text[place:]]


def _document(text: str) -> Iterator[str]:
    if text.strip():
        yield text.removeprefix("\n").removesuffix("\n")


def _read_text(path: str) -> Iterator[str]:
    if path == "-":
        yield from _decode(sys.stdin.buffer, "stdin")
        return
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder", "name its files")
    if Path(path).suffix in (".jsonl", ".zst"):
        raise UsageError(f"{path}: {Path(path).suffix} files are not read yet", "unpack or convert it to plain text")
    openers: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(Path(path).suffix, open)(path, "rb") as stream:
            yield from _decode(stream, path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", "check the path") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorruptError(f"{path} can't be unpacked: {error}", "download the file again") from None
    except OSError as error:
        raise CorruptError(f"{path} can't be read: {error.strerror}", "check the path and its permissions") from None


def _decode(stream: BinaryIO | io.BufferedIOBase, name: str) -> Iterator[str]:
    offset, rest = 0, b""
    while block := stream.read(_READ):
        data = rest + block
        try:
            text, rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise CorruptError(f"{name} is not UTF-8 at byte {offset + error.start}", "convert it first") from None
            text, rest = data[: error.start].decode("utf-8"), data[error.start :]
        offset += len(data) - len(rest)
        yield text
    if rest:
        raise CorruptError(f"{name} ends within a character, at byte {offset}", "the file may be cut short")


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part: by a hash of its text, so the same on every run."""
    digest = hashlib.sha256(document.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class Corpus:
    """Documents as one stream: ``tokens`` is ``[N]`` uint16 or uint32, each document behind the start token."""

    name: str
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    documents: int
    text_bytes: int


def encode_documents(name: str, documents: Iterable[str], tokenizer: Tokenizer, start_id: int) -> Corpus:
    """Encode documents on all cores into one stream, which also ends with the start token."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    start = np.array([start_id], dtype)
    pieces: list[np.ndarray] = []
    count = size = 0
    for group in _groups(documents):
        for ids in tokenizer.encode_batch(group):
            pieces += [start, np.array(ids, dtype)]
        count += len(group)
        size += sum(len(document.encode()) for document in group)
    if not count:
        raise UsageError(f"there is no text in {name}", "name files that hold some")
    return Corpus(name, np.concatenate([*pieces, start]), count, size)


def _groups(documents: Iterable[str], characters: int = 1 << 23) -> Iterator[list[str]]:
    """Documents in groups of about so many characters."""
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group


class Batches:
    """Batches of windows over a stream: each pass takes every window once, in an order and at a phase of its own."""

    def __init__(self, tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32], rows: int, context: int, seed: int):
        """``rows`` windows of ``context`` tokens a batch. Raises UsageError when the stream holds no whole window."""
        self._windows = (len(tokens) - 1) // context - 1  # the phase takes up to one window
        if self._windows < 1:
            raise UsageError(
                f"the training text is {len(tokens):,} tokens: too few for windows of {context}",
                "use more text or a smaller --context",
            )
        self._tokens, self._rows, self._context, self._seed = tokens, rows, context, seed
        self._pass = (-1, np.empty(0, np.int64), 0)

    def at(self, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The batch of a step: ids and the ids that follow them, each ``[rows, context]`` int64."""
        first = step * self._rows
        starts = [self._start(sample) for sample in range(first, first + self._rows)]
        windows = np.stack([self._tokens[s : s + self._context + 1].astype(np.int64) for s in starts])
        return windows[:, :-1], windows[:, 1:]

    def _start(self, sample: int) -> int:
        number, place = divmod(sample, self._windows)
        if self._pass[0] != number:
            random = np.random.Generator(np.random.PCG64([self._seed, number]))
            self._pass = (number, random.permutation(self._windows), int(random.integers(self._context)))
        _, order, phase = self._pass
        return int(order[place]) * self._context + phase


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-level BPE with GPT-2's pre-tokenizer; returns a ``tokenizer.json`` whose token 0 is the separator.

    Raises UsageError when the ``tokenizers`` library is missing or the size has no room for the 256 bytes.
    """
    try:
        from tokenizers import Tokenizer as Trainable
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UsageError(
            "training a tokenizer needs the tokenizers library",
            "pip install 'gptcli[train]', or use an existing one with --tokenizer",
        ) from None
    if vocab_size < 257:
        raise UsageError(f"a vocabulary of {vocab_size} has no room for the 256 bytes and the separator", "use more")
    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainable.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trainable.train_from_iterator(documents, trainer)
    text: str = trainable.to_str(pretty=False)
    return text.encode()


def documents_of(paths: Sequence[str], held_out: float = 0.0, part: str = "train") -> Iterator[str]:
    """The documents of several files in turn: those outside the held-out fraction, or those in it."""
    every = itertools.chain.from_iterable(map(read_documents, paths))
    return (document for document in every if is_held_out(document, held_out) == (part == "valid"))
