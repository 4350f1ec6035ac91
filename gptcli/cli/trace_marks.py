"""The small parts of the page: a token as a chip, a stage with its shape, a figure, bars; HTML, escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from gptcli.cli.trace_window import Window
from gptcli.cli.trace_words import number, percent, title, words

if TYPE_CHECKING:
    from gptcli.core.distribution import Candidate
    from gptcli.core.trace import Stage, Trace

HUES = 6  # token colours, in turn
# A token between quotes, escaped; a quote within has a backslash.
_QUOTED = re.compile(r"&quot;(?:\\&quot;|(?!&quot;).)*&quot;")


def stage_section(window: Window, stage: Stage, more: str = "", name: str = "") -> str:
    """A stage with its name, symbols, shape, dtype and plain words, and what else there is to see."""
    level = "h3" if stage.layer is None else "h4"
    shape = " × ".join(f"{size:,}" for size in stage.shape)
    return (
        f'<section class="stage" id="{name or stage.name}"><{level}>{escape(title(stage.kind))}</{level}>'
        f'<p class="shape"><code>{stage.symbols}</code> = {shape} <span class="quiet">· {stage.dtype}</span></p>'
        f'<p class="words">{sentence(stage, window.trace)}</p>{more}</section>'
    )


def figure(caption: str, content: str) -> str:
    """Something to look at under a caption; what is wide can be scrolled, by keys too."""
    return f'<figure><figcaption>{caption}</figcaption><div class="wide" tabindex="0">{content}</div></figure>'


def facts(pairs: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    """Names with values, which are HTML already."""
    return f'<dl class="{kind}">{"".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)}</dl>'


def grid(kind: str, head: str, body: str, foot: str = "") -> str:
    """A table whose first column has no name."""
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    return f'<table class="{kind}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>{foot}</table>'


def listing(names: Sequence[str], body: str, kind: str = "") -> str:
    """A table with a name over each column."""
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return f'<table class="list{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def row(name: str, cells: str, more: str = "") -> str:
    """A row of a table with its name; the cells are HTML already."""
    return f'<tr{more}><th scope="row">{name}</th>{cells}</tr>'


def chip(window: Window, index: int, kind: str = "") -> str:
    """A token of the text, in its colour."""
    token = window.tokens[index]
    kind = kind or f"h{index % HUES}"
    return f'<bdi class="tok {kind}" title="token {token.place}, id {token.id}">{spaced(token.text)}</bdi>'


def chips(window: Window, first: int = 0) -> str:
    """The tokens of the text from one on."""
    return "".join(chip(window, index) for index in range(max(0, first), len(window.tokens)))


def columns(window: Window) -> str:
    """The tokens of the text as the names of columns."""
    return "".join(f'<th scope="col">{chip(window, index)}</th>' for index in range(len(window.tokens)))


def word(window: Window, id_: int, kind: str = "") -> str:
    """A token of the vocabulary."""
    return f'<bdi class="tok{" " + kind if kind else ""}" title="id {id_}">{spaced(window.text(id_))}</bdi>'


def bars(window: Window, top: Sequence[Candidate]) -> str:
    """The likeliest tokens as bars, then the drawn one if it is not among them, then all others together."""
    trace, drawn = window.trace, window.trace.drawn
    rows = [
        _bar(window, f"{rank}", one.id, one.logit, one.probability, one.id == drawn.id)
        for rank, one in enumerate(top, 1)
    ]
    left = 1 - sum(one.probability for one in top)
    if all(one.id != drawn.id for one in top):
        logit = float(trace.logits[drawn.id])
        rows.append(_bar(window, f"{drawn.rank + 1:,}", drawn.id, logit, drawn.probability, True))
        left -= drawn.probability
    others = window.config.vocab_size - len(rows)
    left = max(0.0, left)
    if others > 0:
        rows.append(
            f'<tr class="others"><td></td><th scope="row">{others:,} others</th><td></td>'
            f'<td class="p">{percent(left)}</td><td class="bar"><i style="--w:{left:.4f}"></i></td></tr>'
        )
    names = ("Rank", "Token", "logit", "probability", '<span class="quiet">0 to 100%</span>')
    return f'<div class="wide" tabindex="0">{listing(names, "".join(rows))}</div>'


def _bar(window: Window, rank: str, id_: int, logit: float, chance: float, drawn: bool) -> str:
    mark = ' <span class="mark">drawn</span>' if drawn else ""
    return (
        f'<tr{" class=drawn" if drawn else ""}><td>{rank}</td><th scope="row">{word(window, id_)}{mark}</th>'
        f'<td>{minus(f"{logit:.2f}")}</td><td class="p">{percent(chance)}</td>'
        f'<td class="bar"><i style="--w:{chance:.4f}"></i></td></tr>'
    )


def per_head(stage: Stage) -> str:
    """The length of the last token's vector in each head."""
    norms = ", ".join(number(norm) for norm in stage.summary["norms"])
    return f'<p class="note">Length by head: {norms}</p>'


def signed(value: float, among: Iterable[Sequence[float]]) -> str:
    """A number of a vector, shaded by its size among others; its sign is in the text and in the colour."""
    most = max((abs(each) for vector in among for each in vector), default=0.0) or 1.0
    kind = "minus" if value < 0 else "plus"
    return f'<td class="{kind}" style="--w:{math.sqrt(abs(value) / most):.2f}">{minus(number(value))}</td>'


def minus(shown: str) -> str:
    """A number with a minus sign for the hyphen."""
    return shown.replace("-", "−")


def dial(turned: float) -> str:
    """A small picture of an angle; the number stands beside it."""
    angle = math.radians(turned)
    x, y = 20 * math.cos(angle), -20 * math.sin(angle)
    return (
        '<svg class="dial" viewBox="-23 -23 46 26" aria-hidden="true"><path class="was" d="M0 0H20"/>'
        f'<path class="arc" d="M10 0A10 10 0 0 0 {x / 2:.1f} {y / 2:.1f}"/>'
        f'<path class="now" d="M0 0L{x:.1f} {y:.1f}"/></svg>'
    )


def sentence(stage: Stage, trace: Trace) -> str:
    """The plain words of a stage; no line ends within a token."""
    return _QUOTED.sub(r'<span class="quoted">\g<0></span>', escape(words(stage, trace)))


def spaced(text: str) -> str:
    """A token's text; spaces stay spaces, but can be seen."""
    return escape(text).replace(" ", "<i> </i>")


def shade(thousandths: int) -> float:
    """How dark a share is: its root, so that a few percent can be seen. The page's script does the same."""
    return math.sqrt(min(thousandths, 1000) / 1000)


def truth(value: bool) -> str:
    """As an attribute says it."""
    return "true" if value else "false"
