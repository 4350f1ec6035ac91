"""Settings: what the environment and ``config.toml`` say of a command's options, and which of it is meant for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import typer

from gptcli.cli.values import choices_of
from gptcli.errors import UsageError

_NUMBERS = re.compile(r"-?[0-9.]+(,-?[0-9.]+)*")
_SEVERAL_NUMBERS = ("N[,N...]", "T[,T...]")  # the metavars of options that take such


def is_setting(param: Any) -> bool:
    """Whether a value may come from the settings: not for what has to be typed, nor for what only gptcli itself says.

    What has to be typed (``options.typed_option``) is an action of one command, whose name means something else to
    others: what is set for these must not set it off.
    """
    return param.param_type_name != "option" or (param.allow_from_autoenv and not param.hidden)


def name_of(param: Any) -> str:
    """The name of an option in the settings, ``max_tokens`` of ``--max-tokens``."""
    named = param.opts if param.param_type_name == "option" else [param.name]
    return max(named, key=len).lstrip("-").replace("-", "_")


def variable_of(param: Any) -> str:
    """The variable of the environment that an option may have its value from."""
    return f"GPTCLI_{name_of(param).upper()}"


def read_settings(args: Sequence[str]) -> dict[str, Any]:
    """The named command's defaults from ``config.toml`` in the user's config folder, shaped as the parser takes them.

    A key at the top counts for every command that has the option, unless its value is meant for another one's; a table
    ``[generate]`` counts for that one. Raises UsageError when the file is not TOML, names an option that is not there,
    or one that has to be typed. Reads nothing if no command is named.
    """
    from gptcli.cli import COMMANDS, leaves

    command = next((arg for arg in args if not arg.startswith("-")), "")
    file = Path(typer.get_app_dir("gptcli")) / "config.toml"
    if command not in COMMANDS or not file.is_file():
        return {}
    raw = _read_toml(file)
    tables = {name: value for name, value in raw.items() if isinstance(value, dict)}
    if unknown := sorted(tables.keys() - COMMANDS.keys()):
        raise UsageError(f"{file} has a table for {unknown[0]!r}, which is no command", "correct its name")
    everywhere = {_key(name): value for name, value in raw.items() if not isinstance(value, dict)}
    own = {_key(name): value for name, value in tables.get(command, {}).items()}
    here = leaves(command, COMMANDS[command])
    _check_names(own, here, file, command)
    others = everywhere.keys() - {name_of(param) for leaf in here for param in leaf.params if is_setting(param)}
    if others:  # other commands', or slips; only then all commands are loaded
        _check_names(others, list(_all_leaves()), file)
    values = {leaf.name: _values(leaf, everywhere, own) for leaf in here}
    return {command: values[command] if isinstance(COMMANDS[command].target, str) else values}


def is_for_another(leaf: Any, param: Any, value: Any) -> bool:
    """Whether what is set for all commands is meant for another one's option of the same name, and not for this one's.

    It is if it fits there and not here; and where any text would fit here, if it is numbers and another wants numbers.
    """
    fits = _fits(leaf, param, value)
    if fits and not (_takes_any_text(param) and _NUMBERS.fullmatch(str(value))):
        return False
    return any(
        _fits(other, each, value) and not (fits and _takes_any_text(each))
        for other in _all_leaves()
        for each in other.params
        if name_of(each) == name_of(param) and is_setting(each)
    )


def _values(leaf: Any, everywhere: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the parser takes as the defaults of one command."""
    values = {}
    for param in filter(is_setting, leaf.params):
        name = name_of(param)
        if name in own:
            values[param.name] = _shaped(param, own[name])
        elif name in everywhere and not is_for_another(leaf, param, everywhere[name]):
            values[param.name] = _shaped(param, everywhere[name])
    return values


def _shaped(param: Any, value: Any) -> Any:
    """A value of ``config.toml`` as if it were typed: one of several, and numbers for an option that takes text."""
    values = value if isinstance(value, list) else [value]
    if _takes_any_text(param) or param.metavar in _SEVERAL_NUMBERS:
        values = [str(each) if type(each) in (int, float) else each for each in values]
    return values if isinstance(value, list) or getattr(param, "multiple", False) else values[0]


def _fits(leaf: Any, param: Any, value: Any) -> bool:
    shaped = _shaped(param, value)
    if choices := choices_of(param):
        return shaped in choices
    if param.metavar in _SEVERAL_NUMBERS:
        return all(_NUMBERS.fullmatch(str(each)) for each in (shaped if isinstance(shaped, list) else [shaped]))
    try:
        param.process_value(typer.Context(leaf), shaped)
    except typer.TyperException:
        return False
    return True


def _takes_any_text(param: Any) -> bool:
    if choices_of(param) or param.metavar in _SEVERAL_NUMBERS:
        return False
    descriptor = getattr(param, "type_descriptor", None)
    if descriptor is None:  # an older Typer
        return getattr(getattr(param, "type", None), "name", "") in ("text", "path")
    kind = descriptor.annotation
    return (get_args(kind)[0] if get_origin(kind) is list else kind) in (str, Path)


def _check_names(given: Iterable[str], among: Sequence[Any], file: Path, table: str | None = None) -> None:
    """Raise UsageError for a name of which none of the commands has an option, or only such as have to be typed."""
    where = f"{file}: [{table}]" if table else str(file)
    params = {name_of(param): param for leaf in among for param in leaf.params if not getattr(param, "hidden", False)}
    settings = {name_of(param) for leaf in among for param in leaf.params if is_setting(param)}
    for name in sorted(given):
        if name not in params:
            if table:
                raise UsageError(f"{where} has no option {name!r}", f"gptcli {table} --help lists them")
            raise UsageError(f"{where} sets {name!r}, which is no command's option", "correct its name")
        if name not in settings:
            option = max(params[name].opts, key=len)
            raise UsageError(f"{where} sets {name!r}, which has to be typed", f"take it out, and type {option}")


def _all_leaves() -> Iterator[Any]:
    from gptcli.cli import COMMANDS, leaves

    for name, entry in COMMANDS.items():
        yield from leaves(name, entry)


def _read_toml(file: Path) -> dict[str, Any]:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read: {error}", "correct it or move it away") from None


def _key(name: str) -> str:
    return name.replace("-", "_")
