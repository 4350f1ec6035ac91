"""complete(): a few short continuations for a cursor, the likeliest first; silent where it is unsure, never late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptcli.core.beams import Beams, Text, rearrange
from gptcli.core.build import Model
from gptcli.core.cache import KVCache
from gptcli.core.decode import padded
from gptcli.core.generate import check_finite, check_prompt, started
from gptcli.core.prefixes import Prefixes
from gptcli.core.stepping import Forward
from gptcli.errors import LimitError, UsageError
from gptcli.text.ends import UNTIL
from gptcli.text.tokenizer import Tokenizer

# Hypotheses that go on together for each text asked for, so that there are others where some turn out to be the same.
_ROWS = 2
# Tokens of a prompt that are computed between two looks at the clock.
_CHUNK = 64
# Bytes of a prefix that are looked at for each token of the context: more than a token has on average in any text.
_BYTES = 16
# Tokens of a suffix that texts are ranked by, and how many texts are.
_SUFFIX_TOKENS, _SUFFIX_TEXTS = 32, 32
# Texts that are ranked together, and the share of a deadline that is left for it.
_SUFFIX_ROWS, _SUFFIX_SHARE = 8, 0.4
_MANY = 1 << 20  # steps, as of a process that lives long


@dataclass(frozen=True)
class Completion:
    """A text that may follow the prefix, and its probability (see ``complete``)."""

    text: str
    probability: float


@dataclass(frozen=True)
class Completions:
    """What ``complete`` found.

    Attributes:
        completions: best first; none where nothing is likely enough.
        tokens: of the prefix that were read; ``known`` how many of them were not computed.
        truncated: whether the prefix's beginning was left out.
        late: whether the deadline broke it off.
    """

    completions: tuple[Completion, ...]
    tokens: int
    known: int = 0
    truncated: bool = False
    late: bool = False

    def plain(self, model: Model) -> dict[str, Any]:
        """As JSON has it, with the model that it is of."""
        completions = [{"text": each.text, "probability": each.probability} for each in self.completions]
        counts = {"tokens": self.tokens, "known": self.known, "truncated": self.truncated, "late": self.late}
        return {"model": model.name, "completions": completions, **counts, **model.used}


@torch.inference_mode()
def complete(
    model: Model,
    prefix: str,
    *,
    suffix: str = "",
    num: int = 3,
    max_tokens: int = 16,
    until: str = "line",
    min_prob: float = 0.0,
    deadline_seconds: float | None = None,
    prefixes: Prefixes | None = None,
    special: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Completions:
    """What may follow ``prefix``: up to ``num`` different texts, the same ones each time.

    A text ends with the word, line or sentence that the cursor is in. Where ``max_tokens`` or the deadline come first
    it is cut behind its last whole word. How different texts are found tells ``core/beams.py``.

    Its probability is that the model, at temperature 1, goes on from the prefix with just this text and lets it end
    there: the product of its tokens' probabilities and of that of all tokens together before which it ends (those that
    begin a new word, line or sentence, or the end of text; behind a whole word where it was only cut). Different tokens
    that make the same text are added up, as far as they were found. With ``until="word"`` these are so the
    probabilities of different events, at most 1 together.

    The prefix's last token, or as many as could together begin a longer one, is given back: texts go on from the
    tokens before it and have to begin with its bytes (token healing), and probabilities are given that they do.

    Args:
        suffix: what stands behind the cursor. Texts are then those among the likeliest with the largest
            log p(text | prefix) + log p(suffix | prefix + text), of the suffix's first 32 tokens, and may end behind
            any whole word, since the suffix goes on from there. ``probability`` is still that of the text alone.
        max_tokens: of a text, at most.
        until: ``line``, ``word`` or ``sentence``.
        min_prob: a text goes on only while its probability is at least this: it is cut at its last whole word before,
            and left out where there is none.
        deadline_seconds: from now. The clock is looked at between steps, and no step is begun that would be late if it
            took as long as the last one; what was found until then comes back.
        prefixes: where prefixes are looked up and remembered, also halves of some that came too late.
        special: whether special tokens that are written out in the prefix become themselves.
        clock: for tests.

    Of a long prefix only the end is read: at most as many tokens as with ``max_tokens`` more fit the context. It begins
    at the same place for many keys, so that it is not computed anew with each.

    Raises UsageError for values out of range, or an empty prefix and a model without a start token, LimitError for
    ``max_tokens`` that leave no room for a prefix, CorruptError for weights whose logits are not finite.
    """
    _check(model, num, max_tokens, until, min_prob, deadline_seconds)
    timer = _Timer(clock, deadline_seconds)
    kept, given, truncated = _prompt(model, prefix, max_tokens, special)
    room = max_tokens + len(given)
    # Whoever remembers prefixes lives long; whoever is in a hurry prepares nothing.
    steps = _MANY if prefixes else room if deadline_seconds is None else 1
    reader = _Reader(model, prefixes, kept, room=room, steps=steps, rows=_ROWS * num)
    logits = reader.read(timer)
    if logits is None:
        return Completions((), len(kept), reader.known, truncated, late=True)
    beams = Beams(
        model,
        given,
        wanted=num,
        rows=_ROWS * num,
        max_tokens=max_tokens,
        until=until,
        min_logprob=math.log(min_prob) if min_prob else -math.inf,
        all_cuts=bool(suffix),
    )
    root = reader.cache.copy(0, len(kept), len(kept)) if suffix else reader.cache
    timer.other_steps()
    search = timer.part(1 - _SUFFIX_SHARE) if suffix else timer
    late = _search(beams, reader, logits, search)
    texts = beams.texts()
    if suffix:
        timer.other_steps()
        ranking = _Ranking(model, reader.forward, root, logits[0], given.decode())
        chosen, in_time = ranking.best(texts, suffix, num, timer)
        late = late or not in_time
    else:
        chosen = sorted(_different(texts)[:num], key=lambda each: -each.logprob)
    found = tuple(Completion(each.text, math.exp(each.logprob)) for each in chosen)
    return Completions(found, len(kept), reader.known, truncated, late)


def _check(model: Model, num: int, max_tokens: int, until: str, min_prob: float, deadline: float | None) -> None:
    for name, value in (("num", num), ("max_tokens", max_tokens)):
        if value < 1:
            raise UsageError(f"{name} {value} is out of range", "it should be 1 or more")
    if until not in UNTIL:
        raise UsageError(f"until {until!r} is not a choice", f"use {', '.join(UNTIL)}")
    if not 0 <= min_prob <= 1:
        raise UsageError(f"a probability of {min_prob} is out of range", "it should be from 0 to 1")
    if deadline is not None and not deadline > 0:
        raise UsageError(f"a deadline of {deadline} s is out of range", "it should be more than 0")
    if max_tokens >= model.config.context:
        raise LimitError(
            f"{max_tokens:,} tokens leave no room for a prefix: the context of {model.name} is "
            f"{model.config.context:,}",
            "ask for fewer tokens",
        )


class _Timer:
    """Says whether there is time for one more step."""

    def __init__(self, clock: Callable[[], float], seconds: float | None) -> None:
        self.clock, self.seconds = clock, seconds
        self.start = self.last = clock()
        self.fresh = True  # no step was taken yet that would tell how long the next one takes

    def part(self, share: float) -> _Timer:
        """The same time with an earlier end."""
        part = _Timer(self.clock, None if self.seconds is None else self.seconds * share)
        part.start = self.start
        return part

    def other_steps(self) -> None:
        """Steps of another kind follow: how long the last one took says nothing about them."""
        self.fresh = True

    def enough(self) -> bool:
        """Called between steps: whether another one would be in time, if it takes as long as the last."""
        now = self.clock()
        step = 0.0 if self.fresh else now - self.last
        self.last, self.fresh = now, False
        return self.seconds is None or now + step <= self.start + self.seconds


def _prompt(model: Model, prefix: str, max_tokens: int, special: bool) -> tuple[list[int], bytes, bool]:
    """The ids to go on from, the bytes given back, and whether the beginning was left out."""
    most = model.config.context - max_tokens
    first = _window(len(prefix), most * _BYTES)
    ids = model.tokenizer.encode(prefix[first:], special=special, follows=first > 0)
    back = heal(model.tokenizer, ids)
    if model.tokenizer.start_id is None and model.config.bos_id is None:
        back = min(back, max(0, len(ids) - 1))  # there is nothing else to go on from
    given = model.tokenizer.decode_bytes(ids[len(ids) - back :], follows=True)
    ids = ids[: len(ids) - back]
    ids = started(model, ids)
    # What was given back has to be made again.
    most = max(1, most - back)
    start = _window(len(ids), most)
    check_prompt(model, ids[start:])
    return ids[start:], given, bool(first or start)


def _window(length: int, most: int) -> int:
    """Where to begin so that at most so many are left, and at the same place for a quarter of that many more."""
    step = max(1, most // 4)
    return 0 if length <= most else -(-(length - most) // step) * step


def heal(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """How many of a text's last tokens to give back: as many as a longer token could begin with, and at least one.

    The last one always, since a token might begin within it, too. They begin where a character does. Special tokens
    stand.
    """
    special = set(tokenizer.special_tokens.values())
    data, count = b"", 0
    for number, id_ in enumerate(reversed(ids), 1):
        data = tokenizer.token_bytes(id_) + data
        # One longer than all tokens may have to be, in whose middle a character begins.
        if id_ in special or (len(data) > tokenizer.spelling.longest and count):
            break
        if data and data[0] & 0xC0 != 0x80 and (not count or tokenizer.spelling.can_grow(data)):
            count = number
    return count


class _Reader:
    """Goes through a prompt: what is known of it, then the rest in pieces; keeps what it learned."""

    def __init__(
        self, model: Model, prefixes: Prefixes | None, ids: Sequence[int], *, room: int, steps: int, rows: int
    ) -> None:
        self.model, self.prefixes, self.ids = model, prefixes, ids
        self.steps, self.most_rows = steps, rows
        self.forward, dtype = model.stepping.prefill(prompt=len(ids), tokens=steps, rows=rows)
        capacity = min(len(ids) + room, model.config.context)
        # With places for the rows to come.
        self.cache = model.transformer.new_cache(rows, capacity, dtype)
        self.cache.set_lengths([0])
        found, self.logits = prefixes.find(ids, len(ids)) if prefixes else (None, None)
        if found:
            self.cache.set_lengths([])
            self.cache.join(found)
        self.known = self.cache.lengths[0]

    def read(self, timer: _Timer) -> Tensor | None:
        """The logits ``[1, V]`` of the next token; None where the time was up before."""
        if self.logits is not None:
            return self.logits[None]
        done = self.known
        while done < len(self.ids):
            if not timer.enough():
                if self.prefixes and done > self.known:  # the next time it goes on from here
                    self.prefixes.keep(self.ids[:done], self.cache, 0)
                return None
            end = len(self.ids) if timer.seconds is None else min(len(self.ids), done + _CHUNK)
            piece = torch.tensor([self.ids[done:end]], device=self.model.device)
            last = torch.tensor([end - done - 1], device=self.model.device)
            logits = self.forward(piece, self.cache, last=last)
            done = end
        check_finite(self.model, logits)
        if self.prefixes:
            self.prefixes.keep(self.ids, self.cache, 0, logits[0])
        return logits


def _search(beams: Beams, reader: _Reader, logits: Tensor, timer: _Timer) -> bool:
    """Let the hypotheses grow until nothing more is to be found; whether the time was up before."""
    step = None
    while beams.grow(logits):
        if not timer.enough():
            return True
        cache, longest = reader.cache, reader.cache.lengths[0] + 1
        if longest > reader.model.config.context:
            return False
        if longest > cache.capacity:
            cache.grow(longest)
        order = rearrange(cache, [row.parent for row in beams.rows])
        beams.rows = [beams.rows[number] for number in order]
        step = step or reader.model.stepping.step(tokens=reader.steps, rows=reader.most_rows)
        tokens = torch.tensor([row.ids[-1] for row in beams.rows], device=reader.model.device)
        logits = step(tokens, cache)
    return False


def _different(texts: Sequence[Text]) -> list[Text]:
    """Without those that were only cut, and others begin with."""
    return [
        each
        for each in texts
        if each.ended or not any(other is not each and other.text.startswith(each.text) for other in texts)
    ]


class _Ranking:
    """How well a suffix follows texts.

    What is compared is the log-probability of the rest of the prompt, the text and the suffix as tokens of one piece.
    """

    def __init__(self, model: Model, forward: Forward, root: KVCache, logits: Tensor, given: str) -> None:
        self.model, self.forward, self.root = model, forward, root
        self.first = logits.float().log_softmax(-1)  # [V]
        self.given = given

    def best(self, texts: Sequence[Text], suffix: str, num: int, timer: _Timer) -> tuple[list[Text], bool]:
        """The ``num`` texts that it follows best, and whether there was time to look at all.

        The likeliest texts are looked at first; those that were not come last.
        """
        likely = sorted(texts, key=lambda each: -each.logprob)[:_SUFFIX_TEXTS]
        tokens = self.model.tokenizer.encode(suffix[: _SUFFIX_TOKENS * _BYTES], follows=True)[:_SUFFIX_TOKENS]
        follows = self.model.tokenizer.decode_bytes(tokens, follows=True).decode("utf-8", errors="ignore")
        logprobs: list[float] = []
        for start in range(0, len(likely), _SUFFIX_ROWS):
            if not timer.enough():
                break
            logprobs += self._logprobs([self.given + each.text + follows for each in likely[start:][:_SUFFIX_ROWS]])
        looked = sorted(zip(logprobs, likely, strict=False), key=lambda each: (-each[0], each[1].text))
        chosen = [text for _, text in looked] + likely[len(logprobs) :]
        return chosen[:num], len(logprobs) == len(likely)

    def _logprobs(self, texts: Sequence[str]) -> list[float]:
        room = self.model.config.context - self.root.lengths[0]
        ids = [self.model.tokenizer.encode(text, follows=True)[:room] for text in texts]
        cache = self.root.copy(0, self.root.lengths[0], self.root.lengths[0] + max(map(len, ids)))
        cache.select([0] * len(ids))
        logits = self.forward(torch.tensor(padded(ids), device=self.model.device), cache)
        found = []
        for row, each in zip(logits, ids, strict=True):
            logprobs = torch.cat([self.first[None], row[: len(each) - 1].float().log_softmax(-1)])  # [T, V]
            chosen = logprobs.gather(1, torch.tensor(each, device=logprobs.device)[:, None])
            found.append(chosen.double().sum().item())
        return found
