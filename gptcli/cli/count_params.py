"""``gptcli count-params``: the parameter report, as the lecture's closing table draws it, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from gptcli.cli import options, placing
from gptcli.cli.count_open import Counted, config_beside, find_config, is_file, only_config
from gptcli.cli.count_views import BY, headline, view_csv, view_json, view_markdown, view_text
from gptcli.cli.out import Output
from gptcli.errors import UsageError
from gptcli.spec.library import DEFAULT_MODEL
from gptcli.spec.params import count_params as count
from gptcli.spec.presets import NAMES

FORMATS = ("table", "json", "csv", "markdown")


def _names(incomplete: str) -> list[str]:
    """What a MODEL that is being typed may become."""
    presets = [name for name in NAMES if name.startswith(incomplete)]
    return [*presets, *(name for name in options.model_names(incomplete) if name not in presets)]


def count_params(
    ctx: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="Presets, models, folders, config.json or .safetensors files.",
            autocompletion=_names,
        ),
    ] = None,
    model: options.Model = None,
    by: Annotated[str, typer.Option("--by", metavar="|".join(BY), help="What a row is.")] = BY[0],
    memory: Annotated[
        bool, typer.Option("--memory", help="Weights, KV cache, gradients and optimizer state, in each type.")
    ] = False,
    flops: Annotated[
        bool, typer.Option("--flops", help="Operations a token forward, in training, of a prompt.")
    ] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="SIZE", help="How many cards, and the split: 80GB, or 8x80GB.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", metavar="T", help="Tokens for these three; the model's own by default.")
    ] = None,
    sequences: Annotated[
        int, typer.Option("--sequences", metavar="B", help="Texts answered at once, for --memory and --gpus.")
    ] = 1,
    plan: placing.Plan = False,
    tp: Annotated[
        int | None, typer.Option("--tp", metavar="N", min=1, help="With --plan: over how many cards.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="With --plan: auto, float32, bfloat16 or float16.",
            autocompletion=options.one_of(*options.DTYPES),
        ),
    ] = "auto",
    quantize: Annotated[
        str, typer.Option("--quantize", metavar="none|int8|int4", help="With --plan: matrices in fewer bits.")
    ] = "none",
    offload: Annotated[bool, typer.Option("--offload", help="With --plan: the layers on the host.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Two models side by side.")] = False,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="FILE", help="Whether a file or folder holds what MODEL wants; exit 6 if not."),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Models on the Hub, by their headers alone: nothing is downloaded.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Of --remote: a branch, a tag or a commit.")
    ] = None,
    pull: options.Pull = False,
    offline: options.Offline = False,
    format: Annotated[
        str | None, typer.Option("--format", metavar="|".join(FORMATS), help="How to show it; table by default.")
    ] = None,
) -> None:
    """Report a model's parameters, matrix by matrix.

    Presets: gpt1, gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3-small, gpt3-medium, gpt3-large, gpt3-xl, gpt3-2.7b,
    gpt3-6.7b, gpt3-13b, gpt3. No tensor is read; with --remote, the headers of a model on the Hub are.
    """
    out: Output = ctx.obj
    # The text of every other command, as config.toml may ask for, is the table here.
    shown = options.choice("--format", "table" if format in (None, "text") else format, FORMATS)
    options.choice("--by", by, BY)
    for name in ("pull", "remote"):
        options.refuse_offline(ctx, name)
    names = models or [model or DEFAULT_MODEL]
    if plan:
        options.choice("--quantize", quantize, options.QUANTIZE)
        options.choice("--dtype", dtype, options.DTYPES)
        if gpus is None or len(names) > 1:
            raise UsageError("--plan is for one model on cards that are named", "add --gpus, as 8x141GB")
        how: dict[str, Any] = {"tp": tp, "dtype": dtype, "quantize": quantize, "offload": offload}
        placing.show_placing(out, names[0], gpus, context=context, sequences=sequences, **how)
        return
    find = _finder(names, remote, revision, pull, offline, out)
    _refuse_mixtures(ctx, diff, check, beyond=memory or flops or gpus is not None or out.json)
    if diff:
        _diff(names if models else [], by, shown, find, out)
    elif check is not None:
        named = options.strength(ctx, "model") == options.TYPED
        _check(models or ([model] if model and named else []), check, shown, find if remote else None, out)
    else:
        from gptcli.cli.count_paper import Asked

        asked = Asked(memory, flops, gpus, context, sequences)
        if out.json:  # memory and FLOPs always; a --context from the settings counts only where a table would have it
            meant = bool(asked) or any(
                options.strength(ctx, name) == options.TYPED for name in ("context", "sequences")
            )
            asked = Asked(True, True, gpus, context if meant else None, sequences if meant else 1)
        _report(names, by, options.strength(ctx, "by") == options.TYPED, asked, shown, find, out)


Find = Callable[[str], Counted]


def _finder(names: Sequence[str], remote: bool, revision: str | None, pull: bool, offline: bool, out: Output) -> Find:
    """How a name is looked up: here, here or else fetched (``--pull``), or on the Hub without fetching."""
    if pull and remote:
        raise UsageError("--pull gets a model, --remote looks at it where it is", "give one of them")
    if revision and not remote:
        raise UsageError("--revision is for --remote", "of a model that is here, name owner/name@revision")
    if remote:
        from gptcli.cli.count_open import find_remote

        return find_remote(revision, offline)
    if pull:
        from gptcli.cli.models_pull import get_if_missing

        for name in names:
            if name not in NAMES and not is_file(name):
                get_if_missing(name, offline=offline, out=out)
    return lambda name: find_config(name, out)


def _refuse_mixtures(ctx: typer.Context, diff: bool, check: str | None, *, beyond: bool) -> None:
    """What was typed has to make sense together; settings that do not matter are passed over."""
    typed = {
        name: f"--{name}"
        for name in ("memory", "flops", "gpus", "context", "sequences", "diff", "check")
        if options.strength(ctx, name) == options.TYPED
    }
    if diff or check is not None:
        mode = "diff" if diff else "check"
        if others := [flag for name, flag in typed.items() if name != mode]:
            raise UsageError(f"--{mode} and {others[0]} do not go together", "give one of them")
    elif typed.keys() & {"context", "sequences"} and not beyond:
        raise UsageError("--context and --sequences say nothing alone", "add --memory, --flops or --gpus SIZE")


def _report(names: Sequence[str], by: str, by_typed: bool, asked: Any, format: str, find: Find, out: Output) -> None:
    """Each model in turn. What is asked beyond parameters takes the table's place, unless ``--by`` asks for both."""
    if asked and by_typed and format == "csv":
        raise UsageError("CSV is one table: either --by, or --memory, --flops and --gpus", "leave one of them out")
    for number, name in enumerate(names):
        counted = find(name)
        report = count(counted.config)
        found, tables = {}, []
        if asked:
            from gptcli.cli import count_paper
            from gptcli.cli.table import as_csv, as_markdown, as_text

            found = count_paper.figures(counted.config, asked)
            tables = count_paper.tables(found)
        if out.json:
            out.record({**view_json(counted, report, by), **found})
        elif format == "csv" and asked:
            rows: list[Sequence[object]] = [] if number else [("model", "name", "value")]
            out.data(as_csv([*rows, *count_paper.csv_rows(counted.title, found)]), end="")
        elif format == "csv":
            out.data(view_csv(counted, report, by, header=number == 0), end="")
        elif format == "markdown":
            parts = [view_markdown(counted, report, by)] if by_typed or not asked else []
            parts += [as_markdown(table) for table in tables]
            out.data(("\n" if number else "") + "\n\n".join("\n".join(part) for part in parts))
        else:
            head = headline(counted, out)
            if by_typed or not asked:
                head += view_text(counted, report, by, out)
            parts = [head, *(as_text(table, out) for table in tables)]
            out.data(("\n" if number else "") + "\n\n".join("\n".join(part) for part in parts))


def _diff(names: Sequence[str], by: str, format: str, find: Find, out: Output) -> None:
    if len(names) != 2:
        raise UsageError(f"--diff takes two models, not {len(names)}", "gptcli count-params --diff A B")
    from dataclasses import replace

    from gptcli.cli.count_compare import show_diff

    a, b = (find(name) for name in names)
    if a.title == b.title:  # two folders of one name
        a, b = (replace(counted, title=name) for counted, name in zip((a, b), names, strict=True))
    show_diff(a, b, by, format, out)


def _check(names: Sequence[str], file: str, format: str, find: Find | None, out: Output) -> None:
    """Without a name the configuration is the one beside the file."""
    if len(names) > 1:
        raise UsageError(f"--check takes one model, not {len(names)}", "gptcli count-params MODEL --check FILE")
    from gptcli.cli.count_compare import show_check

    known = (find(names[0]) if find else only_config(names[0], out)) if names else config_beside(file)
    show_check(known, file, format, out)
