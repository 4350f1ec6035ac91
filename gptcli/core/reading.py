"""How likely each token of a prompt was, told as ``generate`` tells of the tokens that it makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptcli.core.build import Model
from gptcli.core.generate import check_finite, check_prompt, report
from gptcli.core.requests import Choice

# Numbers in the logits that are held at a time.
_LOGITS = 1 << 23


@torch.inference_mode()
def read_prompt(model: Model, ids: Sequence[int], count: int) -> list[tuple[Choice | None, tuple[Choice, ...]]]:
    """For each token its log-probability (nats, temperature 1) behind those before it, and the ``count`` likeliest.

    Nothing is told of the first, which stands behind nothing. Raises as ``check_prompt`` does, CorruptError for weights
    whose logits are not finite.
    """
    check_prompt(model, ids)
    transformer = model.transformer
    read = torch.tensor([list(ids)], device=model.device)
    stream = transformer.norm(transformer.residual_stream(read[:, :-1]))[0] if len(ids) > 1 else None  # [T - 1, C]
    found: list[tuple[Choice | None, tuple[Choice, ...]]] = [(None, ())]
    at_once = max(1, _LOGITS // model.config.vocab_size)
    for first in range(0, len(ids) - 1, at_once):
        assert stream is not None
        logits = transformer.unembedding(stream[first : first + at_once])  # [N, V]
        check_finite(model, logits)
        found += report(logits, read[0, 1 + first : 1 + first + len(logits)], count)
    return found
