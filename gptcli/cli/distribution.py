"""A distribution over the next token as JSON, the same wherever one is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptcli.core.predict import Distribution
    from gptcli.text.tokenizer import Tokenizer


def as_json(found: Distribution, tokenizer: Tokenizer) -> dict[str, Any]:
    """The contract's fields, and ``others``: the probability of all tokens that are not in ``top``."""
    return {
        "temperature": found.temperature,
        "entropy_bits": found.entropy_bits,
        "others": found.others,
        "top": [
            {"id": one.id, "text": tokenizer.decode([one.id]), "logit": one.logit, "probability": one.probability}
            for one in found.top
        ],
    }
