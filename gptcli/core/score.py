"""Surprise: how many bits a model needs for each token of a text that is longer than its context.

A document's tokens are predicted in windows. The first window scores all of its tokens; each later one begins
``stride`` tokens after the one before and scores only what that one did not reach, with the rest as context. Windows
of all documents, long and short, go through the model in batches. What is not a target has no logits made of it.

Training evaluates by the same windows, batches and sums (``train/evaluate.py``).

Source: the sliding window of Hugging Face's "Perplexity of fixed-length models"; but a token's prediction is made from
up to a whole context of tokens before it, where that page counts the target into the context.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.generate import check_finite
from gptcli.errors import UsageError
from gptcli.spec.plan import LOGIT_CHUNK

# A target that is not to be scored; cross entropy's usual mark for it.
IGNORED = -100

# Logits of one chunk, in elements: on a CPU they stay in its cache, on a GPU they keep every multiprocessor busy.
LOGIT_CHUNKS = {"cpu": 1 << 21, "cuda": LOGIT_CHUNK}
# Tokens of a batch, padding included: enough to keep a device busy.
_BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 15}
# Batches whose windows are sorted together: the more, the less padding, and the later the first results.
_GROUP = 8


class Mark(enum.Enum):
    """What stands between the ids of a stream of documents: a document's end, or a pause in which results are due."""

    END = "end"
    PAUSE = "pause"


# Token ids of documents, in pieces of any size, each document's followed by ``Mark.END``.
Stream = Iterable[Sequence[int] | Mark]


@dataclass(frozen=True)
class Window:
    """What goes through the model as one row: ``ids`` ``[T]``, and ``targets`` ``[T]``, the id that follows each.

    Targets are IGNORED where an earlier window has scored them, or where nothing follows. ``last`` ends a document.
    """

    ids: Tensor
    targets: Tensor
    last: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether there is anything to compute."""
        return bool((self.targets != IGNORED).any())


@dataclass(frozen=True)
class Scored:
    """Some tokens of a document, in their order.

    Attributes:
        document: its number in the stream, from 0.
        ids: ``[N]`` int64, on the host.
        nats: ``[N]`` float32, on the host; NaN for a first token that nothing stands before.
        last: whether the document ends with them.
    """

    document: int
    ids: Tensor
    nats: Tensor
    last: bool

    @property
    def total_bits(self) -> float:
        """Of the tokens that have a score."""
        return self.nats.double().nansum().item() / math.log(2)

    @property
    def tokens_scored(self) -> int:
        return len(self.nats) - int(self.nats.isnan().sum())

    def tokens(self) -> list[tuple[int, float | None]]:
        """The id and the bits of each token; None for the one without a score."""
        bits = (self.nats.double() / math.log(2)).tolist()
        return [(id_, None if math.isnan(value) else value) for id_, value in zip(self.ids.tolist(), bits, strict=True)]


@dataclass
class Totals:
    """Sums over documents; ``bytes`` are those of their text in UTF-8."""

    bits: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def add(self, other: Totals) -> None:
        self.bits += other.bits
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.documents += other.documents

    @property
    def bits_per_byte(self) -> float | None:
        """None where nothing was scored."""
        return self.bits / self.bytes if self.tokens and self.bytes else None

    @property
    def perplexity(self) -> float | None:
        """2 to the mean bits a token; None where nothing was scored, or where it is beyond any number."""
        try:
            return 2 ** (self.bits / self.tokens) if self.tokens else None
        except OverflowError:
            return None


def start_token(model: Model) -> int | None:
    """The token that a document starts from, whether the tokenizer writes it or not; None if the model has none."""
    return model.tokenizer.start_id if model.tokenizer.start_id is not None else model.config.bos_id


def default_stride(context: int) -> int:
    """Half the context: every token but the first ones is predicted from at least that much."""
    return max(1, context // 2)


def score(
    model: Model, stream: Stream, *, stride: int | None = None, batch_tokens: int | None = None
) -> Iterator[Scored]:
    """Score every token of some documents, each from the model's start token, if it has one.

    Without one a document's first token has no score. Memory is bounded by some batches, however long the documents.

    Args:
        model: from ``open_model``.
        stream: the documents' token ids, without the start token.
        stride: tokens from the beginning of one window to that of the next, from 1 to the context; half of it if None.
        batch_tokens: how many tokens go through the model at once, at least a window; by the device if None.

    Yields each document's tokens in order, in pieces, the last of them marked; an empty document is one empty piece.
    Raises UsageError for a stride out of range or an id that the model does not have, CorruptError for weights whose
    logits are not finite.
    """
    context, start = model.config.context, start_token(model)
    stride = default_stride(context) if stride is None else stride
    check_stride(stride, context)
    room = batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
    document = 0
    fresh = True  # nothing of the document has been given yet
    for group in _groups(_windows_of(stream, start, context, stride), room):
        known: dict[int, Tensor] = {}
        given = 0
        for numbers, ids, targets in [*batches(group, room), ((), torch.empty(0), torch.empty(0))]:
            if numbers:
                _check_ids(model, ids)
                nats = target_nats_of(model, ids.to(model.device), targets.to(model.device)).cpu()
                check_finite(model, nats)
                counts = (targets != IGNORED).sum(1).tolist()
                known.update(zip(numbers, nats.split(counts), strict=True))
            while given < len(group) and (given in known or not group[given].has_targets):
                window = group[given]
                told, values = window.targets[window.targets != IGNORED], known.pop(given, torch.empty(0))
                if fresh and start is None and len(window.ids):
                    told, values = torch.cat([window.ids[:1], told]), torch.cat([torch.tensor([math.nan]), values])
                yield Scored(document, told, values, window.last)
                fresh = window.last
                document += window.last
                given += 1


def check_stride(stride: int, context: int) -> None:
    """Raise UsageError for a stride that skips tokens, or does not go on."""
    if not 1 <= stride <= context:
        raise UsageError(f"a stride of {stride} is out of range", f"it should be from 1 to the context, {context:,}")


# --- From documents to windows


def windows(pieces: Iterable[tuple[Tensor, Tensor]], context: int, stride: int) -> Iterator[Window]:
    """The windows of one document, the last of them marked; of less than two tokens it has one without a target.

    ``pieces`` are its ids and, the same ids again, its targets (both ``[N]`` int64), IGNORED where they are not to be
    scored. The first id is only context.
    """
    ids = targets = torch.empty(0, dtype=torch.int64)
    scored = 0  # so many targets of the next window have been scored by those before
    ready: Window | None = None
    for more, wanted in pieces:
        ids, targets = torch.cat([ids, more]), torch.cat([targets, wanted])
        while len(ids) > context:
            if ready:
                yield ready
            ready = _window(ids[: context + 1], targets[: context + 1], scored)
            ids, targets = ids[stride:], targets[stride:]
            scored = context - stride
    if len(ids) - 1 > scored:
        if ready:
            yield ready
        ready = _window(ids, targets, scored)
    if ready is None:
        yield Window(ids, torch.full_like(ids, IGNORED), last=True)
    else:
        yield Window(ready.ids, ready.targets, last=True)


def _window(ids: Tensor, targets: Tensor, scored: int) -> Window:
    wanted = targets[1:].clone()
    wanted[:scored] = IGNORED
    return Window(ids[:-1], wanted)


def _windows_of(stream: Stream, start: int | None, context: int, stride: int) -> Iterator[Window | None]:
    """The windows of all documents; None is a pause."""
    pieces = iter(stream)
    paused = False

    def document(first: Sequence[int] | Mark) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal paused
        piece: Sequence[int] | Mark | None = first
        if start is not None:
            yield (torch.tensor([start]),) * 2
        while piece is not None and piece is not Mark.END:
            if isinstance(piece, Mark):
                paused = True
            elif len(piece):
                yield (torch.tensor(piece, dtype=torch.int64),) * 2
            piece = next(pieces, None)

    for piece in pieces:
        if piece is Mark.PAUSE:
            yield None
            continue
        yield from windows(document(piece), context, stride)
        if paused:
            paused = False
            yield None


# --- From windows to batches


def _groups(windows: Iterable[Window | None], room: int) -> Iterator[list[Window]]:
    """Windows in turn, as many as make some batches of ``room`` tokens, or up to a pause."""
    group: list[Window] = []
    size = 0
    for window in windows:
        if window is not None:
            group.append(window)
            size += max(1, len(window.ids))
        if group and (window is None or size >= _GROUP * room):
            yield group
            group, size = [], 0
    if group:
        yield group


def batches(group: Sequence[Window], room: int) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Windows of like length side by side, up to ``room`` tokens with their padding (but a row at least).

    Yields which windows they are, and their ids and targets, ``[B, T]``, padded on the right, which nobody sees. Long
    ones come first, and of the same length in their order. Windows with nothing to score are left out.
    """
    wanted = [number for number, window in enumerate(group) if window.has_targets]
    wanted.sort(key=lambda number: -len(group[number].ids))
    first = 0
    while first < len(wanted):
        length = len(group[wanted[first]].ids)
        rows = wanted[first : first + max(1, room // length)]
        ids = torch.zeros((len(rows), length), dtype=torch.int64)
        targets = torch.full((len(rows), length), IGNORED)
        for row, number in enumerate(rows):
            window = group[number]
            ids[row, : len(window.ids)], targets[row, : len(window.ids)] = window.ids, window.targets
        yield rows, ids, targets
        first += len(rows)


def all_batches(windows: Iterable[Window], room: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``ids`` and ``targets`` of all batches, for who wants the sum alone."""
    for group in _groups(windows, room):
        for _, ids, targets in batches(group, room):
            yield ids, targets


# --- From batches to nats


@torch.inference_mode()
def target_nats_of(model: Model, ids: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy ``[N]`` (nats, float32) of each target of ``[B, T]`` that is not IGNORED, row by row."""
    transformer = model.transformer
    wanted = targets != IGNORED
    vectors = transformer.norm(transformer.residual_stream(ids)[wanted])  # [N, C]
    return target_nats(vectors, transformer.unembedding, model.config.vocab_size, targets[wanted])


def target_nats(vectors: Tensor, unembedding: Callable[[Tensor], Tensor], vocab_size: int, targets: Tensor) -> Tensor:
    """The cross entropy ``[N]`` (nats, float32) of targets ``[N]`` by the logits of ``vectors`` ``[N, C]``.

    The logits are made chunk by chunk, and their softmax is in float32, whatever they are in.
    """
    size = max(1, LOGIT_CHUNKS.get(vectors.device.type, LOGIT_CHUNKS["cpu"]) // vocab_size)
    nats = torch.empty(len(vectors), dtype=torch.float32, device=vectors.device)
    for first in range(0, len(vectors), size):
        part = slice(first, first + size)
        logprobs = unembedding(vectors[part]).float().log_softmax(-1)  # [N, V]
        nats[part] = -logprobs.gather(1, targets[part, None])[:, 0]
    return nats


def _check_ids(model: Model, ids: Tensor) -> None:
    if int(ids.max()) >= model.config.vocab_size:
        raise UsageError(
            f"token {int(ids.max())} is outside the vocabulary of {model.config.vocab_size:,}",
            "the tokenizer does not belong to this model",
        )


@torch.inference_mode()
def score_slowly(model: Model, ids: Sequence[int], stride: int | None = None) -> list[float | None]:
    """The bits of each token of one document: the slow twin of ``score``, a forward pass a token, in float64 from the
    logits on.
    """
    context, start = model.config.context, start_token(model)
    stride = default_stride(context) if stride is None else stride
    tokens = list(ids) if start is None else [start, *ids]
    bits: list[float | None] = [None] if start is None and ids else []
    for place in range(1, len(tokens)):
        # The first window that holds the token as a target.
        window = max(0, math.ceil((place - context) / stride))
        logits = model.transformer(torch.tensor([tokens[window * stride : place]], device=model.device))[0, -1]
        bits.append(-logits.double().log_softmax(-1)[tokens[place]].item() / math.log(2))
    return bits
