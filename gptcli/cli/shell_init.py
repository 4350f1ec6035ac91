"""``gptcli shell-init``: what a shell reads to ask a warm model at its command line."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli import options
from gptcli.cli.complete import UNTIL, seconds
from gptcli.cli.out import Output
from gptcli.errors import UsageError

SHELLS = ("zsh", "bash", "fish")
_WIDGETS = Path(__file__).parent / "widgets"

# Seconds beyond the deadline that the answer has to arrive; and where there is no curl, that Python has to start.
_PATIENCE, _PYTHON = 0.1, 1.0
# What a terminal sends for keys that nobody does without (Ctrl-C, Tab, Enter, Esc, ...), or as the beginning of others.
_TAKEN = {"ctrl": "cdijmqsz[", "alt": "[O^"}
_KEY = re.compile(r"(alt|ctrl)-([!-~])", re.IGNORECASE)


def shell_init(
    ctx: typer.Context,
    shell: Annotated[str, typer.Argument(metavar="zsh|bash|fish", help="The shell that reads it.")],
    model: options.Model = None,
    key: Annotated[str, typer.Option("--key", metavar="KEY", help="The key that asks: alt-X or ctrl-X.")] = "alt-\\",
    ghost: Annotated[bool, typer.Option("--ghost", help="Also show ghost text while one types; in zsh alone.")] = False,
    num: Annotated[int, typer.Option("--num", metavar="N", min=1, help="How many the key goes through.")] = 3,
    until: Annotated[
        str, typer.Option("--until", metavar="line|word|sentence", help="Where each ends, if not before.")
    ] = "line",
    min_prob: Annotated[
        float, typer.Option("--min-prob", metavar="P", min=0, max=1, help="Show only what is at least so likely.")
    ] = 0.05,
    deadline: Annotated[
        str, typer.Option("--deadline", metavar="TIME", help="Show what is found by then: 150ms, 0.2s.")
    ] = "150ms",
) -> None:
    """Print what lets a shell's line ask a warm model.

    Read by the shell as it starts: eval "$(gptcli shell-init zsh)" in ~/.zshrc, the same with bash in ~/.bashrc, and
    gptcli shell-init fish | source in ~/.config/fish/config.fish. The key asks the model that gptcli serve keeps warm;
    where there is none, the key says so. The line is only written on, never run. gptcli-unload ends it.
    """
    out: Output = ctx.obj
    options.choice("the shell", shell, SHELLS)
    options.choice("--until", until, UNTIL)
    if ghost and shell != "zsh":
        raise UsageError(f"{shell} lets nobody show text while one types", "leave --ghost out: the key works")
    time = seconds(deadline)
    from gptcli.cli.opening import find
    from gptcli.serve.place import Place, runtime_folder

    found = find(model)
    folder = found.folder.resolve()  # of whatever folder the shell is in later
    socket = str(Place.of(runtime_folder(), folder).socket)
    quoted = _fish if shell == "fish" else shlex.quote
    command = [*_gptcli(), "complete", "--widget", "--quiet", "--model", str(folder)]
    limit = time + (_PATIENCE if shutil.which("curl") else _PYTHON)
    values = {
        "KEY": key,
        "BINDING": _bindings[shell](_parse(key)),
        "SOCKET": quoted(socket),
        "COMMAND": " ".join(map(quoted, command)),
        "COLD": quoted(_cold(None if model is None else str(folder) if found.source == "folder" else model)),
        "GHOST": str(int(ghost)),
        "NUM": str(num),
        "UNTIL": until,
        "MIN_PROB": f"{min_prob:g}",
        "SECONDS": f"{time:g}",
        "LIMIT": f"{limit:g}",
    }
    text = (_WIDGETS / f"gptcli.{shell}").read_text(encoding="utf-8")
    script = re.sub("@([A-Z_]+)@", lambda match: values[match[1]], text)
    if out.json:
        out.record({"shell": shell, "key": key, "socket": socket, "script": script})
    else:
        out.data(script, end="")


def _cold(model: str | None) -> str:
    """What the key says where nobody answers; ``model``: what to call the model, if it was named."""
    if model is None:
        return "gptcli: no model is warm; gptcli serve starts one"
    return f"gptcli: the model is not warm; gptcli serve -m {shlex.quote(model)} starts it"


def _gptcli() -> list[str]:
    """How this gptcli is run."""
    if shutil.which("gptcli") and Path(sys.argv[0]).name == "gptcli":
        return [str(Path(shutil.which("gptcli") or "").absolute())]
    return [sys.executable, "-m", "gptcli"]


def _parse(key: str) -> tuple[str, str]:
    """``alt`` or ``ctrl``, and the character. Raises UsageError for what is no such key, or has a use already."""
    found = _KEY.fullmatch(key)
    if not found:
        raise UsageError(f"--key {key!r} is not a key", r"for instance alt-\ or ctrl-g")
    held, character = found[1].lower(), found[2]
    if held == "ctrl":
        character = character.lower()
        if not character.isalpha() and character not in "]_":
            raise UsageError(f"--key {key!r} is no key that terminals send", "take a letter, or alt-")
    if character in _TAKEN[held]:
        raise UsageError(f"--key {key!r} can't be had: it means something else to a terminal", "choose another")
    return held, character


def _zsh(key: tuple[str, str]) -> str:
    held, character = key
    name = "\\\\" if character == "\\" else character
    return shlex.quote(rf"\e{name}" if held == "alt" else f"^{character.upper()}")


def _bash(key: tuple[str, str]) -> str:
    held, character = key
    name = f"\\{character}" if character in '\\"' else character
    return shlex.quote(rf"\e{name}" if held == "alt" else rf"\C-{character}")


def _fish_key(key: tuple[str, str]) -> str:
    held, character = key
    name = character if character.isalnum() else f"\\{character}"
    return rf"\e{name}" if held == "alt" else rf"\c{character}"


_bindings: dict[str, Callable[[tuple[str, str]], str]] = {"zsh": _zsh, "bash": _bash, "fish": _fish_key}


def _fish(word: str) -> str:
    """A word in fish's quotes, in which only these two mean anything."""
    return "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'"
