"""``gptcli complete``: a few short continuations of a text, for whoever has a cursor at its end."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.input import ERRORS, one_text, sources
from gptcli.cli.out import Output, harmless
from gptcli.cli.warm import Warm, open_runner
from gptcli.errors import GptcliError, UsageError

# Seconds beyond the deadline that a warm process has for its answer to arrive.
_PATIENCE = 0.1
UNTIL = ("line", "word", "sentence")
_DEADLINE = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*(ms|s)?")


def complete(
    ctx: typer.Context,
    prefix: Annotated[
        str | None, typer.Argument(metavar="PREFIX", help="What stands before the cursor; - for stdin.")
    ] = None,
    model: options.Model = None,
    suffix: Annotated[
        str, typer.Option("--suffix", metavar="TEXT", help="What stands behind the cursor: it should follow well.")
    ] = "",
    num: Annotated[int, typer.Option("--num", metavar="N", help="How many to suggest, at most.")] = 3,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens of each, at most.")] = 16,
    until: Annotated[
        str, typer.Option("--until", metavar="line|word|sentence", help="Where each ends, if not before.")
    ] = "line",
    min_prob: Annotated[
        float, typer.Option("--min-prob", metavar="P", help="Show only what is at least so likely, be it nothing.")
    ] = 0.0,
    deadline: Annotated[
        str | None, typer.Option("--deadline", metavar="TIME", help="Answer with what is there by then: 150ms, 0.2s.")
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
    offline: options.Offline = False,
    warm: Warm = None,
    widget: Annotated[bool, typer.Option("--widget", hidden=True)] = False,
) -> None:
    """Suggest short continuations for a cursor.

    The text before the cursor is PREFIX, a pipe, a file, or a pipe and then PREFIX. In a pipe: one suggestion a line,
    the best first. Nothing likely enough is no output, and no error.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--quantize", quantize, options.QUANTIZE)
    options.choice("--until", until, UNTIL)
    for name, value in (("--num", num), ("--max-tokens", max_tokens)):
        if value < 1:
            raise UsageError(f"{name} {value} is out of range", "it should be 1 or more")
    if not 0 <= min_prob <= 1:
        raise UsageError(f"--min-prob {min_prob:g} is out of range", "it should be from 0 to 1")
    asked: dict[str, Any] = {
        "suffix": suffix,
        "num": num,
        "max_tokens": max_tokens,
        "until": until,
        "min_prob": min_prob,
        "deadline_seconds": None if deadline is None else seconds(deadline),
        "special": special == "parse",
    }
    text = one_text(
        sources([] if prefix is None else [prefix], file or [], no_stdin=no_stdin, strip=strip, note=out.note), errors
    )

    # A warm process that is busy, or still loading, is no reason to be late.
    patience = None if asked["deadline_seconds"] is None else asked["deadline_seconds"] + _PATIENCE
    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "threads": threads}
    if widget:
        _answer_widget(out, model, patience, {"prefix": text, **asked})
        return
    try:
        runner = open_runner(model, out, warm=warm, timeout=patience, **how)
        found = runner.complete(text, **asked)
    except GptcliError as error:
        if patience is None or error.type != "late":
            raise
        out.detail(error.message)
        found = _nothing_yet(model)
    _show(out, found)


def _answer_widget(out: Output, model: str | None, patience: float | None, asked: dict[str, Any]) -> None:
    """What curl would get at the socket, for a shell's widget where there is no curl; it never loads a model."""
    from gptcli.cli.opening import find
    from gptcli.serve.client import Client, GoneError
    from gptcli.serve.place import Place, runtime_folder

    client = Client(Place.of(runtime_folder(), find(model).folder), patience)
    with suppress(GoneError):
        for each in client.post("/gptcli/complete", asked)["completions"]:
            text = "".join(filter(str.isprintable, each["text"].split("\n")[0]))
            out.data(f"{each['probability']:.6f}\t{text}")


def seconds(word: str, option: str = "--deadline") -> float:
    """A time as it is written: ``150ms``, ``0.2s``, or seconds. Raises UsageError."""
    found = _DEADLINE.fullmatch(word.strip())
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{option} {word!r} is not a time", "for instance 150ms, 0.2s, or 0.2")
    return seconds


def _nothing_yet(model: str | None) -> dict[str, Any]:
    """The answer where a warm process said nothing by the deadline, not even what it computes with."""
    from gptcli.cli.opening import find

    empty: dict[str, Any] = {"completions": [], "tokens": 0, "known": 0, "truncated": False, "late": True}
    return {"model": find(model).name, **empty, **dict.fromkeys(("device", "dtype", "quantize"))}


def _show(out: Output, result: dict[str, Any]) -> None:
    """Show what was found, wherever it was computed."""
    if out.json:
        out.record(result)
        return
    if result["truncated"]:
        out.detail(f"of the prefix the last {result['tokens']:,} tokens were read")
    if result["late"]:
        out.detail("the deadline broke the search off")
    for number, each in enumerate(result["completions"], 1):
        text = each["text"].replace("\r", "\\r").replace("\n", "\\n")
        if out.on_terminal:
            before = out.style(f"{number}  {percent(each['probability'])}  ", "dim")
            out.data(before + harmless(text))
        else:
            out.text(text + "\n", flush=False)


def percent(probability: float) -> str:
    """In six places, so that columns stand."""
    shown = f"{100 * probability:.1f}"
    return f"{'<0.1' if shown == '0.0' else shown:>5}%"
