"""The search behind ``complete``: continuations that depart from each other where the model is torn, in one batch.

A beam search whose hypotheses are compared by where they left a likelier one. Of the tokens that may follow a
hypothesis the likeliest inherits its rank, and each other one ranks by the probability of all up to itself. So one
hypothesis is what greedy decoding gives; the next ones are those that leave it, or each other, at the likeliest places,
and go on greedily from there. Ordinary beams are many endings of the same beginning; ones that differ in their first
token are far-fetched where that token is certain ("Once upon a" goes on with " time"). Nothing is drawn, so the same
text gives the same answer; and all grow together, so that whenever the search is broken off there is something of each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.cache import KVCache
from gptcli.text.cut import whole_characters
from gptcli.text.ends import Kind, end_of, ending_kinds, parting_kinds

# Tokens before which a word likelier ends than not: only there a text is cut that has not come to its end.
_LIKELY = 0.5


@dataclass(frozen=True)
class Text:
    """A text that was found.

    Attributes:
        logprob: of this text, and that it ends there, in nats.
        rank: of its hypothesis, where it left a likelier one (see above).
        ended: whether it came to its end, or was only cut behind a whole word.
    """

    text: str
    logprob: float
    rank: float
    ended: bool


@dataclass
class Hypothesis:
    """Tokens after the prompt, the bytes that they make, and the log-probability of them all (nats).

    Attributes:
        text: what stands behind the given bytes; None in the middle of a character, and while those are not all there.
        made: how many of the tokens make text.
        parent: the row of the one that it goes on from.
        cut: the ids, and the text, of its longest beginning so far that ends with a whole word.
    """

    ids: tuple[int, ...] = ()
    data: bytes = b""
    logprob: float = 0.0
    rank: float = 0.0
    text: str | None = None
    made: int = 0
    parent: int = 0
    cut: tuple[tuple[int, ...], Text] | None = None


@dataclass
class _Ways:
    """The ways to a text: the log-probability of each by its tokens."""

    ways: dict[tuple[int, ...], float] = field(default_factory=dict)
    rank: float = -math.inf

    @property
    def logprob(self) -> float:
        """Of all ways. One that goes on from another is part of that one; else no two of them can both come true."""
        apart = [way for way in self.ways if not any(way[:end] in self.ways for end in range(len(way)))]
        return _log_sum([self.ways[way] for way in apart])


class Beams:
    """One search.

    Args:
        model: whose tokens are looked at.
        given: the bytes that all hypotheses begin with, which do not count as their text.
        wanted: how many texts are looked for; with ``all_cuts`` each text that ends with a whole word is.
        rows: how many hypotheses go on at most.
        max_tokens: of a text, not counting those that only make ``given``.
        until: ``line``, ``word`` or ``sentence``.
        min_logprob: texts less likely are not looked for; one that becomes so is cut at its last whole word before.
    """

    def __init__(
        self,
        model: Model,
        given: bytes,
        *,
        wanted: int,
        rows: int,
        max_tokens: int,
        until: str,
        min_logprob: float = -math.inf,
        all_cuts: bool = False,
    ) -> None:
        self.rows = [Hypothesis(text=None if given else "")]
        self._tokenizer, self._given = model.tokenizer, given
        self._wanted, self._most_rows, self._most_tokens = wanted, rows, max_tokens
        self._until, self._min_logprob, self._all_cuts = until, min_logprob, all_cuts
        self._kinds = token_kinds(model)  # [V]
        self._reached = [] if given else [0.0]  # log-probabilities of the ways to make ``given``
        self._ended: dict[str, _Ways] = {}
        self._cut: dict[str, _Ways] = {}

    def grow(self, logits: Tensor) -> list[Hypothesis]:
        """Take in what may follow each of ``rows``, logits ``[B, V]``; the hypotheses that go on are the rows then.

        Their ``parent`` says from which row. None go on where there is nothing more to be found.
        """
        wide = logits.float().cpu()
        follow = []
        for place, row in enumerate(self.rows):
            # Row by row, and by operators that in pieces so small never wait for a second thread.
            logprobs = wide[place].log_softmax(-1)
            kinds = _ending(row, self._until)
            chances = torch.bincount(self._kinds, wide[place].softmax(-1), minlength=len(Kind)).tolist()
            end = _log(sum(chances[kind] for kind in kinds))
            likeliest = self._likeliest(row, logprobs, kinds)
            if row.text:
                first = not likeliest or end >= -likeliest[0][0]  # the end is one more thing that may follow
                rank = row.rank if first else row.logprob + end
                self._add(row.ids, Text(row.text, row.logprob + end, rank, True))
                self._note_cut(row, chances)
            follow += self._children(place, likeliest, end)
        self._choose(follow)
        return self.rows

    def texts(self) -> list[Text]:
        """What was found so far, the best rank first: merged by text, none less likely than what was asked for."""
        for row in self.rows:
            if row.cut:
                self._add(*row.cut)
        given = _log_sum(self._reached)
        found = []
        for text in self._ended.keys() | self._cut.keys():
            ended, cut = self._ended.get(text), self._cut.get(text)
            if ended and cut:  # which of the two it is depends on whether its end is likelier than not
                ended = ended if ended.logprob - cut.logprob >= math.log(_LIKELY) else None
            way = ended or cut
            assert way is not None
            found.append(Text(text, min(0.0, way.logprob - given), way.rank, ended is not None))
        likely = [each for each in found if each.logprob >= self._min_logprob]
        return sorted(likely, key=lambda each: (-each.rank, -each.logprob, each.text))

    def _note_cut(self, row: Hypothesis, chances: Sequence[float]) -> None:
        """Note that a row's text may be cut where it is, if its last word is likelier whole than not."""
        assert row.text is not None
        whole = sum(chances[kind] for kind in parting_kinds(row.text))
        logprob = row.logprob + _log(whole)
        if whole >= _LIKELY and logprob - _log_sum(self._reached) >= self._min_logprob:
            row.cut = row.ids, Text(row.text, logprob, row.rank, False)
            if self._all_cuts:
                self._add(*row.cut)

    def _likeliest(self, row: Hypothesis, logprobs: Tensor, ending: Collection[Kind]) -> list[tuple[float, int]]:
        """The tokens ``[V]`` that may follow a row, as (negative log-probability, id), the likeliest first."""
        if len(row.data) < len(self._given):
            ids = self._constrained(row, logprobs)
            logprobs = logprobs[ids]
        else:
            ids = None
            barred = torch.tensor(_barred(row, ending, self._most_tokens))
            logprobs = logprobs.masked_fill(barred.index_select(0, self._kinds), -math.inf)
        best = logprobs.topk(min(self._most_rows + 1, len(logprobs)))
        places = best.indices if ids is None else ids[best.indices]
        pairs = zip(best.values.tolist(), places.tolist(), strict=True)
        return sorted((-value, id_) for value, id_ in pairs if value > -math.inf)

    def _constrained(self, row: Hypothesis, logprobs: Tensor) -> Tensor:
        """The tokens that go on with what is left of ``given``: begin with it, or it with them."""
        rest = self._given[len(row.data) :]
        spelling, size = self._tokenizer.spelling, len(logprobs)
        extending, within = (
            torch.tensor([id_ for id_ in ids if id_ < size], dtype=torch.long)
            for ids in (spelling.extending(rest), spelling.within(rest))
        )
        if len(extending):
            self._reached.append(row.logprob + logprobs[extending].double().logsumexp(0).item())
        return torch.cat([extending, within])

    def _children(self, place: int, likeliest: Sequence[tuple[float, int]], end: float) -> list[Hypothesis]:
        """What a row's likeliest tokens (negative log-probability, id) make of it and is not at its end."""
        row = self.rows[place]
        follow = []
        for number, (surprise, id_) in enumerate(likeliest):
            inherits = number == 0 and -surprise > end and len(row.data) >= len(self._given)
            total = row.logprob - surprise
            child = self._child(row, id_, total, row.rank if inherits else total)
            if child:
                child.parent = place
                follow.append(child)
        return follow

    def _child(self, row: Hypothesis, id_: int, logprob: float, rank: float) -> Hypothesis | None:
        """A row with one more token; None where its text ends within the token, and is taken in, or is no UTF-8."""
        ids, data = (*row.ids, id_), row.data + self._tokenizer.token_bytes(id_)
        rest = data[len(self._given) :]
        try:
            text = rest[: whole_characters(rest)[1]].decode("utf-8")
        except UnicodeDecodeError:
            return None
        end = end_of(text, self._until)
        if end is not None:
            self._add(ids, Text(text[:end], logprob, rank, True))
            return None
        whole = len(data) >= len(self._given) and len(text.encode()) == len(rest)
        made = row.made + (len(data) > len(self._given))
        return Hypothesis(ids, data, logprob, rank, text if whole else None, made, cut=row.cut)

    def _choose(self, follow: Sequence[Hypothesis]) -> None:
        """Of all that may go on the rows that do. A text that becomes too unlikely is cut and taken in."""
        unlikely = self._min_logprob + _log_sum(self._reached)
        ranks = sorted((each.rank for each in self._ended.values()), reverse=True)
        enough = ranks[self._wanted - 1] if len(ranks) >= self._wanted and not self._all_cuts else -math.inf
        chosen: list[Hypothesis] = []
        seen = set()
        for child in sorted(follow, key=lambda each: (-each.rank, each.ids)):
            if len(chosen) == self._most_rows or child.rank < enough:
                break
            if child.data in seen:
                continue
            seen.add(child.data)
            if child.logprob >= unlikely:
                chosen.append(child)
            elif child.cut:
                self._add(*child.cut)
        for row in self.rows:
            if row.cut and row.made >= self._most_tokens:
                self._add(*row.cut)
        self.rows = chosen

    def _add(self, ids: tuple[int, ...], text: Text) -> None:
        shown = text.text.rstrip()
        if not shown or text.logprob == -math.inf:
            return
        found = (self._ended if text.ended else self._cut).setdefault(shown, _Ways())
        found.ways[ids] = max(text.logprob, found.ways.get(ids, -math.inf))
        found.rank = max(found.rank, text.rank)


def _ending(row: Hypothesis, until: str) -> Collection[Kind]:
    return () if row.text is None else ending_kinds(row.text, until)


def _barred(row: Hypothesis, ending: Collection[Kind], most_tokens: int) -> list[bool]:
    """For each kind whether its tokens may not follow a row."""
    if row.made >= most_tokens:
        return [True] * len(Kind)
    if row.text is None:  # only the rest of a character makes it whole
        return [kind != Kind.INSIDE for kind in Kind]
    return [kind in (Kind.NOTHING, Kind.INSIDE) or kind in ending for kind in Kind]


def rearrange(cache: KVCache, parents: Sequence[int]) -> list[int]:
    """Let each hypothesis have a row of what the one holds that it goes on from; says which one is in which row.

    Rows are moved only where they must be: most go on where they are.
    """
    places: list[int | None] = [None] * len(cache.lengths)
    waiting = []
    for number, parent in enumerate(parents):
        if places[parent] is None:
            places[parent] = number
        else:
            waiting.append(number)
    for number in waiting:
        if None not in places:
            places.append(None)
        free = places.index(None)
        cache.fork(parents[number], free)
        places[free] = number
    for place in reversed(range(len(places))):
        if places[place] is None:
            cache.leave(place)
            places[place] = places[-1]
            places.pop()
    return [number for number in places if number is not None]


def token_kinds(model: Model) -> Tensor:
    """The ``Kind`` of every token, ``[V]``; those of an end of text are ``END``, and those without text ``NOTHING``."""
    kinds = bytearray(model.tokenizer.spelling.kinds[: model.config.vocab_size].ljust(model.config.vocab_size, b"\0"))
    for id_ in model.config.eos_ids:
        kinds[id_] = Kind.END
    return torch.frombuffer(kinds, dtype=torch.uint8).long()


def _log(chance: float) -> float:
    return math.log(min(1.0, chance)) if chance > 0 else -math.inf


def _log_sum(logprobs: Sequence[float]) -> float:
    most = max(logprobs, default=-math.inf)
    return most if most == -math.inf else most + math.log(math.fsum(math.exp(each - most) for each in logprobs))
