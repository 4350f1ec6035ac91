"""``gptcli score``: surprise as a filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options, placing, ranks
from gptcli.cli.input import ERRORS, Source, sources
from gptcli.cli.out import Output
from gptcli.errors import UsageError
from gptcli.spec.library import DEFAULT_MODEL

if TYPE_CHECKING:
    from gptcli.cli.score_read import Reader
    from gptcli.cli.score_show import View
    from gptcli.core.build import Model

# Below so many bytes the answer is there before a bar is of use.
_WORTH_A_BAR = 1 << 15


def score(
    ctx: typer.Context,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to score; - for stdin.")] = None,
    model: options.Model = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is a document; a row each: bits, bits a byte, the line.")
    ] = False,
    above: Annotated[
        float | None, typer.Option("--above", metavar="BITS", help="Only lines of more than BITS bits a byte.")
    ] = None,
    total: Annotated[
        bool, typer.Option("--total", help="Only bits, bits a byte, perplexity, tokens, bytes; a row a file.")
    ] = False,
    stride: Annotated[
        int | None,
        typer.Option("--stride", metavar="N", help="Tokens between windows of a long text; half the context."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", metavar="N", min=1, help="Tokens at a time; by the device.")
    ] = None,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    tp: ranks.Tp = None,
    offload: ranks.Offload = False,
    plan: placing.Plan = False,
    gpus: placing.Gpus = None,
    offline: options.Offline = False,
) -> None:
    """Show how surprising each token of a text is.

    On a terminal: the text, each token coloured by its bits. In a pipe: a line a token, bits and token. Lines holding
    only <|endoftext|> part documents; each starts anew, and with --lines each line does.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    if total and above is not None:
        raise UsageError("--total and --above ask for different things", "give one of them")
    if above is not None and math.isnan(above):
        raise UsageError("--above nan is no number", "give a number of bits a byte, for instance 3")
    if stride is not None and stride < 1:
        raise UsageError(f"--stride {stride} is out of range", "it should be from 1 to the context")
    if placing.asked(ctx, plan):
        held: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "tp": tp, "offload": offload}
        placing.show_placing(out, model or DEFAULT_MODEL, gpus, sequences=1, **held)
        return
    line = ranks.join(out, tp, "score", device=device, threads=threads)
    found = sources([] if text is None else [text], file or [], no_stdin=no_stdin, strip=strip, note=out.note)

    from gptcli.cli.opening import open_for_inference

    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "threads": threads}
    loaded = open_for_inference(model, out, line=line, offload=offload, **how)
    from gptcli.cli.score_read import Reader
    from gptcli.core.score import check_stride, default_stride

    step = default_stride(loaded.config.context) if stride is None else stride
    check_stride(step, loaded.config.context)
    each_line = lines or above is not None
    reader = Reader(found, errors, special == "parse", lines=each_line)
    view = _view(out, loaded, step, lines=lines, each_line=each_line, above=above, total=total)
    view.names = [source.name for source in found]
    job = _Job(reader, loaded, view)
    try:
        with _progress(out, found, shown=total or not out.on_terminal) as progress:
            job.go(step, batch_tokens, progress)
    except KeyboardInterrupt:
        view.interrupted(job.of_source)
        raise
    view.close(reader.rest, job.every)


def _view(
    out: Output, model: Model, stride: int, *, lines: bool, each_line: bool, above: float | None, total: bool
) -> View:
    from gptcli.cli import score_show as show

    if total:
        return show.Json(out, model, stride, with_tokens=False) if out.json else show.TotalRows(out, model, stride)
    if each_line:
        if out.json:
            return show.JsonLines(out, model, stride, above)
        return show.Lines(out, model, stride, above, numbers=lines)
    if out.json:
        return show.Json(out, model, stride, with_tokens=True)
    return show.ColoredText(out, model, stride) if out.colored() else show.TokenRows(out, model, stride)


class _Job:
    """Scores what a reader reads, shows it as it comes, and adds it up: all, and the source that it is at."""

    def __init__(self, reader: Reader, model: Model, view: View) -> None:
        from gptcli.core.score import Totals

        self.reader, self.model, self.view = reader, model, view
        self.every, self.of_source = Totals(), Totals()
        self._source = -1

    def go(self, stride: int, batch_tokens: int | None, progress: Callable[[float], None]) -> None:
        from gptcli.core.score import Totals, score
        from gptcli.train.log import undivided

        reader, model, view = self.reader, self.model, self.view
        own = Totals()  # of the document
        begun = False
        done = 0  # tokens
        for scored in score(model, reader.stream(model.tokenizer), stride=stride, batch_tokens=batch_tokens):
            document = reader.documents[0]
            with undivided():  # or what is half written would be lost
                self._go_to(document.source)
                if not begun:
                    view.begin(document)
                    begun = True
                view.tokens(document, scored)
                part = Totals(scored.total_bits, scored.tokens_scored)
                if scored.last:
                    part.bytes, part.documents = document.bytes, 1
                for totals in (own, self.of_source, self.every):
                    totals.add(part)
            if scored.last:
                view.end(document, own)
                reader.documents.popleft()
                own, begun = Totals(), False
            done += len(scored.ids)
            progress(reader.bytes * done / max(1, reader.tokens))
        self._go_to(len(view.names))

    def _go_to(self, source: int) -> None:
        """End the source before, and begin this one; those between hold no document."""
        from gptcli.core.score import Totals

        while self._source < source:
            if self._source >= 0:
                self.view.source_end(self._source, self.of_source)
            self._source, self.of_source = self._source + 1, Totals()
            if self._source < len(self.view.names):
                self.view.source(self._source)


@contextmanager
def _progress(out: Output, found: Sequence[Source], *, shown: bool) -> Iterator[Callable[[float], None]]:
    """A bar for what takes a while, where no text passes on the terminal that would show how far it is."""
    sizes = [source.size() for source in found]
    whole = None if None in sizes else sum(size or 0 for size in sizes)
    if not shown or not out.talks_to_terminal or (whole is not None and whole < _WORTH_A_BAR):
        yield lambda done: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("scoring"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with out.progress(columns) as bar:
        task = bar.add_task("scoring", total=whole)
        yield lambda done: bar.update(task, completed=done)
