"""Bits per byte of texts: how well a model predicts what it has not been trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.core.score import Window, all_batches, windows
from gptcli.train.data import IGNORED, Corpus
from gptcli.train.log import number
from gptcli.train.ranks import Ranks

# Tokens of a document that are read at a time.
_PIECE = 1 << 16


@torch.no_grad()
def bits_per_byte(
    objective: nn.Module, corpora: Sequence[Corpus], context: int, rows: int, ranks: Ranks
) -> dict[str, Any]:
    """The fields of an event ``eval``: the mean ``loss`` in nats a token, ``bits_per_byte`` of all texts together, and
    ``valid``, of each; None where it is not finite.
    """
    objective.eval()
    by_name = {}
    nats = size = tokens = 0.0
    for corpus in corpora:
        total, count = corpus_nats(objective, corpus, context, rows, ranks.device, ranks)
        by_name[corpus.name] = number(total / math.log(2) / corpus.text_bytes)
        nats, size, tokens = nats + total, size + corpus.text_bytes, tokens + count
    ranks.settle(objective)
    bits = number(nats / math.log(2) / size)
    return {"loss": number(nats / max(1.0, tokens)), "bits_per_byte": bits, "valid": by_name}


def corpus_nats(
    objective: Callable[[Tensor, Tensor], Tensor],
    corpus: Corpus,
    context: int,
    rows: int,
    device: torch.device,
    ranks: Ranks | None = None,
) -> tuple[float, int]:
    """Total cross entropy (nats) of a corpus: of each document's tokens, by windows side by side from its start token.

    The same windows, batches and sums as ``gptcli score --stride CONTEXT`` has. A window knows nothing of the one
    before, so this is an upper bound of what the model can do. Start tokens are not predicted.

    Args:
        objective: gives the summed cross entropy of ``ids`` and ``targets`` ``[B, T]``, T at most the context.
        rows: so many whole windows fit at once; of shorter ones as many as have no more tokens.
        ranks: take batches in turn, and each makes as many passes as the others.

    Returns ``(nats, tokens scored)``.
    """
    ranks = ranks or Ranks()
    total, scored = 0.0, 0
    every = all_batches(_windows(corpus, context), rows * context)
    # What a rank passes through where the others have the last batches: some ids, and nothing to score.
    idle = torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), IGNORED)
    while turn := list(itertools.islice(every, ranks.count)):
        ids, targets = turn[ranks.rank] if ranks.rank < len(turn) else idle
        scored += int((targets != IGNORED).sum())
        total += objective(ids.to(device), targets.to(device)).item()
    nats, tokens = ranks.sums(total, scored)
    return nats, int(tokens)


def _windows(corpus: Corpus, context: int) -> Iterator[Window]:
    for first, last in corpus.pieces():
        yield from windows(_document(corpus, first, last), context, context)


def _document(corpus: Corpus, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ids and targets of a document."""
    for start in range(first, last, _PIECE):
        part = slice(start, min(start + _PIECE, last))
        ids = targets = torch.from_numpy(corpus.tokens[part].astype("int64"))
        if corpus.learnt is not None:
            learnt = torch.from_numpy(corpus.learnt[part].astype("bool"))
            targets = ids.masked_fill(~learnt, IGNORED)
        yield ids, targets
