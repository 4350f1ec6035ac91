"""A distribution over the next token as JSON, the same wherever one is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcli.core.distribution import Distribution


def as_json(found: Distribution, text_of: Callable[[int], str]) -> dict[str, Any]:
    """The contract's fields, and ``others``: the probability of all tokens that are not in ``top``.

    ``text_of`` tells the text of an id.
    """
    return {
        "temperature": found.temperature,
        "entropy_bits": found.entropy_bits,
        "others": found.others,
        "top": [
            {"id": one.id, "text": text_of(one.id), "logit": one.logit, "probability": one.probability}
            for one in found.top
        ],
    }
