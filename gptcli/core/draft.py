"""Drafting: guess the next tokens, look at all of them in one step, and keep those that the model says itself.

A step reads every weight once, for one token or for several; so to look at a few guesses costs little more than to make
one token. ``Ahead`` does it behind the back of whoever decodes: it is stepped a token at a time, and where that token
was guessed the logits that come next are there already. Nothing else changes: every token is chosen from the model's
own logits, by the same chain and the same noise. With a native step, whose logits do not depend on how many tokens are
looked at together, the text is that of plain decoding to the bit.

Guesses come from a ``Drafter``: ``Lookup`` finds them in the text itself, ``DraftModel`` (``core/draft_model.py``) asks
a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gptcli.core.draw import Draw
from gptcli.core.sampling import History, filter_logits, gumbel_noise, noise_keys

if TYPE_CHECKING:
    from gptcli.core.decode import Decoder
    from gptcli.core.requests import Timing

# Tokens looked up at a time. Sixteen at once cost a native step three or four times what one costs.
_MOST = 15
# What a token that is looked up costs, in steps: a tenth where the weights come from memory, half where they are few;
# and where they are multiplied by tiles, a tenth in any case.
COST, COST_BY_TILES = 0.5, 0.1
# Steps that looking up may cost before it has gained any; what it may have in store; and what each step without it
# allows again, so that a text without repeats pays a hundredth at most for a look now and then.
_CREDIT, _MOST_CREDIT, _ALLOWED = 2.0, 8.0, 0.01
# What parts the noise of one decision from that of another, and from that of plain draws: bits of pi.
_ACCEPT, _REST = 0x13198A2E03707344, 0x24093822299F31D0


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next.

    Attributes:
        tokens: in their order; none where there is no guess.
        filtered: ``[T, V]``, where they were drawn: what each was drawn from, as ``filter_logits`` leaves it.
    """

    tokens: Sequence[int] = ()
    filtered: Tensor | None = None


_NOTHING = Proposal()


class Drafter(Protocol):
    """Where proposals come from. It is told of every token, in order."""

    exact_only: bool  # of use only where looking at several tokens gives the same bits as at one

    def start(self, ids: Sequence[int], capacity: int) -> None:
        """The text is now this, and may grow to about ``capacity`` tokens.

        After a first time it has lost its beginning, and has one new token at its end.
        """

    def add(self, token: int) -> None:
        """The text goes on with this token."""

    def propose(self, most: int) -> Proposal:
        """What may follow, up to ``most`` tokens (1 or more)."""

    def tell(self, drafted: int, accepted: int) -> None:
        """Of the last proposal's tokens so many were right."""


class Allowance:
    """How many tokens to look up: from counts of what came of it, never from a clock.

    An account in steps. A token that is looked up costs, a right one gains a step, and without credit nothing is looked
    up. So the loss has a bound, and a text that begins to repeat is found again.
    """

    def __init__(self, cost: float = COST) -> None:
        """``cost``: of a token that is looked up, in steps."""
        self._cost, self._credit = cost, _CREDIT
        self._longest = 3  # a proposal; a right one makes the next longer

    def step(self) -> int:
        """One more step is to be taken where there is a guess: with so many tokens looked up, at most."""
        self._credit = min(self._credit + _ALLOWED, _MOST_CREDIT)
        return min(int(self._credit / self._cost), self._longest)

    def tell(self, drafted: int, accepted: int) -> None:
        """What came of a proposal."""
        self._credit += accepted - self._cost * drafted
        self._longest = min(accepted + 3, _MOST)


class Lookup:
    """What followed where the last tokens of the text stood before (Saxena 2023, "Prompt lookup decoding").

    Three tokens are looked for, then two; the last place counts. Where it is so near that the guess would reach the
    text's end, the text is taken to go round in a circle.
    """

    exact_only = True

    def __init__(self, cost: float = COST) -> None:
        """``cost``: as of ``Allowance``."""
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens of a place -> where it goes on
        self._found: int | None = None  # where the text's end stood before, and went on
        self._allowance = Allowance(cost)

    def start(self, ids: Sequence[int], capacity: int) -> None:
        self._text = list(ids[:-1])
        pairs = zip(self._text, self._text[1:], strict=False)
        triples = zip(self._text, self._text[1:], self._text[2:], strict=False)
        self._after = {pair: place for place, pair in enumerate(pairs, 2)}
        self._after.update((triple, place) for place, triple in enumerate(triples, 3))
        self.add(ids[-1])

    def add(self, token: int) -> None:
        text, after = self._text, self._after
        text.append(token)
        place = len(text)
        if place < 3:
            after[tuple(text)] = place
            return
        triple, pair = (text[-3], text[-2], token), (text[-2], token)
        self._found = after.get(triple) or after.get(pair)
        after[triple] = after[pair] = place

    def propose(self, most: int) -> Proposal:
        if self._found is None:
            return _NOTHING
        count = min(most, self._allowance.step())
        if count < 1:
            return _NOTHING
        again = self._text[self._found : self._found + count]
        period = len(again)
        return Proposal(again + [again[place % period] for place in range(period, count)])

    def tell(self, drafted: int, accepted: int) -> None:
        self._allowance.tell(drafted, accepted)


class Ahead:
    """A decoder of one row that looks ahead, stepped like a ``Decoder``; ``timing`` counts what came of it."""

    def __init__(self, decoder: Decoder, drafter: Drafter, timing: Timing) -> None:
        self._decoder, self._timing = decoder, timing
        self._drafter: Drafter | None = drafter
        self._several: Callable[[Sequence[int]], Tensor] | None = None
        self._proposal = _NOTHING
        self._logits = torch.empty(0)  # [1 + T, V] after the token before the proposal, and after each of it
        self._place = 0  # tokens of the proposal that are in the text

    @torch.inference_mode()
    def begin(self, ids: Sequence[int], capacity: int) -> None:
        """The decoder was just filled with this text, which may grow to about ``capacity`` tokens."""
        self._settle()
        self._several = None
        if self._drafter:
            self._drafter.start(ids, capacity)

    def prefill_again(self, prompts: Sequence[Sequence[int]], capacity: int) -> Tensor:
        """As ``Decoder.prefill_again``."""
        self._settle()
        logits = self._decoder.prefill_again(prompts, capacity)
        self.begin(prompts[0], capacity)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """As ``Decoder.step``."""
        if self._drafter is None:
            return self._decoder.step(tokens)
        token = int(tokens)
        self._drafter.add(token)
        if self._place < len(self._proposal.tokens) and token == self._proposal.tokens[self._place]:
            self._place += 1
            self._timing.accepted_tokens += 1
            return self._logits[self._place, None]
        self._settle()
        room = self._room()
        self._proposal = self._drafter.propose(room) if room > 0 else _NOTHING
        if not self._proposal.tokens:
            return self._decoder.step(tokens)
        if self._several is None:
            self._several, exact = self._decoder.several()
            if self._drafter.exact_only and not exact:
                self._drafter, self._proposal = None, _NOTHING
                return self._decoder.step(tokens)
        self._timing.drafted_tokens += len(self._proposal.tokens)
        self._logits = self._several([token, *self._proposal.tokens])
        return self._logits[:1]

    def select(self, rows: Sequence[int]) -> None:
        """As ``Decoder.select``: there is one row, and it stays."""

    def draw(
        self,
        plain: Draw,
        logits: Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
        history: History | None = None,
    ) -> Tensor:
        """As ``plain`` does; but where a guess was drawn from a distribution of its own, by the rule for those."""
        filtered = self._proposal.filtered
        if filtered is None or self._place == len(self._proposal.tokens):
            return plain(logits, seeds, positions, history)
        target = filter_logits(logits, plain.sampling, history)[0]
        guess = self._proposal.tokens[self._place]
        token = accept_or_draw(target, filtered[self._place], guess, seeds[0], positions[0])
        return torch.tensor([token], device=logits.device)

    def _settle(self) -> None:
        """Leave the proposal: what of it is wrong goes out of the cache."""
        drafted, cache = len(self._proposal.tokens), self._decoder.cache
        if not drafted or self._drafter is None or cache is None:
            return
        self._drafter.tell(drafted, self._place)
        cache.set_lengths([cache.lengths[0] - drafted + self._place])
        self._proposal, self._place = _NOTHING, 0

    def _room(self) -> int:
        """Tokens that cache and model have room for, behind the one that comes now."""
        cache = self._decoder.cache
        if cache is None:
            raise ValueError("a step comes after a prefill")
        return min(cache.capacity, self._decoder.transformer.config.context) - cache.lengths[0] - 1


def accept_or_draw(target: Tensor, draft: Tensor, token: int, seed: int, position: int) -> int:
    """The token at a position: the one that was drawn from ``draft``, or another, so that all in all ``target`` rules.

    With p and q the softmax of ``target`` and ``draft`` (``[V]``, filtered): the token stays with probability
    min(1, p/q), else one is drawn from what p has more than q. The outcome then has the distribution p, whatever q is.
    Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", section 2.3 and appendix
    A.1; Chen et al. 2023.
    """
    p, q = target.softmax(-1), draft.softmax(-1)
    uniform = (noise_keys(seed ^ _ACCEPT, position)[0] + 0.5) * 2.0**-32
    if uniform * float(q[token]) < float(p[token]):
        return token
    rest = (p - q).clamp_(min=0)
    if not bool(rest.any()):  # p is q but for rounding
        rest = p
    return int((rest.log() + gumbel_noise([seed ^ _REST], [position], len(rest), rest.device)[0]).argmax())
