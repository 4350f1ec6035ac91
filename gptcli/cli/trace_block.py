"""One block in full: what its heads asked and found, which neurons answered, and how each token's vector changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptcli.cli.cells import bar, cells, cut_token, pad
from gptcli.cli.trace_sheet import Sheet, Span
from gptcli.cli.trace_view import sizes
from gptcli.cli.trace_words import degrees, looked_at, number, percent, strongest, title, token, words

if TYPE_CHECKING:
    from gptcli.core.trace import Stage, Trace

_NAME = 14  # cells of a token at the left
_LOOKED = 46  # cells for what a head looked at, where there is no width
_LISTED = 10  # tokens that are listed on a terminal
_BAR = 40


def block(sheet: Sheet, trace: Trace, layer: int, head: int | None) -> None:
    """The stages of a block, or of one of its heads."""
    stages = {stage.kind: stage for stage in trace.stages if stage.layer == layer}
    sheet.card()
    sheet.say(
        f"The last token, {token(trace, trace.ids[-1])}, on its way through one of the blocks 0 to "
        f"{trace.model.config.layers - 1}. Attention and MLP each read the vectors scaled by a norm; what they make is "
        "added to the vectors as they were.",
        f"Block {layer}",
    )
    for kind in ("query", "key", "value"):
        _say(sheet, stages[kind], trace)
        _lengths(sheet, stages[kind], trace, head)
    if head is not None:
        _one_head(sheet, trace, stages, head)
        return
    _say(sheet, stages["pattern"], trace)
    _heads(sheet, stages["pattern"], trace)
    _say(sheet, stages["attention"], trace)
    _say(sheet, stages["hidden"], trace)
    neurons = [f"{one['neuron']}: {number(one['value'])}" for one in stages["hidden"].summary["neurons"]]
    sheet.line([Span("The most active neurons: " + ", ".join(neurons))])
    _say(sheet, stages["mlp"], trace)
    _say(sheet, stages["block"], trace)
    _tokens(sheet, trace, stages)


def _say(sheet: Sheet, stage: Stage, trace: Trace) -> None:
    name, text = title(stage.kind), words(stage, trace)
    sheet.card()
    if cells(name) < 13:
        sheet.say(text, name, sizes=sizes(stage))
    else:
        sheet.line([], name)
        sheet.say(text, sizes=sizes(stage))


def _lengths(sheet: Sheet, stage: Stage, trace: Trace, head: int | None) -> None:
    norms = stage.summary["norms"]
    if head is not None:
        shared = trace.model.config.heads // len(norms)
        sheet.line([Span(f"Length in head {head}: {number(norms[head // shared])}")])
        return
    sheet.say("Length by head: " + ", ".join(f"{place}: {number(norm)}" for place, norm in enumerate(norms)))


def _heads(sheet: Sheet, pattern: Stage, trace: Trace) -> None:
    """A line a head: where it looked, how spread its look was, and the length of what it brought."""
    room = _LOOKED if sheet.room is None else max(10, min(sheet.room - 8 - 10 - 9, 70))
    first = strongest(pattern)[0]["head"]
    sheet.line([sheet.dim(f"{'head':<8}{pad('looks at', room)}{'spread':>10}{'brings':>9}")])
    for head in pattern.summary["heads"]:
        tries = [looked_at(head, trace, most) for most in (3, 2, 1)]
        seen = next((tried for tried in tries if cells(tried) <= room), tries[-1])
        text = f"{head['head']:<8}{pad(seen, room)}{head['entropy_bits']:>5.2f} bits{number(head['norm']):>9}"
        sheet.line([sheet.bold(text) if head["head"] == first and len(pattern.summary["heads"]) > 1 else Span(text)])


def _one_head(sheet: Sheet, trace: Trace, stages: dict[str, Stage], head: int) -> None:
    """What one head looked at from the last token, and what it made of that."""
    pattern = stages["pattern"]
    weights = trace.pattern(pattern.layer or 0, head)[-1]
    names = [token(trace, id_) for id_ in trace.ids]
    best = sorted(range(len(weights)), key=lambda place: -weights[place])
    if sheet.width is not None:
        best = best[:_LISTED]
    label = min(max(cells(names[place]) for place in best), _NAME)
    digits = len(str(len(weights)))
    room = 0 if sheet.room is None else min(_BAR, sheet.room - digits - label - 10)
    sheet.card()
    sheet.line([], title("pattern"))
    sheet.say(
        f"Softmax turns the matches into shares of 100%. Head {head} looks from {names[-1]} at:", sizes=sizes(pattern)
    )
    for place in best:
        spans = [
            sheet.dim(f"{place + 1:>{digits}} "),
            Span(f"{pad(cut_token(names[place], label), label)} {percent(weights[place]):>6} "),
        ]
        sheet.line([*spans, *([Span(bar(weights[place], room))] if room > 0 else [])])
    if len(best) < len(weights):
        rest = 1 - sum(weights[place] for place in best)
        sheet.line([sheet.dim(f"and at {len(weights) - len(best):,} more, {percent(max(0.0, rest))} together")])
    told = pattern.summary["heads"][head]
    whole = number(stages["attention"].summary["norms"][-1])
    sheet.say(
        f"Its look is spread over {told['entropy_bits']:.2f} bits (0: one token alone). What it brings is "
        f"{number(told['norm'])} long; what all heads of the block bring together is {whole} long."
    )


def _tokens(sheet: Sheet, trace: Trace, stages: dict[str, Stage]) -> None:
    """How the block changed each token's vector."""
    count = len(trace.ids)
    first = 0 if sheet.width is None else max(0, count - _LISTED)
    sheet.card()
    which = f" (the last {_LISTED} of {count:,} are shown)" if first else ""
    sheet.say(f"How the block changed the vector of each token{which}:", "Streams")
    sheet.line([sheet.dim(f"{'':{_NAME}}{'attention adds':>16}{'the MLP adds':>16}{'length after':>14}{'turned':>8}")])
    added = [(stages[kind].summary["norms"], stages[kind].summary["turned_degrees"]) for kind in ("attention", "mlp")]
    norms, turned = stages["block"].summary["norms"], stages["block"].summary["turned_degrees"]
    for place in range(first, count):
        both = [f"{number(lengths[place]):>9}{degrees(turns[place]):>7}" for lengths, turns in added]
        name = pad(cut_token(token(trace, trace.ids[place]), _NAME), _NAME)
        sheet.line([Span(f"{name}{both[0]}{both[1]}{number(norms[place]):>14}{degrees(turned[place]):>8}")])
