"""The stages of a prediction in plain words: the names that the lecture gives them, and a line with the real numbers.

The lecture is 3Blue1Brown's on GPTs and attention; who has seen it should need no other manual. Layers and heads are
counted from 0, as the options count them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptcli.cli.tokens import quoted

if TYPE_CHECKING:
    from gptcli.core.trace import Stage, Trace

_TITLES = {
    "tokens": "Tokens",
    "embedding": "Embedding",
    "positions": "Positions",
    "query": "Queries",
    "key": "Keys",
    "value": "Values",
    "pattern": "Attention pattern",
    "attention": "Attention adds",
    "hidden": "MLP: up-projection",
    "mlp": "MLP: down-projection",
    "block": "After the block",
    "norm": "Last vector",
    "logits": "Logits",
    "probabilities": "Softmax",
    "draw": "Draw",
}
_MUCH = 0.05  # of a head's look
_LONGEST = 20  # characters of a token that are shown in a sentence


def title(kind: str) -> str:
    """The lecture's name of a kind of stage."""
    return _TITLES[kind]


def words(stage: Stage, trace: Trace) -> str:
    """What happened there, in a line of plain words: what it does, then what it did to the last vector."""
    return _SAID[stage.kind](stage, trace)


def token(trace: Trace, id_: int, longest: int = _LONGEST) -> str:
    """A token in quotes, cut where it is long: ``" the"``."""
    data = trace.model.tokenizer.token_bytes(id_)
    shown = quoted(data)
    return shown if len(shown) <= longest + 2 else shown[:longest].rstrip("\\") + '…"'


def percent(share: float) -> str:
    """A probability or a weight for people: 33%, 4.1%, 0.12%."""
    if share >= 0.0995:
        return f"{100 * share:.0f}%"
    if share >= 0.00995:
        return f"{100 * share:.1f}%"
    return f"{100 * share:.2f}%" if share >= 0.00005 else "<0.01%" if share > 0 else "0%"


def number(value: float) -> str:
    """A length or a logit for people: 1.85, 102.9, 1,024."""
    size = abs(value)
    return f"{value:.2f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def degrees(value: float) -> str:
    """An angle: 61°, 0.4°."""
    return f"{value:.0f}°" if value >= 9.95 else f"{value:.1f}°"


def nth(place: int) -> str:
    """1st, 2nd, 3rd, 11th."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place:,}{ending}"


def strongest(stage: Stage) -> list[dict[str, Any]]:
    """The heads of a ``pattern``, those first whose gathered values are longest."""
    heads: list[dict[str, Any]] = stage.summary["heads"]
    return sorted(heads, key=lambda head: -head["norm"])


def looked_at(head: dict[str, Any], trace: Trace, most: int = 3) -> str:
    """Where a head looked from the last token: ``" cat" 33%, " sat" 21%``; what is under a hundredth left out.

    Of a head whose look is spread so that no token gets much, that is said, and the first one.
    """
    if head["top"][0]["weight"] < _MUCH:
        first = head["top"][0]
        return f"many a little, most at {token(trace, first['id'])} {percent(first['weight'])}"
    top = [one for one in head["top"] if one["weight"] >= 0.01][:most] or head["top"][:1]
    last = len(trace.ids) - 1
    names = ["itself" if one["position"] == last else token(trace, one["id"]) for one in top]
    return ", ".join(f"{name} {percent(one['weight'])}" for name, one in zip(names, top, strict=True))


def _last(trace: Trace) -> str:
    return token(trace, trace.ids[-1])


def _tokens(stage: Stage, trace: Trace) -> str:
    count = len(trace.ids)
    cut = f"cut into {count:,} tokens" if count > 1 else "one token"
    return f"The text is {cut}; the model knows {trace.model.config.vocab_size:,}."


def _embedding(stage: Stage, trace: Trace) -> str:
    length = number(stage.summary["norms"][-1])
    size = f"{stage.shape[-1]:,} numbers, of length {length}"
    return f"Each token becomes a vector, looked up in the embedding matrix: {_last(trace)} is {size}."


def _positions(stage: Stage, trace: Trace) -> str:
    turned, length = degrees(stage.summary["turned_degrees"][-1]), number(stage.summary["norms"][-1])
    place = f"being {nth(len(trace.ids))} turns the vector of {_last(trace)}"
    return f"Where each token stands is added: {place} by {turned}, to length {length}."


def _query(stage: Stage, trace: Trace) -> str:
    heads = stage.shape[1]
    each = f"each of {heads} heads" if heads > 1 else "the head"
    size = f"a query of {stage.shape[-1]} numbers"
    return f"The question that {_last(trace)} asks the tokens before it, in {each}: {size}."


def _key(stage: Stage, trace: Trace) -> str:
    shared = trace.model.config.heads // stage.shape[1]
    also = f" ({shared} heads share one)" if shared > 1 else ""
    config = trace.model.config
    turns = config.position != "learned" and stage.layer not in config.unrotated
    turned = " Both are turned by their place in the text." if turns else ""
    return f"What each token answers: a key{also}. The more it points the query's way, the better it matches.{turned}"


def _value(stage: Stage, trace: Trace) -> str:
    return f"What each token hands over as far as it matches: a value of {stage.shape[-1]} numbers."


def _pattern(stage: Stage, trace: Trace) -> str:
    if len(trace.ids) == 1:
        return "There is no earlier token: each head looks at the token itself, 100%."
    first, *others = strongest(stage)
    which = f"Head {first['head']}, the strongest of {len(others) + 1}," if others else "The head"
    looks = f"looks from {_last(trace)} at {looked_at(first, trace)}"
    return f"Softmax turns the matches into shares of 100%. {which} {looks}."


def _attention(stage: Stage, trace: Trace) -> str:
    return f"The values, each by its share, are added to the vector: {_added(stage)}."


def _hidden(stage: Stage, trace: Trace) -> str:
    count = round(stage.summary["active"] * stage.shape[-1])
    best = stage.summary["neurons"][0]
    return (
        f"Each vector is asked {stage.shape[-1]:,} questions, one a neuron: {count:,} neurons are active "
        f"({percent(stage.summary['active'])}), number {best['neuron']} the most."
    )


def _mlp(stage: Stage, trace: Trace) -> str:
    return f"What the active neurons stand for is added to the vector: {_added(stage)}."


def _added(stage: Stage) -> str:
    length, turned = number(stage.summary["norms"][-1]), degrees(stage.summary["turned_degrees"][-1])
    return f"{length} long, which turns it by {turned}"


def _block(stage: Stage, trace: Trace) -> str:
    length, turned = number(stage.summary["norms"][-1]), degrees(stage.summary["turned_degrees"][-1])
    return f"The vector of {_last(trace)} leaves the block with length {length}, turned by {turned} in all."


def _norm(stage: Stage, trace: Trace) -> str:
    length = number(stage.summary["norms"][-1])
    made = f"The vector of {_last(trace)} now holds what the model made of the whole text"
    return f"{made}; a norm sets its length to {length}."


def _logits(stage: Stage, trace: Trace) -> str:
    best = stage.summary["top"][0]
    return (
        f"The last vector times the unembedding matrix: a score for each of {stage.shape[-1]:,} tokens, "
        f"from {number(stage.summary['min'])} to {number(best['logit'])} for {token(trace, best['id'])}."
    )


def _probabilities(stage: Stage, trace: Trace) -> str:
    temperature, bits = stage.summary["temperature"], stage.summary["entropy_bits"]
    if temperature == 0:
        return "At temperature 0 the likeliest token takes all: 100%."
    about = 2**bits
    among = f"{about:,.0f}" if about >= 10 else f"{about:.1f}"
    unsure = (
        f"as unsure as among {among} equal tokens ({bits:.1f} bits)" if math.isfinite(about) else f"{bits:.1f} bits"
    )
    return f"Scores become probabilities that sum to 1, at temperature {temperature:g}: {unsure}."


def _draw(stage: Stage, trace: Trace) -> str:
    drawn = trace.drawn
    shown, place = token(trace, drawn.id), drawn.rank + 1
    if trace.next.temperature == 0:
        return f"{shown} is taken. It is appended to the text, and all begins again."
    rank = "the likeliest" if place == 1 else f"the {nth(place)} likeliest"
    return (
        f"{shown} is drawn, {percent(drawn.probability)} and {rank} (seed {drawn.seed}). "
        "It is appended to the text, and all begins again."
    )


_SAID: dict[str, Callable[[Stage, Trace], str]] = {
    **{"tokens": _tokens, "embedding": _embedding, "positions": _positions, "query": _query, "key": _key},
    **{"value": _value, "pattern": _pattern, "attention": _attention, "hidden": _hidden, "mlp": _mlp},
    **{"block": _block, "norm": _norm, "logits": _logits, "probabilities": _probabilities, "draw": _draw},
}
