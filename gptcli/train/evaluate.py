"""Bits per byte of texts: how well a model predicts what it has not been trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.train.data import IGNORED, Corpus
from gptcli.train.log import number
from gptcli.train.ranks import Ranks


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
    """Total cross entropy (nats) of a corpus, every token but the first predicted once, in windows side by side.

    ``objective(ids, targets)`` gives the summed cross entropy. Returns ``(nats, tokens scored)``. A window knows
    nothing of the one before, so this is an upper bound of what the model can do. Several ranks take windows in turn.
    """
    ranks = ranks or Ranks()
    count = len(corpus.tokens) - 1
    windows = -(-count // context)
    total, scored = 0.0, 0
    step = rows * ranks.count
    for first in range(0, windows, step):
        ids = torch.zeros((rows, context), dtype=torch.int64)
        targets = torch.full((rows, context), IGNORED)
        for row in range(rows):
            start = (first + ranks.rank * rows + row) * context
            end = min(start + context, count)
            if start < end:
                window = torch.from_numpy(corpus.tokens[start : end + 1].astype("int64"))
                ids[row, : end - start], targets[row, : end - start] = window[:-1], window[1:]
                if corpus.learnt is not None:
                    learnt = torch.from_numpy(corpus.learnt[start + 1 : end + 1].astype("bool"))
                    targets[row, : end - start][~learnt] = IGNORED
        scored += int((targets != IGNORED).sum())
        total += objective(ids.to(device), targets.to(device)).item()
    nats, tokens = ranks.sums(total, scored)
    return nats, int(tokens)
