"""Guesses of a smaller model: what ``core/draft.py`` looks at in one step of the larger one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptcli.core.build import Model
from gptcli.core.decode import Decoder
from gptcli.core.draft import Proposal
from gptcli.core.sampling import History, filter_logits, gumbel_noise
from gptcli.core.settings import Sampling
from gptcli.errors import UsageError

# Tokens of a proposal, at first and at most: all right, and the next has two more; else it has one less (the rule of
# transformers' assisted generation).
_FIRST, _MOST = 4, 16
_DRAWS = 0x452821E638D01377  # parts the noise of these draws from that of others: bits of pi


def check_pair(model: Model, draft: Model) -> None:
    """Raise UsageError unless both models' tokens are the same."""
    ours, theirs = model.config.vocab_size, draft.config.vocab_size
    reason = None
    if ours != theirs:
        reason = f"{model.name} has {ours:,} tokens and {draft.name} {theirs:,}"
    elif any(model.tokenizer.token_bytes(id_) != draft.tokenizer.token_bytes(id_) for id_ in range(ours)):
        reason = "their tokenizers differ"
    if reason:
        raise UsageError(
            f"{draft.name} can't draft for {model.name}: {reason}", "take a draft model with the same tokenizer"
        )


class DraftModel:
    """Proposes what the ``draft`` model draws by the same chain of sampling, at temperature 0 what it finds likeliest.

    Each draw has noise of its own, which plain draws and acceptance do not use.
    """

    exact_only = False

    def __init__(self, draft: Model, sampling: Sampling, seed: int) -> None:
        self._draft, self._sampling, self._seed = draft, sampling, seed
        self._decoder = Decoder(draft.transformer, draft.stepping)
        self._text: list[int] = []
        self._held: list[int] = []  # what the decoder's cache has read: the text, then maybe what it proposed
        self._capacity = 0
        self._position = 0  # of the next token
        self._history: History | None = None
        self._longest = _FIRST

    def start(self, ids: Sequence[int], capacity: int) -> None:
        self._text, self._held = list(ids), []
        self._capacity = min(capacity, self._draft.config.context)
        if self._position:  # the beginning went, and stays counted
            self._count(ids[-1])
            return
        self._position = len(ids)
        if self._sampling.looks_back:
            self._history = History([ids], self._draft.config.vocab_size, self._draft.device)

    def add(self, token: int) -> None:
        self._text.append(token)
        self._count(token)

    def _count(self, token: int) -> None:
        self._position += 1
        if self._history:
            self._history.add(torch.tensor([token], device=self._draft.device))

    @torch.inference_mode()
    def propose(self, most: int) -> Proposal:
        count = min(most, self._longest, self._draft.config.context - len(self._text))
        if count < 1:
            return Proposal()
        logits = self._read()
        drawn: list[torch.Tensor] = []
        filtered: list[torch.Tensor] = []
        made = self._history.made.clone() if self._history else None
        for ahead in range(count):
            filtered.append(filter_logits(logits, self._sampling, self._history))
            noisy = filtered[-1]
            if self._sampling.temperature > 0:
                noise = gumbel_noise([self._seed ^ _DRAWS], [self._position + ahead], noisy.shape[-1], noisy.device)
                noisy = noisy + noise
            drawn.append(noisy.argmax(-1))
            if ahead + 1 < count:
                if self._history:
                    self._history.add(drawn[-1])
                logits = self._decoder.step(drawn[-1])
        if self._history and made is not None:
            self._history.made = made  # what was proposed is not made yet
        tokens = torch.cat(drawn).tolist()
        self._held = self._text + tokens[:-1]
        return Proposal(tokens, torch.cat(filtered) if self._sampling.temperature > 0 else None)

    def tell(self, drafted: int, accepted: int) -> None:
        right = accepted == drafted
        self._longest = min(self._longest + 2, _MOST) if right else max(self._longest - 1, 1)

    def _read(self) -> torch.Tensor:
        """The draft's logits ``[1, V]`` after the text, of which most was read before."""
        cache, text = self._decoder.cache, self._text
        same = len(text) - 1
        if self._held[:same] != text[:same]:
            pairs = zip(self._held, text[:-1], strict=False)
            same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(self._held))
        if same == 0 or cache is None:
            return self._decoder.prefill([text], self._capacity)
        cache.set_lengths([same])
        if cache.capacity < len(text):
            cache.grow(2 * len(text))
        return self._decoder.several()[0](text[same:])[-1:]
