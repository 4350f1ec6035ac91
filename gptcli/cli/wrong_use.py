"""What to type instead: the hints for command lines that can't be understood."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

# What a mistyped option looks like; anything else that begins with "-" may be a text.
_LIKE_AN_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)
_TEXTS = ("TEXT", "PREFIX")  # the metavars of arguments that are one
_LONGEST = 300  # characters of a command that is written out
_FEWEST_WORDS = 3  # in the place of a command: fewer are rather a slip than a text


def hint(error: Any, args: Sequence[str]) -> str:
    """What helps against an error of the parser's, with the command written out where it is known.

    ``args`` is the whole command line, without the program's name.
    """
    context = getattr(error, "ctx", None)
    if context is None:
        return "gptcli --help lists the options"
    path = context.command_path
    above = path.split()[1:]
    better = None
    if list(args[: len(above)]) == above:
        typed, unknown = args[len(above) :], getattr(error, "option_name", None)
        if hasattr(context.command, "entries"):
            better = _behind(context, typed, unknown) if unknown else None
        elif unknown or "unexpected extra argument" in getattr(error, "message", ""):
            better = _as_text(context.command, path, typed, begins=bool(unknown))
    return better or f"{path} --help lists the options"


def nearest(typed: Sequence[str], known: Mapping[str, Any], path: str) -> str:
    """What may have been meant by a command that is not there, the first of the words that were typed."""
    from difflib import get_close_matches

    if near := get_close_matches(typed[0], list(known), n=1):
        return f"did you mean {near[0]}?"
    words = list(takewhile(lambda word: not word.startswith("-"), typed))
    if any(map(str.isspace, typed[0])):  # no name, but a text
        words = words[:1]
    elif len(words) < _FEWEST_WORDS:
        words = []
    if not words or "generate" not in known:
        return f"{path} --help lists them"
    return f"{path} generate {shlex.quote(_short(' '.join(words)))} continues it"


def _behind(context: Any, typed: Sequence[str], option: str) -> str | None:
    """For options in front of the command that they belong to."""
    command, names = context.command, list[str]()
    place = next((i for i, word in enumerate(typed) if word in command.entries), len(typed))
    for word in typed[place:]:
        if word not in getattr(command, "entries", ()):
            break
        command = command.get_command(context, word)
        names.append(word)
    if hasattr(command, "entries") or not any(option in param.opts + param.secondary_opts for param in command.params):
        return None
    return f"options go behind the command: {shlex.join([*context.command_path.split(), *names, *typed[:place]])}"


def _as_text(command: Any, path: str, typed: Sequence[str], *, begins: bool) -> str | None:
    """For a text of several words without quotes, or one that ``begins`` with a dash, and so looks like an option."""
    argument = next((param for param in command.params if param.param_type_name == "argument"), None)
    if argument is None or argument.metavar not in _TEXTS:
        return None
    options, texts, unknown = _parted(command, typed)
    if begins and (not unknown or _LIKE_AN_OPTION.fullmatch(unknown[0])):  # the first is what the parser speaks of
        return None
    whole = [" ".join(texts)] if argument.nargs == 1 else texts
    dashed = any(text.startswith("-") and text != "-" for text in (*texts, *whole))
    texts = whole
    written = [*options, "--", *texts] if dashed else [*texts, *options]
    if sum(map(len, written)) > _LONGEST:
        written = [_short(word) for word in written]
    why = "a text that begins with - goes behind --" if begins else "put the text in quotes"
    return f"{why}: {path} {shlex.join(written)}" if sum(map(len, written)) <= 2 * _LONGEST else why


def _parted(command: Any, typed: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Of a command's line the options with their values, the texts, which may begin with a dash, and those of both that
    the parser takes for options and does not know.
    """
    takes = {
        name: not param.is_flag
        for param in command.params
        if param.param_type_name == "option"
        for name in (*param.opts, *param.secondary_opts)
    }
    options, texts, unknown, rest = list[str](), list[str](), list[str](), iter(typed)
    for word in rest:
        if word == "--":
            texts += rest
        elif len(word) < 2 or not word.startswith("-"):
            texts.append(word)
        else:
            if (value := _value_follows(word, takes)) is None:
                unknown.append(word)
            (texts if value is None and not _LIKE_AN_OPTION.fullmatch(word) else options).append(word)
            if value:
                options += [next(rest, "")]
    return options, texts, unknown


def _value_follows(word: str, takes: Mapping[str, bool]) -> bool | None:
    """Whether the next word is the value of an option, or of the last of several short ones; None if one is unknown."""
    long, has_value, _ = word.partition("=")
    if long in takes:
        return takes[long] and not has_value
    if word.startswith("--"):
        return None
    for place, letter in enumerate(word[1:], start=2):
        short = f"-{letter}"
        if short not in takes:
            return None
        if takes[short]:
            return place == len(word)
    return False


def _short(word: str) -> str:
    return word if len(word) < _LONGEST // 4 else f"{word[: _LONGEST // 4]}..."
