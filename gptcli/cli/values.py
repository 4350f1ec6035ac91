"""Option values without pydantic: Typer imports it for the first of them, which is a third of a small command's time.

What is plainly right is taken here; all else goes on to Typer, which has the words for what is wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_CHOICES = re.compile(r"[a-z0-9][a-z0-9_.-]*(\|[a-z0-9][a-z0-9_.-]*)*")
_DECIMAL = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")


def choices_of(param: Any) -> tuple[str, ...]:
    """The words that an option or argument takes, where its metavar lists them (``head|tail|middle``); else none."""
    metavar = param.metavar or ""
    return tuple(metavar.split("|")) if _CHOICES.fullmatch(metavar) else ()


def take_plainly(param: Any) -> None:
    """Have an option's or argument's value taken here where that is possible; an older Typer is left as it is."""
    heavy, descriptor = getattr(param, "get_runtime_param", None), getattr(param, "type_descriptor", None)
    if heavy is not None and descriptor is not None:
        plain = _Plain(descriptor, heavy)
        param.get_runtime_param = lambda: plain


class _Plain:
    def __init__(self, descriptor: Any, heavy: Callable[[], Any]) -> None:
        self._info, self._heavy = descriptor.parameter_info, heavy
        several = get_origin(descriptor.annotation) is list
        self._one = get_args(descriptor.annotation)[0] if several else descriptor.annotation

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """The value as its type."""
        several = param.multiple or param.nargs == -1
        if value is None:
            return () if several else None
        found = self._several(value) if several else self._single(value)
        return self._heavy().coerce(value, param=param, ctx=ctx) if found is None else found

    def _several(self, values: Any) -> list[Any] | None:
        if not isinstance(values, (list, tuple)):
            return None
        found = [self._single(value) for value in values]
        return None if None in found else found

    def _single(self, value: Any) -> Any:
        """None for what is not plainly right."""
        if self._info.parser is not None:
            return None
        if type(value) is self._one:  # a default, or of config.toml
            return self._within(value) if isinstance(value, (int, float)) else value
        if not isinstance(value, str):
            return None
        if self._one is int and _WHOLE.fullmatch(value):
            return self._within(int(value))
        if self._one is float and _DECIMAL.fullmatch(value):
            return self._within(float(value))
        if self._one is Path and "\0" not in value and (os.access(value, os.R_OK) or not os.path.exists(value)):
            return Path(value)
        return None

    def _within(self, number: float) -> float | None:
        low, high = self._info.min, self._info.max
        return None if (low is not None and number < low) or (high is not None and number > high) else number
