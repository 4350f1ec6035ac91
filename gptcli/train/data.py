"""Training data: one stream of tokens, the stream to batches.

Documents are packed one after the other, each behind the start token. The batch of a step is a pure function of
(seed, step): nothing to store, nothing to lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gptcli.errors import UsageError
from gptcli.text.bulk import cores
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.documents import SEPARATOR
from gptcli.train.encode import Encoder, Ids, utf8_length
from gptcli.train.shards import Tokens, between

# A target that nothing is to be learnt from; cross entropy's usual mark for it.
IGNORED = -100

# Windows up to which a pass has a table of its order, 8 bytes each; beyond, the order is computed.
_TABLE = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Documents as one stream of tokens ``[N]``, uint16 or uint32.

    Each document stands behind the token ``start_id``, which also ends the stream. ``learnt`` ``[N]`` says of each
    token whether it is a target (None: all are). ``starts`` are the places where documents start, ascending (None: each
    ``start_id`` starts one); what stands before the first is the rest of another.
    """

    name: str
    tokens: Tokens
    documents: int
    text_bytes: int
    start_id: int = 0
    learnt: Tokens | None = None
    starts: npt.NDArray[np.int64] | None = None

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where each document's tokens begin and end in the stream, its start token first; memory does not grow."""
        first = 0
        for group in [self.starts] if self.starts is not None else self._start_tokens():
            for start in group.tolist():
                if start > first:
                    yield first, start
                first = start
        if len(self.tokens) > first:
            yield first, len(self.tokens)

    def _start_tokens(self) -> Iterator[npt.NDArray[np.int64]]:
        for first in range(0, len(self.tokens), 1 << 20):
            yield np.flatnonzero(self.tokens[first : first + (1 << 20)] == self.start_id) + first


def encode_documents(name: str, documents: Iterable[str], tokenizer: Tokenizer, start_id: int) -> Corpus:
    """Encode documents on all cores into one stream in memory; ``prepare`` is for more than fits there."""
    encoder = Encoder(tokenizer, start_id)
    pieces: list[Ids] = []
    count = size = 0
    with ThreadPoolExecutor(cores()) as pool:
        for group in _groups(documents):
            parts = list(_groups(group, 1 << 18))
            pieces += pool.map(encoder.documents, parts)
            count += len(group)
            size += sum(map(utf8_length, group))
    if not count:
        raise UsageError(f"there is no text in {name}", "name files that hold some")
    end: Ids = np.array([start_id], encoder.dtype)
    return Corpus(name, np.concatenate([*pieces, end]), count, size, start_id)


def hold_out_end(corpus: Corpus, tokenizer: Tokenizer, fraction: float = 0.01, least: int = 256) -> list[Corpus]:
    """A stream of too few documents in two: what to train on, and its last tokens to evaluate on.

    The end is ``fraction`` of the tokens, but ``least`` of them; alone comes what is too short to give that away.
    Neither part is copied.
    """
    length = len(corpus.tokens)
    size = max(least, round(fraction * length))
    if length < 10 * size:
        return [corpus]
    cut = length - size
    # Bytes of each id, so that gigabytes are counted without a step for each token; the start token is no text.
    sizes = np.array([len(tokenizer.token_bytes(id_)) for id_ in range(tokenizer.vocab_size)])
    sizes[corpus.start_id] = 0
    held_bytes = starts = 0
    for first in range(cut + 1, length - 1, 1 << 20):
        ids = corpus.tokens[first : min(first + (1 << 20), length - 1)]
        held_bytes += int(sizes[ids].sum())
        starts += int((ids == corpus.start_id).sum())
    parts = []
    for first, last, name, documents, text_bytes in (
        (0, cut + 1, corpus.name, corpus.documents - starts, corpus.text_bytes - held_bytes),
        (cut, length, "held out", 1 + starts, held_bytes),
    ):
        learnt = None if corpus.learnt is None else between(corpus.learnt, first, last)
        tokens = between(corpus.tokens, first, last)
        part = replace(corpus, name=name, tokens=tokens, documents=documents, text_bytes=text_bytes, learnt=learnt)
        if corpus.starts is not None:
            part = replace(part, starts=corpus.starts[(corpus.starts >= first) & (corpus.starts < last)] - first)
        parts.append(part)
    return parts


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


@dataclass(frozen=True)
class Batch:
    """Windows side by side, ``[B, T]`` each.

    Attributes:
        ids: int64.
        targets: int64, the ids that follow; IGNORED where nothing is to be learnt.
        documents: int32, the number of the document that each id belongs to, from 0 in each row; a start token opens
            the document behind it. None unless asked for.
    """

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int32] | None = None


class Batches:
    """Batches of windows over a stream: each pass takes every window once, in an order and at a phase of its own."""

    def __init__(self, corpus: Corpus, rows: int, context: int, seed: int, *, mask_documents: bool = False) -> None:
        """``rows`` windows of ``context`` tokens a batch. Raises UsageError when the stream holds no whole window."""
        length = len(corpus.tokens)
        self._windows = (length - 1) // context - 1  # the phase takes up to one window
        if self._windows < 1:
            raise UsageError(
                f"the training text is {length:,} tokens: too few for windows of {context}",
                "use more text, or, for a new model, a smaller --context",
            )
        self._corpus, self._rows, self._context, self._seed = corpus, rows, context, seed
        self._mask_documents = mask_documents
        self._pass: tuple[int, npt.NDArray[np.int64] | _Shuffle, int] = (-1, np.empty(0, np.int64), 0)

    def at(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """The batch of a step, a pure function of (seed, step); of several ranks each takes its rows, in their order.

        ``rows`` should divide into ``ranks``.
        """
        first, last = (step * self._rows + self._rows * part // ranks for part in (rank, rank + 1))
        starts = [self._start(sample) for sample in range(first, last)]
        windows = self._rows_of(self._corpus.tokens, starts).astype(np.int64)  # [B, T + 1]
        ids, targets = windows[:, :-1], windows[:, 1:]
        if self._corpus.learnt is not None:
            learnt = self._rows_of(self._corpus.learnt, starts)[:, 1:]
            targets = np.where(learnt.astype(bool), targets, IGNORED)
        return Batch(ids, targets, self._documents(ids) if self._mask_documents else None)

    def _rows_of(self, tokens: Tokens, starts: list[int]) -> npt.NDArray[np.integer]:
        return np.stack([tokens[start : start + self._context + 1] for start in starts])

    def _documents(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        opens = ids == self._corpus.start_id
        opens[:, 0] = False
        return opens.cumsum(axis=1, dtype=np.int32)

    def _start(self, sample: int) -> int:
        number, place = divmod(sample, self._windows)
        if self._pass[0] != number:
            random = np.random.Generator(np.random.PCG64([self._seed, number]))
            table = self._windows <= _TABLE
            order = random.permutation(self._windows) if table else _Shuffle(self._windows, random)
            self._pass = (number, order, int(random.integers(self._context)))
        _, order, phase = self._pass
        return int(order[place]) * self._context + phase


class _Shuffle:
    """A random order of ``range(count)`` in no memory: a Feistel network, walked until it is back below ``count``.

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", the generalized Feistel and cycle walking.
    """

    def __init__(self, count: int, random: np.random.Generator) -> None:
        self._count = count
        self._bits = -(-(count - 1).bit_length() // 2)
        self._keys = [int(key) for key in random.integers(1 << 63, size=6)]

    def __getitem__(self, place: int) -> int:
        mask = (1 << self._bits) - 1
        while True:
            left, right = place >> self._bits, place & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            place = left << self._bits | right
            if place < self._count:
                return place


def _mix(value: int) -> int:
    """Spreads each bit over 64. Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


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
            "pip install tokenizers, or use an existing one with --tokenizer",
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
