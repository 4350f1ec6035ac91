"""One prediction on a screen: the lecture's way from the text to the next token, with the real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gptcli.cli.cells import bar, cells, cut, cut_token, pad
from gptcli.cli.tokens import visible
from gptcli.cli.trace_sheet import Sheet, Span
from gptcli.cli.trace_words import degrees, looked_at, nth, number, percent, strongest, title, token, words

if TYPE_CHECKING:
    from gptcli.core.trace import Guess, Stage, Trace

_BLOCKS = 6  # that are shown; of more, those that turn the last vector most
_ADDED, _TURNED = 7, 7  # cells of the two columns at the right of the blocks
_IN_PIPE = 56  # cells before them where there is no width
_NAME, _LONGEST_NAME = 10, 20  # cells of a token beside a bar
_WIDEST_BAR = 60


def overview(sheet: Sheet, trace: Trace, later: Sequence[Trace]) -> None:
    """The whole way, short: one prediction step by step, and those after it in a line each."""
    heading(sheet, trace)
    _show_tokens(sheet, trace)
    for stage in trace.stages:
        if stage.kind in ("embedding", "positions"):
            _say(sheet, stage, trace)
            if stage.kind == "embedding":
                _show_vector(sheet, stage)
    _show_blocks(sheet, trace)
    for name in ("norm", "logits"):
        _say(sheet, trace.stage(name), trace)
    _say(sheet, trace.stage("probabilities"), trace)
    show_bars(sheet, trace)
    _say(sheet, trace.stage("draw"), trace)
    _show_later(sheet, trace, later)


def heading(sheet: Sheet, trace: Trace) -> None:
    """Whose prediction it is, and what the letters of the sizes stand for."""
    config = trace.model.config
    blocks = "1 block" if config.layers == 1 else f"{config.layers} blocks"
    heads = "1 head" if config.heads == 1 else f"{config.heads} heads"
    sizes = f"{blocks} of {heads} (H), vectors of {config.width:,} numbers (C), {config.vocab_size:,} tokens (V)"
    sheet.card()
    sheet.say(f"{trace.model.name}: {sizes}", indent=0, dim=True)


def sizes(stage: Stage) -> str:
    """``[B=1 T=5 C=256]``."""
    pairs = zip(stage.symbols.split(), stage.shape, strict=True)
    return "[" + " ".join(f"{letter}={size}" for letter, size in pairs) + "]"


def last_guesses(trace: Trace) -> list[Guess]:
    """What the last vector would predict before the first block and after each."""
    rows = replace(trace, streams=[stream[-1:] for stream in trace.streams]).lens()
    return [row[-1] for row in rows]


def show_bars(sheet: Sheet, trace: Trace) -> None:
    """The likeliest tokens, each with logit and probability; then the one that was drawn, if it is none of them."""
    top = trace.next.top
    names = [token(trace, one.id) for one in top]
    label = min(max(_NAME, *map(cells, names)), _LONGEST_NAME)
    room = 0 if sheet.room is None else min(_WIDEST_BAR, sheet.room - label - 16)
    for name, one in zip(names, top, strict=True):
        spans = [
            Span(pad(cut_token(name, label), label)),
            sheet.dim(f"{number(one.logit):>7}"),
            Span(f"{percent(one.probability):>7}"),
        ]
        if room > 0:
            spans.append(Span(" " + bar(one.probability / (top[0].probability or 1), room)))
        sheet.line(spans)


def _say(sheet: Sheet, stage: Stage, trace: Trace) -> None:
    if stage.kind != "tokens":  # they come along with the heading
        sheet.card()
    sheet.say(words(stage, trace), title(stage.kind), sizes=sizes(stage))


def _show_tokens(sheet: Sheet, trace: Trace) -> None:
    _say(sheet, trace.stages[0], trace)
    tokens = trace.model.tokenizer
    shown = [visible(tokens.token_bytes(id_)) if sheet.colored else token(trace, id_) for id_ in trace.ids]
    shown = [cut(text, 30) for text in shown]
    widths = [max(cells(text), len(str(id_))) + 1 for text, id_ in zip(shown, trace.ids, strict=True)]
    first = 0
    while sheet.room is not None and sum(widths[first:]) + (4 if first else 0) > sheet.room:
        first += 1
    before = [Span("... ")] if first else []
    pieces, ids = list(before), [Span("    ")] if first else []
    for place in range(first, len(shown)):
        pieces += [sheet.stripe(shown[place], place), Span(" " * (widths[place] - cells(shown[place])))]
        id_ = str(trace.ids[place])
        ids += [sheet.stripe(id_, place), Span(" " * (widths[place] - len(id_)))]
    sheet.line(pieces)
    sheet.line(ids)
    if first:
        sheet.line([sheet.dim(f"The first {first:,} tokens are not shown here.")])


def _show_vector(sheet: Sheet, stage: Stage) -> None:
    numbers = "  ".join(f"{round(value, 2) + 0.0:.2f}" for value in stage.summary["vector"])
    sheet.line([sheet.dim(f"{numbers}  ...")])


def _show_blocks(sheet: Sheet, trace: Trace) -> None:
    layers = trace.model.config.layers
    turns = [trace.stage(f"blocks.{layer}").summary["turned_degrees"][-1] for layer in range(layers)]
    shown = sorted(sorted(range(layers), key=lambda layer: -turns[layer])[:_BLOCKS])
    last, heads = token(trace, trace.ids[-1]), trace.model.config.heads
    strong = f"the strongest of {heads} heads is shown" if heads > 1 else "its head is shown"
    sheet.card()
    sheet.say(
        f"{'In each, a' if layers > 1 else 'A'}ttention adds to {last} what it finds at earlier tokens ({strong}), "
        "and the MLP what its active neurons stand for. →: what the model would say if it ended there.",
        f"{layers} block{'s' * (layers > 1)}",
    )
    if len(shown) < layers:
        rest = [turn for layer, turn in enumerate(turns) if layer not in shown]
        sheet.say(
            f"Here are the {len(shown)} of {layers} that turn it most; the others turn it by "
            f"{degrees(min(rest))} to {degrees(max(rest))} (--layer L shows any)."
        )
    room = _IN_PIPE if sheet.room is None else min(sheet.room, 100) - _ADDED - _TURNED
    sheet.line([sheet.dim(" " * room + f"{'adds':>{_ADDED}}{'turns':>{_TURNED}}")])
    guesses = last_guesses(trace)
    for place, layer in enumerate(shown):
        if place:
            sheet.card()
        of = {kind: trace.stage(f"blocks.{layer}.{kind}") for kind in ("pattern", "attention", "hidden", "mlp")}
        guess = guesses[layer + 1]
        active = round(of["hidden"].summary["active"] * of["hidden"].shape[-1])
        told = f"{active:,} of {of['hidden'].shape[-1]:,} neurons active → "
        said = f"{cut_token(token(trace, guess.id), max(4, room - len(told) - 5))} {percent(guess.probability)}"
        sheet.line(_row(_looks(of["pattern"], trace, room), of["attention"], room), f"Block {layer}")
        sheet.line(_row(told + said, of["mlp"], room))


def _looks(pattern: Stage, trace: Trace, room: int) -> str:
    """What the strongest head looked at, as much as there is room for."""
    head = strongest(pattern)[0]
    before = f"head {head['head']} looks at "
    tries = [before + looked_at(head, trace, most) for most in (3, 2, 1)]
    return next((tried for tried in tries if cells(tried) <= room), cut(tries[-1], room))


def _row(text: str, added: Stage, room: int) -> list[Span]:
    length, turned = added.summary["norms"][-1], added.summary["turned_degrees"][-1]
    return [Span(pad(text, room)), Span(f"{number(length):>{_ADDED}}{degrees(turned):>{_TURNED}}")]


def _show_later(sheet: Sheet, trace: Trace, later: Sequence[Trace]) -> None:
    for place, made in enumerate(later):
        sheet.card()
        sheet.line([Span(_short(made, sheet.room))], "" if place else "And again")
    every = [trace, *later]
    drawn = [one.drawn.id for one in every]
    ended = drawn[-1] in trace.model.config.eos_ids
    made_bytes = trace.model.tokenizer.decode_bytes(drawn[: -1 if ended else None], follows=True)
    before, text = visible(trace.model.tokenizer.decode_bytes(trace.ids)), visible(made_bytes)
    if sheet.room is not None:
        text = cut(text, sheet.room - 10)
        before = _end_of(before, sheet.room - cells(text))
    sheet.line([Span(before), sheet.bold(text)], "So far")
    if ended:
        sheet.say(f"{token(trace, drawn[-1])} ends the text.")


def _short(made: Trace, room: int | None) -> str:
    """A later prediction in a line: the token that was drawn, then the likeliest ones."""
    drawn = made.drawn
    rank = "the likeliest" if drawn.rank == 0 else f"the {nth(drawn.rank + 1)} likeliest"
    name = pad(cut_token(token(made, drawn.id), 14), 14)
    line = f"{name} {percent(drawn.probability):>6}, {rank}"
    rest = [f"{token(made, one.id)} {percent(one.probability)}" for one in made.next.top[:3] if one.id != drawn.id]
    others = "; before it" if drawn.rank else "; then"
    tries = [f"{line}{others} {', '.join(rest[:most])}" for most in range(len(rest), 0, -1)]
    return next((tried for tried in tries if room is None or cells(tried) <= room), line)


def _end_of(text: str, room: int) -> str:
    if cells(text) <= room:
        return text
    while text and cells(text) > room - 1:
        text = text[1:]
    return "…" + text
