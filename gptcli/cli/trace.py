"""``gptcli trace``: follow one prediction through the model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.distribution import as_json
from gptcli.cli.input import ERRORS, one_text, sources
from gptcli.cli.out import Output
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.trace import Drawn, Trace

# Numbers of attention that are kept at once, four bytes each: more are computed in several passes.
_KEPT_AT_ONCE = 1 << 26


def trace(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to follow; - for stdin.")] = None,
    model: options.Model = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", help="Predictions in all; those after the first short.")
    ] = 4,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", metavar="T", help="0: always the likeliest token.")
    ] = 1.0,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Show the N likeliest tokens.")] = 5,
    layer: Annotated[int | None, typer.Option("--layer", metavar="L", help="One block in full, from 0.")] = None,
    head: Annotated[int | None, typer.Option("--head", metavar="H", help="One head of that block, from 0.")] = None,
    attention: Annotated[
        bool, typer.Option("--attention", help="Where each token looks: of all, of --layer, or of its --head.")
    ] = False,
    lens: Annotated[
        bool, typer.Option("--lens", help="What the model would say after each block, everywhere.")
    ] = False,
    stages: Annotated[bool, typer.Option("--stages", help="List every stage: sizes, type and what it does.")] = False,
    step: Annotated[bool, typer.Option("--step", help="Wait for a key after each stage; q ends.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page to look at and send.")
    ] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture.")] = None,
    truncate_prompt: Annotated[
        str | None, typer.Option("--truncate-prompt", metavar="left", help="Cut a prompt that is too long.")
    ] = None,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> None:
    """Follow one prediction through the model.

    From the text to the next token: tokens, embedding, each block's attention and MLP, logits, softmax and the draw.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    if truncate_prompt is not None:
        options.choice("--truncate-prompt", truncate_prompt, ("left",))
    for name, value in (("--max-tokens", max_tokens), ("--top", top)):
        if value < 1:
            raise UsageError(f"{name} {value} is out of range", "it should be 1 or more")
    if head is not None and layer is None:
        raise UsageError("--head is about one block, and none is named", "add --layer L")
    options.check_seed(seed)
    asked = _Asked(layer, head, attention, lens, stages, step, html, svg)
    from gptcli.core.settings import Sampling

    Sampling(temperature)  # a wrong value is told before a model is loaded
    if step:
        from gptcli.cli import trace_step

        trace_step.check(out)
    prompt = one_text(
        sources([] if text is None else [text], file or [], no_stdin=no_stdin, strip=strip, note=out.note), errors
    )

    from gptcli.cli.opening import open_for_inference

    loaded = open_for_inference(model, out, device=device, dtype=dtype, quantize=quantize, threads=threads)
    from gptcli.core import runtime
    from gptcli.core.trace import check_place

    check_place(loaded, layer, head)
    ids = _prompt_ids(loaded, prompt, special == "parse", truncate_prompt is not None, max_tokens, out)
    seed = seed if seed is not None else runtime.draw_seed()
    work = _Work(loaded, ids, temperature, seed, top)
    made = work.predictions(max_tokens if out.json or asked.whole else 1, asked.kept(loaded, len(ids)))
    if len(made) < max_tokens and len(ids) + len(made) > loaded.config.context:
        out.note("the context is full: there is no room for another prediction")
    for path in asked.write(made, prompt):
        if not out.json:
            out.data(str(path))
    if out.json:
        out.record(_as_json(work, asked, made, prompt))
    elif asked.shows:
        _show(out, work, asked, made)


@dataclass(frozen=True)
class _Asked:
    """What is to be shown and written."""

    layer: int | None
    head: int | None
    attention: bool
    lens: bool
    stages: bool
    step: bool
    html: Path | None
    svg: Path | None

    @property
    def part(self) -> bool:
        """Whether a part of the way is asked for, instead of the whole."""
        return self.layer is not None or self.attention or self.lens or self.stages

    @property
    def shows(self) -> bool:
        """Whether anything goes to stdout besides the names of files."""
        return self.part or self.step or (self.html is None and self.svg is None)

    @property
    def whole(self) -> bool:
        """Whether the predictions after the first are told of."""
        return not self.part or self.html is not None or self.svg is not None

    def kept(self, model: Model, tokens: int) -> Collection[int]:
        """The blocks whose attention is needed, as many of them as can be kept at once."""
        all_ = self.html is not None or self.svg is not None or (self.attention and self.layer is None)
        wanted = set(range(_layers_at_once(model, tokens))) if all_ else set()
        return wanted if self.layer is None else wanted | {self.layer}

    def write(self, made: Sequence[Trace], prompt: str) -> list[Path]:
        """The page and the picture; returns the files."""
        if self.html is None and self.svg is None:
            return []
        from gptcli.cli import trace_page

        for file, write in ((self.html, trace_page.write_html), (self.svg, trace_page.write_svg)):
            if file is not None:
                write(made[0], made[1:], prompt, file)
        return [file for file in (self.html, self.svg) if file is not None]


@dataclass(frozen=True)
class _Work:
    """One prompt in one model."""

    model: Model
    ids: list[int]
    temperature: float
    seed: int
    top: int

    def predictions(self, count: int, kept: Collection[int]) -> list[Trace]:
        """One prediction, and after it those of the text that it makes, up to ``count``, the end of text or the
        context.
        """
        made = [self._trace(self.ids, kept)]
        while len(made) < count:
            ids = [*made[-1].ids, made[-1].drawn.id]
            if ids[-1] in self.model.config.eos_ids or len(ids) > self.model.config.context:
                break
            made.append(self._trace(ids))
        return made

    def attention(self, first: Trace, layer: int | None, head: int | None) -> list[list[float]]:
        """Where each token looked: one head's, a block's mean over heads, or the mean over all blocks and heads."""
        if layer is not None:
            shown = first if layer in first.patterns else self._trace(self.ids, [layer])
            return shown.pattern(layer, head)
        layers, at_once = self.model.config.layers, _layers_at_once(self.model, len(self.ids))
        total: Any = 0
        for start in range(0, layers, at_once):
            wanted = range(start, min(start + at_once, layers))
            kept = first if all(layer in first.patterns for layer in wanted) else self._trace(self.ids, wanted)
            total = total + sum(kept.patterns[layer].mean(0) for layer in wanted)
        mean: list[list[float]] = (total / layers).tolist()
        return mean

    def _trace(self, ids: Sequence[int], kept: Collection[int] = ()) -> Trace:
        from gptcli.core.trace import trace as run

        return run(self.model, ids, temperature=self.temperature, seed=self.seed, top=self.top, patterns=kept)


def _layers_at_once(model: Model, tokens: int) -> int:
    return max(1, min(model.config.layers, _KEPT_AT_ONCE // (model.config.heads * tokens**2)))


def _prompt_ids(model: Model, text: str, special: bool, truncate: bool, predictions: int, out: Output) -> list[int]:
    """The prompt's tokens; where it may be cut, its beginning goes, so that the predictions have room."""
    from gptcli.core.generate import check_prompt, prompt_ids

    ids = prompt_ids(model, text, special=special)
    most = max(1, model.config.context - min(predictions - 1, model.config.context // 2))
    if truncate and len(ids) > model.config.context:
        out.note(f"the first {len(ids) - most:,} of {len(ids):,} prompt tokens were cut off")
        ids = ids[-most:]
    check_prompt(model, ids)
    return ids


def _show(out: Output, work: _Work, asked: _Asked, made: Sequence[Trace]) -> None:
    from gptcli.cli import trace_block, trace_grid, trace_view
    from gptcli.cli.trace_sheet import Sheet

    sheet, first = Sheet(out), made[0]
    if not asked.part:
        trace_view.overview(sheet, first, made[1:])
    else:
        trace_view.heading(sheet, first)
    if asked.stages:
        trace_grid.stages(sheet, first)
    if asked.layer is not None and not asked.attention:
        trace_block.block(sheet, first, asked.layer, asked.head)
    if asked.attention:
        weights = work.attention(first, asked.layer, asked.head)
        trace_grid.attention(sheet, first, weights, asked.layer, asked.head)
    if asked.lens:
        trace_grid.lens(sheet, first)
    if asked.step:
        from gptcli.cli import trace_step

        trace_step.walk(out, sheet.cards)
        return
    for card in sheet.cards:
        for line in card:
            out.data(line)


def _as_json(work: _Work, asked: _Asked, made: Sequence[Trace], prompt: str) -> dict[str, Any]:
    model, first = work.model, made[0]

    def text_of(id_: int) -> str:
        return model.tokenizer.token_text(id_)

    value: dict[str, Any] = {
        "model": model.name,
        "prompt": prompt,
        "stages": [stage.to_dict() for stage in first.stages],
        "next": {"model": model.name, "prompt": prompt, "tokens": first.ids} | as_json(first.next, text_of),
        "drawn": _drawn(model, first.drawn),
        "then": [
            {"tokens": one.ids, "drawn": _drawn(model, one.drawn), "next": as_json(one.next, text_of)}
            for one in made[1:]
        ],
        "seed": work.seed,
        **model.used,
    }
    if asked.lens:
        value["lens"] = _lens(first)
    if asked.attention:
        weights = work.attention(first, asked.layer, asked.head)
        value["attention"] = {"layer": asked.layer, "head": asked.head, "weights": weights}
    return value


def _drawn(model: Model, drawn: Drawn) -> dict[str, Any]:
    """``rank`` counts from 0, the likeliest."""
    return {"id": drawn.id, "text": _text(model, drawn.id), "probability": drawn.probability, "rank": drawn.rank}


def _lens(first: Trace) -> list[dict[str, Any]]:
    """A row for each place of the residual stream, named by the stage that it leaves."""
    names = ["positions" if any(stage.name == "positions" for stage in first.stages) else "embedding"]
    names += [f"blocks.{layer}" for layer in range(first.model.config.layers)]
    return [
        {
            "name": name,
            "guesses": [
                {"id": one.id, "text": _text(first.model, one.id), "probability": one.probability} for one in row
            ],
        }
        for name, row in zip(names, first.lens(), strict=True)
    ]


def _text(model: Model, id_: int) -> str:
    return model.tokenizer.token_text(id_)
