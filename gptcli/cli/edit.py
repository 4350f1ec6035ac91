"""``gptcli edit``: a prompt line, or a whole text, with ghost text from the model as one types."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gptcli.cli import options
from gptcli.cli.complete import UNTIL, seconds
from gptcli.cli.input import one_text, sources
from gptcli.cli.keyboard import raised_on_termination
from gptcli.cli.out import Output
from gptcli.cli.state import private_file
from gptcli.cli.warm import Runner, Warm
from gptcli.errors import ExitCode, UnsupportedError, UsageError

_HUNG_UP = 129  # how a shell tells of a process whose terminal has gone


def edit(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A text to edit, new or not; without it a prompt line.")
    ] = None,
    model: options.Model = None,
    initial: Annotated[
        str | None, typer.Option("--initial", metavar="TEXT", help="What the prompt line begins with.")
    ] = None,
    until: Annotated[
        str, typer.Option("--until", metavar="line|word|sentence", help="Where ghost text ends, if not before.")
    ] = "line",
    min_prob: Annotated[
        float, typer.Option("--min-prob", metavar="P", help="Show only what is at least so likely, be it nothing.")
    ] = 0.05,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Tokens of it, at most.")] = 16,
    delay: Annotated[
        str, typer.Option("--delay", metavar="TIME", help="How long after the last key the model is asked: 80ms.")
    ] = "80ms",
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="TIME", help="Show what is found by then: 150ms, 0.2s.")
    ] = "1s",
    history: Annotated[bool, typer.Option("--history/--no-history", help="Keep prompt lines on disk.")] = True,
    vi: options.Vi = False,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    offline: options.Offline = False,
    warm: Warm = None,
) -> None:
    """Write a line or a text, with ghost text from the model.

    Tab or End takes all of it, Right a word, Esc hides it, Ctrl-Space shows others and how likely they are. You can
    type before the model has loaded.

    Without FILE, Enter accepts the line, which goes to stdout, and Alt-Enter begins another; a pipe is what it begins
    with. Of a FILE, Ctrl-S saves and Ctrl-X leaves.
    """
    out: Output = ctx.obj
    options.choice("--quantize", quantize, options.QUANTIZE)
    options.choice("--until", until, UNTIL)
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} is out of range", "it should be 1 or more")
    if not 0 <= min_prob <= 1:
        raise UsageError(f"--min-prob {min_prob:g} is out of range", "it should be from 0 to 1")
    from gptcli.cli.edit_ask import Asking

    asking = Asking(seconds(delay, "--delay"), seconds(deadline), until, max_tokens, min_prob)
    named = file if file is not None and file != Path("-") else None
    if named is not None and initial is not None:
        raise UsageError("--initial is for a prompt line, and there is a FILE", "leave one of them out")
    if warm:
        from gptcli.cli.warm import check_extra

        check_extra()
    from gptcli.cli.edit_file import TextFile

    opened = None if named is None else TextFile(named)
    begin = _initial(file, initial, no_stdin=no_stdin, strip=strip) if opened is None else ""
    _check_toolkit()
    # What is said while the screen is drawn comes behind it.
    later = Output(io.StringIO(), io.StringIO())
    later.quiet, later.verbose = out.quiet, out.verbose
    how: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize}
    asker = _asker(model, later, asking, warm=warm, threads=threads, how=how)
    kept = _history(out) if history and opened is None else None
    code, saved, text = ExitCode.OK, False, None
    with _terminal(out) as (keyboard, drawing):
        from prompt_toolkit.input import create_input
        from prompt_toolkit.output import create_output

        where: dict[str, Any] = {"input": create_input(keyboard), "output": create_output(drawing)}
        where["colored"], where["vi"] = out.colored(drawing), vi
        try:
            with contextlib.redirect_stderr(later.stderr), raised_on_termination():
                if opened is None:
                    from gptcli.cli.edit_line import LineScreen

                    line = LineScreen(asker, asking, initial=begin, history=kept, erase=out.on_terminal, **where)
                    text = line.run()
                else:
                    from gptcli.cli.edit_text import TextScreen

                    screen = TextScreen(opened, asker, asking, **where)
                    with _rescued(screen, later):
                        code = ExitCode(screen.run())
                    text, saved = opened.text, screen.saved
        finally:
            asker.close()
            _say(out, later)
    if out.json:
        told = {"text": text, "file": None if named is None else str(named), "saved": saved, "model": asker.name}
        out.record({**told, **{name: asker.used.get(name) for name in ("device", "dtype", "quantize")}})
    elif opened is None and text is not None:
        out.text(text + "\n")
    if code:
        raise typer.Exit(code)


def _initial(file: Path | None, initial: str | None, *, no_stdin: bool, strip: bool) -> str:
    """What a prompt line begins with: a pipe, then ``--initial``."""
    arguments = ([] if file is None else ["-"]) + ([] if initial is None else [initial])
    return one_text(sources(arguments, no_stdin=no_stdin, strip=strip, required=False), "strict")


def _check_toolkit() -> None:
    """Raise where nothing can be drawn: UnsupportedError without prompt_toolkit, UsageError on a dumb terminal."""
    from importlib.util import find_spec

    if find_spec("prompt_toolkit") is None:
        raise UnsupportedError("edit needs prompt_toolkit", "pip install 'gptcli[edit]'")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("this terminal can't move its cursor (TERM is dumb)", "set TERM, or use gptcli complete")


@contextlib.contextmanager
def _terminal(out: Output) -> Iterator[tuple[TextIO, TextIO]]:
    """Where keys come from, and where the screen is drawn: never on a stdout that goes elsewhere.

    Raises UsageError where there is no terminal.
    """
    with contextlib.ExitStack() as stack:

        def terminal(mode: str) -> Any:
            try:
                return stack.enter_context(open("/dev/tty", mode, encoding="utf-8", errors="replace"))
            except OSError:
                raise UsageError(
                    "there is no terminal to type at", "run it in one; in a script, gptcli complete suggests"
                ) from None

        if sys.stdin is not None and sys.stdin.isatty():
            keyboard: TextIO = sys.stdin
            with contextlib.suppress(AttributeError, ValueError):
                keyboard.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]
        else:
            keyboard = terminal("r")
        drawing = next((each for each in (out.stderr, out.stdout) if each.isatty()), None)
        yield keyboard, drawing or terminal("w")


def _asker(
    model: str | None, out: Output, asking: Any, *, warm: bool | None, threads: int | None, how: dict[str, Any]
) -> Any:
    """Whoever is asked: the warm model, as ``open_runner`` finds it, or one of our own.

    Raises NotFoundError where there is no such model.
    """
    from gptcli.cli.edit_ask import Asker
    from gptcli.cli.opening import find, link_torch
    from gptcli.cli.warm import find_warm, open_runner

    def warm_one() -> Runner | None:
        look = warm or (warm is None and threads is None)
        found = find_warm(model, out, how, start=bool(warm), threads=threads) if look else None
        if found is None:
            link_torch()
        return found

    def own() -> Runner:
        return open_runner(model, out, warm=False, threads=threads, **how)

    return Asker(find(model).name, warm_one, own, asking)


def _history(out: Output) -> Path | None:
    """The file of the lines that were accepted; None, and a note, where there can be none."""
    try:
        return private_file("edit_history")
    except OSError as error:
        out.note(f"no history: {error.filename}: {error.strerror}")
        return None


@contextlib.contextmanager
def _rescued(screen: Any, out: Output) -> Iterator[None]:
    """Within, a text that is not saved when the terminal goes, or the process has to, is kept beside its file."""
    try:
        yield
    except BaseException as error:
        if screen.changed:
            try:
                out.warn(f"what was not saved is in {screen.file.rescue(screen.buffer.text)}")
            except OSError as other:
                out.warn(f"what was not saved is lost: {other.strerror}")
        if isinstance(error, EOFError):
            raise SystemExit(_HUNG_UP) from None
        raise


def _say(out: Output, later: Output) -> None:
    """What was said meanwhile."""
    assert isinstance(later.stderr, io.StringIO)
    if said := later.stderr.getvalue().rstrip("\n"):
        out.talk(said)
