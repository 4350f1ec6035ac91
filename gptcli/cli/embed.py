"""``gptcli embed``: texts as vectors, and the geometry of the embedding table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli import options
from gptcli.cli.input import ERRORS, Source, sources
from gptcli.cli.out import Output
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.cli.embed_vectors import Work
    from gptcli.core.embedding import Pool, Table

_NEAREST = 10
_FILES = (".npy", ".safetensors")
_PICTURES = (".png", ".svg")
_TEXTS, _TABLE, _VIEWS = "Vectors of texts", "The table of words", "Pictures"


def embed(
    ctx: typer.Context,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts, or words for the table; - for stdin.")
    ] = None,
    model: options.Model = None,
    pool: Annotated[
        str,
        typer.Option(
            "--pool",
            metavar="last|mean|none",
            help="The last token's vector, the mean over the tokens, or one a token.",
            rich_help_panel=_TEXTS,
        ),
    ] = "last",
    layer: Annotated[
        int,
        typer.Option(
            "--layer",
            metavar="N",
            help="0: embedding and position; N: after block N; -1, the last: after the final norm too.",
            rich_help_panel=_TEXTS,
        ),
    ] = -1,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale each vector to length 1.", rich_help_panel=_TEXTS)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write them to a .npy or .safetensors.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    nearest: Annotated[
        int | None,
        typer.Option(
            "--nearest", metavar="N", min=1, help="The N tokens most like each word, by cosine.", rich_help_panel=_TABLE
        ),
    ] = None,
    expression: Annotated[
        str | None,
        typer.Option(
            "--expression",
            metavar="EXPR",
            help='The tokens nearest to a sum: \'" king" - " man" + 0.5 * " woman"\'.',
            rich_help_panel=_TABLE,
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            "--direction",
            metavar="EXPR",
            help='Sort words along \'" woman" - " man"\'; without words, the table\'s ends.',
            rich_help_panel=_TABLE,
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="embedding|unembedding",
            help="Take each TEXT as a word: its row in this table.",
            rich_help_panel=_TABLE,
        ),
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="The cosine of each with each, as a heat map.", rich_help_panel=_VIEWS)
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="All as points in a plane (PCA).", rich_help_panel=_VIEWS)
    ] = False,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot-file", metavar="FILE", help="The same into a .png or .svg.", rich_help_panel=_VIEWS),
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a text of its own.")] = False,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> None:
    """Turn texts into vectors, or explore the embedding table.

    Each TEXT, file or line becomes a vector. With --nearest, --expression, --direction or --table the words are rows
    of the table instead; the space before a word is part of it: " king".
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--pool", pool, ("last", "mean", "none"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    if table is not None:
        options.choice("--table", table, ("embedding", "unembedding"))
    asked = _Asked(nearest, expression, direction, similarity, plot, plot_file, output)
    asked.check()
    words = table is not None or asked.about_table
    typed = [name for name in ("pool", "layer") if options.strength(ctx, name) == options.TYPED]
    if words and typed:
        raise UsageError(
            f"--{typed[0]} is about texts, and words of the table have no layers", "leave out one or the other"
        )
    if asked.about_table and normalize and options.strength(ctx, "normalize") == options.TYPED:
        raise UsageError("--normalize changes no direction and no order of cosines", "leave it out")
    from gptcli.text.expression import parse

    for given in (expression, direction):
        if given is not None:
            parse(given)  # what is wrong is told before a model is loaded
    found = _inputs(asked, texts or [], file or [], no_stdin=no_stdin, strip=strip)
    taken = _texts(found, errors, lines)
    if asked.direction is not None:  # an empty pipe has no words; then the whole table is sorted
        taken = [text for text in taken if text]
    elif found and not taken:
        raise UsageError("there is nothing to work on", "the input has no lines")

    from gptcli.cli.embed_vectors import Work
    from gptcli.cli.opening import open_for_inference

    loaded = open_for_inference(model, out, device=device, dtype=dtype, quantize=quantize, threads=threads)
    kind: Table = "unembedding" if table == "unembedding" else "embedding"
    if words:
        from gptcli.cli.embed_words import Words

        if kind == "unembedding" and loaded.config.tied:
            out.note(f"the unembedding of {loaded.name} is its embedding: the two are tied")
        looked = Words(out, loaded, kind, special=special == "parse")
        if direction is not None:
            looked.direction(direction, taken, nearest or _NEAREST)
            return
        if expression is not None or nearest is not None:
            looked.nearest(expression, taken, nearest or _NEAREST)
            return
    chosen: Pool = "last" if words or pool == "last" else "mean" if pool == "mean" else "none"
    work = Work(out, loaded, kind if words else None, chosen, layer, normalize, special == "parse")
    _show(out, work, taken, asked)


@dataclass(frozen=True)
class _Asked:
    """What is to be shown."""

    nearest: int | None
    expression: str | None
    direction: str | None
    similarity: bool
    plot: bool
    plot_file: Path | None
    output: Path | None

    @property
    def about_table(self) -> bool:
        return self.nearest is not None or self.expression is not None or self.direction is not None

    def check(self) -> None:
        """Raise UsageError for what excludes each other, and for files of a kind that can't be written."""
        views = {
            "--expression": self.expression is not None,
            "--direction": self.direction is not None,
            "--similarity": self.similarity,
            "--plot": self.plot or self.plot_file is not None,
            "--output": self.output is not None,
        }
        if not views["--expression"] and not views["--direction"]:  # with these it is their number
            views["--nearest"] = self.nearest is not None
        given = [name for name, value in views.items() if value]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} ask for different things", "give one of them")
        if self.nearest is not None and (self.similarity or views["--plot"] or self.output):
            raise UsageError("--nearest and a picture ask for different things", "give one of them")
        for name, file, endings in (("--output", self.output, _FILES), ("--plot-file", self.plot_file, _PICTURES)):
            if file is not None and file.suffix.lower() not in endings:
                raise UsageError(f"{name} {file} is neither {' nor '.join(endings)}", "give it one of these endings")


def _inputs(asked: _Asked, texts: Sequence[str], files: Sequence[Path], *, no_stdin: bool, strip: bool) -> list[Source]:
    if asked.expression is not None:  # it brings its own words; a pipe is not for it
        if texts or files:
            raise UsageError("--expression brings its own words", "leave out the text, or write it into the expression")
        return []
    return sources(texts, files, no_stdin=no_stdin, strip=strip, required=asked.direction is None)


def _texts(found: Sequence[Source], errors: str, lines: bool) -> list[str]:
    if lines:
        return [line for source in found for line in source.lines(errors)]
    return [source.text(errors) for source in found]


def _show(out: Output, work: Work, texts: Sequence[str], asked: _Asked) -> None:
    if asked.plot or asked.plot_file is not None:
        from gptcli.cli.embed_plot import show_plot

        show_plot(out, work, texts, asked.plot_file, drawn=asked.plot)
    elif asked.similarity:
        from gptcli.cli.embed_map import show_similarity

        show_similarity(out, work, texts)
    elif asked.output is not None:
        work.write(texts, asked.output)
    else:
        work.show(texts)
