"""generate(): prompts in, an iterator of steps out; owns stopping, length, the cache and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gptcli.core import runtime
from gptcli.core.build import Model
from gptcli.core.decode import Decoder
from gptcli.core.draft import Ahead, Lookup
from gptcli.core.draft_model import DraftModel
from gptcli.core.draw import Draw
from gptcli.core.graphs import DeviceLoop
from gptcli.core.requests import Choice, Finish, Request, Step, Timing, check_length
from gptcli.core.sampling import History
from gptcli.core.settings import Sampling
from gptcli.errors import CorruptError, UsageError
from gptcli.text.stops import Stops
from gptcli.text.stream import TextStream

# Room that the cache starts with beyond the prompt, where the end is open; it grows.
_ROOM = 256


def start_ids(model: Model) -> list[int]:
    """What an empty text starts from: the model's start token. Raises UsageError if it has none."""
    start = model.tokenizer.start_id if model.tokenizer.start_id is not None else model.config.bos_id
    if start is None:
        raise UsageError("the text is empty, and the model has no start token", "give some text")
    return [start]


def prompt_ids(model: Model, text: str, *, special: bool = False) -> list[int]:
    """The ids that a text becomes as a prompt, never none: the start token goes first where the tokenizer has one.

    With ``special`` the special tokens written out in the text become themselves. Raises UsageError for an empty text
    and a model without a start token. The length is the caller's to check (``check_prompt``).
    """
    return started(model, model.tokenizer.encode(text, special=special))


def started(model: Model, ids: list[int]) -> list[int]:
    """A text's ids behind the start token where the tokenizer has one, or the text is empty; never behind two."""
    start = model.tokenizer.start_id
    if ids and (start is None or ids[0] == start):
        return ids
    return start_ids(model) + ids


def check_prompt(model: Model, ids: Sequence[int]) -> None:
    """Raise LimitError for a prompt longer than the context, UsageError for ids that the model does not have."""
    check_length(ids, model.config.context, model.name)
    if ids and not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
        wrong = max(ids) if min(ids) >= 0 else min(ids)
        raise UsageError(
            f"token {wrong} is outside the vocabulary of {model.config.vocab_size:,}",
            "the tokenizer does not belong to this model",
        )


def check_finite(model: Model, values: Tensor, what: str = "logits") -> None:
    """Raise CorruptError for what a model made where it is no numbers: nothing sensible can come of it."""
    if not bool(torch.isfinite(values).all()):
        raise CorruptError(f"the {what} of {model.name} are not finite", "its weights are damaged: get them again")


def generate(
    model: Model,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    logprobs: int | None = None,
    slide: bool = False,
    timing: Timing | None = None,
    lookup: bool = True,
    draft: Model | None = None,
) -> Iterator[Step]:
    """Continue each request until it ends, all of them together, a token a step.

    Args:
        model: from ``open_model``.
        requests: one row each.
        sampling: the same for all.
        logprobs: report the chosen token's log-probability and those of so many likeliest; None reports nothing.
        slide: past the context, keep its last half and go on, instead of finishing.
        timing: filled in.
        lookup: guess what comes next from the text itself, where that leaves the text as it is: one row, native steps.
        draft: a smaller model that guesses instead, for one row; ``check_pair`` says which may. The text is another of
            the same distribution; at temperature 0 it is the same.

    Yields Steps in order of time, and of rows within a time. Raises LimitError for a prompt longer than the context,
    CorruptError for weights whose logits are not finite, UsageError for a ``draft`` and several requests.
    """
    if draft is not None and len(requests) > 1:
        raise UsageError("a draft model drafts for one text at a time", "generate them one after another")
    for request in requests:
        check_prompt(model, request.prompt)
    timing = timing or Timing()
    rows = [Row(i, request, model) for i, request in enumerate(requests)]
    yield from (Step(row.index, None, "", finish="length") for row in rows if row.request.max_tokens == 0)
    rows = [row for row in rows if row.request.max_tokens != 0]
    if not rows:
        return
    start = time.perf_counter()
    decoder: Decoder | Ahead
    decoder = plain = Decoder(model.transformer, model.stepping)
    capacity = _capacity(model, rows)
    logits = plain.prefill([row.window for row in rows], capacity)
    runtime.synchronize(model.device)
    timing.prefill_seconds += time.perf_counter() - start
    check_finite(model, logits)
    history = None
    if sampling.looks_back:
        history = History([row.request.prompt for row in rows], model.config.vocab_size, model.device)
    start = time.perf_counter()
    drawing: DeviceLoop | _Drawing | None = None
    if draft is None:
        seeds, positions = [row.request.seed for row in rows], [row.position for row in rows]
        drawing = plain.draw_on_device(logits, sampling, seeds, positions, history, ahead=logprobs is None)
    if drawing is None:
        plain_draw = Draw(sampling, model.stepping.library)
        draw: Callable[..., Tensor] = plain_draw
        if len(rows) == 1 and (draft or lookup):
            costs = plain.stepping.looking_costs
            drafter = DraftModel(draft, sampling, rows[0].request.seed) if draft else Lookup(costs)
            decoder = ahead = Ahead(plain, drafter, timing)
            ahead.begin(rows[0].window, capacity)
            draw = partial(ahead.draw, plain_draw)
        drawing = _Drawing(decoder, draw, logits, rows, history)
    timing.decode_seconds += time.perf_counter() - start
    ready = False
    while True:
        start = time.perf_counter()
        tokens = drawing.next()
        reports = None if logprobs is None else report(*drawing.drawn(), logprobs)
        timing.decode_seconds += time.perf_counter() - start
        timing.decoded_tokens += len(rows)
        kept = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            step = row.take(token, *(reports[place] if reports else (None, ())), slide=slide)
            yield step
            if step.finish is None:
                kept.append(place)
        if not kept:
            return
        if not ready and plain.cache is not None:
            # The first tokens are out; packing what steps need is still part of getting ready.
            start = time.perf_counter()
            plain.prepare()
            timing.prefill_seconds += time.perf_counter() - start
        ready = True
        start = time.perf_counter()
        if len(kept) < len(rows):
            rows = [rows[place] for place in kept]
            decoder.select(kept)
            if isinstance(drawing, _Drawing):  # the decoder has told its own loop
                drawing.select(kept)
        if any(row.slid for row in rows):
            logits = decoder.prefill_again([row.window for row in rows], _capacity(model, rows))
            if isinstance(drawing, _Drawing):
                drawing.refill(logits)
        timing.decode_seconds += time.perf_counter() - start


class _Drawing:
    """Draws the next token of each row and steps the decoder with it; ``DeviceLoop`` does both on the device."""

    def __init__(
        self,
        decoder: Decoder | Ahead,
        draw: Callable[..., Tensor],
        logits: Tensor,
        rows: Sequence[Row],
        history: History | None,
    ) -> None:
        """After the ``logits`` ``[B, V]`` of a prefill."""
        self._decoder, self._draw, self._logits, self._history = decoder, draw, logits, history
        self._seeds, self._positions = [row.request.seed for row in rows], [row.position for row in rows]
        self._drawn: Tensor | None = None  # what the decoder has not seen yet

    def next(self) -> list[int]:
        """The next token of each row."""
        if self._drawn is not None:
            self._logits = self._decoder.step(self._drawn)
        self._drawn = self._draw(self._logits, self._seeds, self._positions, self._history)
        self._positions = [position + 1 for position in self._positions]
        if self._history is not None:
            self._history.add(self._drawn)
        return self._drawn.tolist()

    def drawn(self) -> tuple[Tensor, Tensor]:
        """The logits ``[B, V]`` behind the last tokens, and these, ``[B]``."""
        assert self._drawn is not None
        return self._logits, self._drawn

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._seeds, self._positions = [self._seeds[row] for row in rows], [self._positions[row] for row in rows]
        if self._drawn is not None:
            self._drawn = self._drawn[torch.tensor(rows, device=self._drawn.device)]
        if self._history is not None:
            self._history.select(rows)

    def refill(self, logits: Tensor) -> None:
        """The decoder has read what is left of each text, the last tokens with it."""
        self._logits, self._drawn = logits, None


class Row:
    """One request while it runs."""

    def __init__(self, index: int, request: Request, model: Model) -> None:
        self.index = index
        self.request = request
        self.window = list(request.prompt)  # the tokens that the model sees next
        self.position = len(self.window)  # of the token to be drawn
        self.slid = 0  # tokens let go at the last step
        self._model = model
        self._made = 0
        self._stream = TextStream()
        self._stops = Stops(request.stop)
        self._eos = frozenset() if request.ignore_eos else frozenset(model.config.eos_ids)

    def take(self, token: int, chosen: Choice | None, top: tuple[Choice, ...], *, slide: bool) -> Step:
        """Add a drawn token."""
        if token in self._eos:
            return Step(self.index, None, self._ended()[0], finish="eos")
        self._made += 1
        self.position += 1
        self.window.append(token)
        text, stopped = self._stops.push(self._stream.push(self._model.tokenizer.token_bytes(token)))
        finish: Finish | None = None
        if stopped:
            finish = "stop"
        elif self._made == self.request.max_tokens:
            finish = "length"
        elif len(self.window) > self._model.config.context and not slide:
            finish = "context"
        if finish in ("length", "context"):
            rest, stopped = self._ended()
            text, finish = text + rest, "stop" if stopped else finish
        return Step(self.index, token, text, chosen, top, finish, 0 if finish else self._slide())

    def _slide(self) -> int:
        context = self._model.config.context
        self.slid = 0
        if len(self.window) > context:
            keep = max(1, context // 2)
            self.slid = len(self.window) - keep
            self.window = self.window[-keep:]
        return self.slid

    def _ended(self) -> tuple[str, bool]:
        """What was held back, and whether a stop was found in it."""
        text, stopped = self._stops.push(self._stream.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)


def _capacity(model: Model, rows: Sequence[Row]) -> int:
    """Cache room a row, in tokens: what is needed, or, where the end is open, some to start with."""
    limits = [row.request.max_tokens if row.request.max_tokens > 0 else _ROOM for row in rows]
    return min(max(len(row.window) + limit for row, limit in zip(rows, limits, strict=True)), model.config.context)


def report(logits: Tensor, drawn: Tensor, count: int) -> list[tuple[Choice, tuple[Choice, ...]]]:
    """For each row the chosen token's log-probability and the ``count`` likeliest tokens."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, drawn[:, None])[:, 0].tolist()  # [B]
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    tops = [
        tuple(Choice(id_, value) for id_, value in zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    return [(Choice(id_, value), top) for id_, value, top in zip(drawn.tolist(), chosen, tops, strict=True)]
