"""The parts of the page that stand in it without its script: every number of a prediction, in the lecture's order."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from gptcli import __version__
from gptcli.cli import trace_marks as marks
from gptcli.cli.trace_marks import HUES, chip, figure, grid, row, signed, stage_section, word
from gptcli.cli.trace_window import Window, one_line
from gptcli.cli.trace_words import degrees, nth, number, percent, strongest

if TYPE_CHECKING:
    from gptcli.core.trace import Stage, Trace

_SHORT = 8  # tokens that stand beside each other in words
_LATER_TOP, _LATER_TOKENS = 5, 12
_FOLLOWS = ' <span title="this is what follows">✓</span>'


def page_parts(window: Window, later: Sequence[Trace], prompt: str) -> dict[str, str]:
    """What fills the holes of the template, by name; HTML, escaped."""
    shown = escape(one_line(prompt, 60))
    name = escape(one_line(window.trace.model.name, 80))
    layers = range(window.config.layers)
    return {
        "title": f"“{shown}” — followed through {name}",
        "heading": f"What comes after <q>{shown}</q>?" if shown else "What comes first?",
        "hero": _hero(window),
        "tokens": _tokens(window),
        "embedding": _embedding(window),
        "block_links": "".join(f'<a href="#blocks.{layer}">{layer}</a>' for layer in layers),
        "overview": _overview(window),
        "from": _looking_from(window),
        "blocks": "\n".join(_block(window, layer) for layer in layers),
        "stream": _stream(window),
        "lens": _lens(window),
        "softmax": _softmax(window),
        "draw": _draw(window),
        "again": _again(window, later),
        "letters": _letters(window),
        "version": escape(__version__),
    }


def _hero(window: Window) -> str:
    trace, drawn, best = window.trace, window.trace.drawn, window.trace.next.top[0]
    name = escape(one_line(trace.model.name, 80))
    told = [
        ("Model", name),
        ("Tokens", f"{len(trace.ids):,}"),
        ("Blocks × heads", f"{window.config.layers} × {window.config.heads}"),
        ("Likeliest next", f"{word(window, best.id)} {percent(best.probability)}"),
        ("Drawn", f"{word(window, drawn.id)} {percent(drawn.probability)}"),
        ("Computed in", f"{trace.model.dtype_name} on {escape(str(trace.model.device))}"),
    ]
    hidden = f'<span class="cut">… {window.first:,} tokens before </span>' if window.first else ""
    return f'<p class="text">{hidden}{marks.chips(window)}{word(window, drawn.id, "drawn")}</p>{marks.facts(told)}'


def _tokens(window: Window) -> str:
    listed = "".join(
        f'<li value="{token.place}">{chip(window, index)}<span class="id">{token.id}</span></li>'
        for index, token in enumerate(window.tokens)
    )
    listed = f'<ol class="tokens" aria-label="The tokens and their ids">{listed}</ol>'
    if window.first:
        told = f"Shown are the last {len(window.tokens)} tokens; the model read {window.first:,} before."
        listed += f'<p class="note">{told}</p>'
    return stage_section(window, window.stages["tokens"], listed)


def _embedding(window: Window) -> str:
    stages = [window.stages[name] for name in ("embedding", "positions") if name in window.stages]
    vectors, width = window.columns(), window.config.width
    rows = [
        row(str(index), "".join(signed(vector[index], vectors) for vector in vectors))
        for index in range(len(vectors[0]))
    ]
    rows.append(row("⋮", f'<td colspan="{len(vectors)}">{width:,} numbers each</td>', ' class="rest"'))
    lengths = "".join(f"<td>{number(norm)}</td>" for norm in window.shown(stages[-1].summary["norms"]))
    told = "embedding plus position" if len(stages) > 1 else "rows of the embedding matrix"
    table = grid("vectors", marks.columns(window), "".join(rows), row("length", lengths))
    caption = f"The vectors that enter the first block, {told}: the first {len(vectors[0])} of {width:,} numbers."
    return "".join(stage_section(window, stage) for stage in stages) + figure(caption, table)


# --- Blocks


def _overview(window: Window) -> str:
    """What each head adds; a link that chooses it."""
    rows = []
    for layer in range(window.config.layers):
        heads = window.block(layer, "pattern").summary["heads"]
        most = max(head["norm"] for head in heads) or 1.0
        cells = "".join(
            f'<td style="--w:{head["norm"] / most:.2f}"><a href="#blocks.{layer}.pattern" data-go="{layer} {index}" '
            f'aria-label="Layer {layer}, head {index}: adds {number(head["norm"])}">{number(head["norm"])}</a></td>'
            for index, head in enumerate(heads)
        )
        rows.append(row(f"Layer {layer}", cells))
    names = "".join(f'<th scope="col">Head {head}</th>' for head in range(window.config.heads))
    return figure(
        "How much each head adds to the last vector (length); shaded within its layer. Choose one to see where it "
        "looks.",
        grid("heat", names, "".join(rows)),
    )


def _looking_from(window: Window) -> str:
    last = len(window.tokens) - 1
    return "".join(
        f'<button type="button" class="tok h{index % HUES}" data-from="{index}" '
        f'aria-pressed="{marks.truth(index == last)}" aria-label="Look from token {token.place}: '
        f'{escape(token.text)}">{marks.spaced(token.text)}</button>'
        for index, token in enumerate(window.tokens)
    )


def _block(window: Window, layer: int) -> str:
    pattern, hidden, whole = (window.block(layer, kind) for kind in ("pattern", "hidden", ""))
    attention, mlp = (window.block(layer, kind) for kind in ("attention", "mlp"))
    asked = (window.block(layer, kind) for kind in ("query", "key", "value"))
    opened = " open" if layer in (0, window.config.layers - 1) else ""  # of the others the summary tells
    turned = [degrees(stage.summary["turned_degrees"][-1]) for stage in (attention, mlp)]
    beside = "pair" if len(window.tokens) <= _SHORT else "one"
    return (
        f'<details class="block" id="blocks.{layer}" data-layer="{layer}"{opened}><summary><h3>Block {layer}</h3>'
        f"<span>attention turns the last vector by {turned[0]}, the MLP by {turned[1]}; "
        f"then it is {number(whole.summary['norms'][-1])} long</span></summary>"
        f'<div class="three">{"".join(stage_section(window, stage, marks.per_head(stage)) for stage in asked)}</div>'
        + stage_section(
            window, pattern, f'<div class="{beside}">{_looks(window, pattern)}{_heat(window, layer, pattern)}</div>'
        )
        + stage_section(window, attention, _turn(attention))
        + f'<div class="pair">{stage_section(window, hidden, _neurons(hidden))}'
        + stage_section(window, mlp, _turn(mlp))
        + "</div>"
        + stage_section(window, whole, _each_token(window, attention, mlp, whole), f"blocks.{layer}.all")
        + "</details>"
    )


def _looks(window: Window, pattern: Stage) -> str:
    chosen = strongest(pattern)[0]["head"]
    rows = []
    for head in pattern.summary["heads"]:
        looks = " ".join(
            f'<span class="look">{_seen(window, one["position"], one["id"])} {percent(one["weight"])}</span>'
            for one in head["top"]
        )
        pressed = marks.truth(head["head"] == chosen)
        name = f'<button type="button" class="head" aria-pressed="{pressed}">Head {head["head"]}</button>'
        told = f"<td>{number(head['norm'])}</td><td>{head['entropy_bits']:.2f}</td>"
        cells = f'<td class="looks">{looks}</td><td class="strip" aria-hidden="true"></td>{told}'
        rows.append(row(name, cells, f' data-head="{head["head"]}"'))
    last = chip(window, len(window.tokens) - 1)
    return figure(
        f'What each head looks at most, from <span class="asker">{last}</span>',
        '<table class="list"><thead><tr><th scope="col">Head</th><th scope="col">looks at</th>'
        '<th scope="col" class="strip">all it sees</th><th scope="col" title="the length of what it adds">adds</th>'
        '<th scope="col" title="entropy: 0 is one token alone">spread, bits</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
    )


def _seen(window: Window, place: int, id_: int) -> str:
    index = place - window.first
    return chip(window, index) if index >= 0 else word(window, id_)


def _heat(window: Window, layer: int, pattern: Stage) -> str:
    """The pattern of the strongest head; the script puts others in its place."""
    if layer not in window.patterns():
        return ""
    head = strongest(pattern)[0]["head"]
    triangle = window.patterns()[layer][head]
    count = len(triangle)
    rows = []
    for index, weights in enumerate(triangle):
        cells = "".join(f'<td style="--w:{marks.shade(each):.2f}">{(each + 5) // 10}</td>' for each in weights)
        masked = f'<td class="masked" colspan="{count - 1 - index}"></td>' if index < count - 1 else ""
        rows.append(row(chip(window, index), cells + masked, f' data-from="{index}"'))
    before = '<th scope="col"><span class="cut">earlier</span></th>' if window.first else ""
    kind = "heat pattern short" if count <= _SHORT else "heat pattern"
    return figure(
        f'Attention pattern of <b class="which">head {head}</b>: a row for each token that looks, a column for each '
        "that is looked at, in percent. A token sees itself and what stands before it; the rest is masked.",
        grid(kind, before + marks.columns(window), "".join(rows)) + '<p class="readout" aria-live="polite"></p>',
    )


def _turn(stage: Stage) -> str:
    turned, length = stage.summary["turned_degrees"][-1], stage.summary["norms"][-1]
    told = f"<p><b>{degrees(turned)}</b> turned</p><p><b>{number(length)}</b> added</p>"
    return f'<div class="turn">{marks.dial(turned)}{told}</div>'


def _neurons(hidden: Stage) -> str:
    neurons, active = hidden.summary["neurons"], hidden.summary["active"]
    most = max((abs(one["value"]) for one in neurons), default=0.0) or 1.0
    rows = "".join(
        row(
            str(one["neuron"]),
            f"<td>{marks.minus(number(one['value']))}</td>"
            f'<td class="bar"><i style="--w:{max(0.0, one["value"]) / most:.3f}"></i></td>',
        )
        for one in neurons
    )
    return (
        f'<div class="neurons"><p class="share"><i style="--w:{active:.3f}"></i></p>'
        f'<p class="note">{percent(active)} of {hidden.shape[-1]:,} neurons are active at the last token.</p>'
        f"{marks.listing(('Neuron', 'value', 'strongest first'), rows)}</div>"
    )


def _each_token(window: Window, *stages: Stage) -> str:
    """Lengths and turns of attention, MLP and the whole block, a row for each token."""
    columns = []
    for stage in stages:
        columns.append([number(value) for value in window.shown(stage.summary["norms"])])
        columns.append([degrees(value) for value in window.shown(stage.summary["turned_degrees"])])
    rows = "".join(
        row(chip(window, index), "".join(f"<td>{column[index]}</td>" for column in columns))
        for index in range(len(window.tokens))
    )
    names = ("Token", "attention adds", "turns", "MLP adds", "turns", "after the block", "turned in all")
    return (
        '<details class="more"><summary>The same for every token</summary><div class="wide" tabindex="0">'
        f"{marks.listing(names, rows, ' numbers')}</div></details>"
    )


# --- After the blocks


def _stream(window: Window) -> str:
    """The last vector from place to place: its first numbers, its length, its turn."""
    begin = window.stages.get("positions", window.stages["embedding"])
    layers = range(window.config.layers)
    stages = [begin, *(window.block(layer) for layer in layers)]
    vectors = [stage.summary["vector"] for stage in stages]
    rows = "".join(
        row(str(index), "".join(signed(vector[index], [vector]) for vector in vectors))
        for index in range(len(vectors[0]))
    )
    lengths = "".join(f"<td>{number(stage.summary['norms'][-1])}</td>" for stage in stages)
    turns = "".join(f"<td>{degrees(stage.summary['turned_degrees'][-1])}</td>" for stage in stages[1:])
    names = ["enters", *(f"block {layer}" for layer in layers)]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = grid("vectors", heads, rows, row("length", lengths) + row("turned", f"<td></td>{turns}"))
    caption = (
        f"The way of the last vector through the blocks, its first {len(vectors[0])} numbers of "
        f"{window.config.width:,}; each column is shaded by itself."
    )
    return figure(caption, table) + stage_section(window, window.stages["norm"])


def _lens(window: Window) -> str:
    follows = [*window.trace.ids[window.first + 1 :], window.trace.next.top[0].id]
    rows = []
    for layer, guesses in enumerate(window.lens()):
        cells = "".join(
            f'<td style="--w:{one.probability:.3f}">{word(window, one.id)}<small>{percent(one.probability)}'
            f"{_FOLLOWS if one.id == next_id else ''}</small></td>"
            for one, next_id in zip(guesses, follows, strict=True)
        )
        rows.append(row("before" if layer == 0 else f"block {layer - 1}", cells))
    return figure(
        "What the model would predict if it ended there, after each token. ✓ marks what really follows in the text, "
        "and for the last token the model’s own likeliest.",
        grid("heat guesses", marks.columns(window), "".join(rows)),
    )


def _softmax(window: Window) -> str:
    logits = window.stages["logits"]
    told = (("Largest", "max"), ("Mean", "mean"), ("Smallest", "min"))
    facts = marks.facts(((name, marks.minus(number(logits.summary[key]))) for name, key in told), "facts small")
    bars = f'<div id="bars">{marks.bars(window, window.trace.next.top)}</div>'
    return stage_section(window, logits, facts) + stage_section(window, window.stages["probabilities"], bars)


def _draw(window: Window) -> str:
    text = marks.chips(window, len(window.tokens) - _SHORT)
    drawn = word(window, window.trace.drawn.id, "drawn")
    return stage_section(window, window.stages["draw"], f'<p class="text">{text}<span class="plus">+</span>{drawn}</p>')


def _again(window: Window, later: Sequence[Trace]) -> str:
    """The predictions after the first, shorter, and the text that came of them."""
    made = [
        '<p class="words">The drawn token is appended, and the longer text takes the same way again: '
        "that is how a model writes.</p>"
    ]
    trace = window.trace
    for count, one in enumerate(later, 2):
        grown = Window(one)
        tokens = len(grown.tokens)
        old = tokens - (len(one.ids) - len(trace.ids))
        start = max(0, tokens - _LATER_TOKENS)
        text = "".join(chip(grown, index, "drawn" if index >= old else "") for index in range(start, tokens))
        told = " ".join(marks.sentence(one.stage(name), one) for name in ("probabilities", "draw"))
        before = '<span class="cut">… </span>' if grown.first + start else ""
        made.append(
            f'<article class="later"><h3>The {nth(count)} prediction</h3><p class="text">{before}{text}'
            f'{word(grown, one.drawn.id, "drawn")}</p><p class="words">{told}</p>'
            f"{marks.bars(grown, one.next.top[:_LATER_TOP])}</article>"
        )
    last = later[-1] if later else trace
    said = escape(one_line(trace.model.tokenizer.decode([*last.ids, last.drawn.id]), 400))
    return "".join(made) + f'<p class="result"><span class="quiet">So far:</span> {said}</p>'


def _letters(window: Window) -> str:
    config, count = window.config, len(window.trace.ids)
    query, key, hidden = (window.block(0, kind).shape for kind in ("query", "key", "hidden"))
    letters = [
        ("B", "batch", 1),
        ("T", "query tokens", count),
        ("S", "tokens that are looked at", count),
        ("C", "width of a vector", config.width),
        ("H", "heads", config.heads),
        ("K", "key-value heads", key[1]),
        ("D", "numbers a head works with", query[-1]),
        ("F", "neurons of an MLP", hidden[-1]),
        ("V", "vocabulary", config.vocab_size),
    ]
    return marks.facts(((name, f"{said}: {size:,}") for name, said, size in letters), "letters")
