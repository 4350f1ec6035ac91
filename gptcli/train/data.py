"""Training data: documents to one stream of tokens, the stream to batches.

Documents are packed one after the other, each behind the start token. The batch of a step is a pure function of
(seed, step): nothing to store, nothing to lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptcli.errors import UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.documents import SEPARATOR


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


def hold_out_end(corpus: Corpus, tokenizer: Tokenizer, fraction: float = 0.01, least: int = 256) -> list[Corpus]:
    """A stream of too few documents in two: what to train on, and its last tokens to evaluate on.

    The end is ``fraction`` of the tokens, but ``least`` of them; alone comes what is too short to give that away.
    """
    size = max(least, round(fraction * len(corpus.tokens)))
    if len(corpus.tokens) < 10 * size:
        return [corpus]
    cut = len(corpus.tokens) - size
    held_bytes = len(tokenizer.decode_bytes(int(id_) for id_ in corpus.tokens[cut + 1 : -1]))
    rest = Corpus(corpus.name, corpus.tokens[: cut + 1], corpus.documents, corpus.text_bytes - held_bytes)
    return [rest, Corpus("held out", corpus.tokens[cut:], 1, held_bytes)]


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
