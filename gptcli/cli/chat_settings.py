"""What may be set in a conversation: how its answers are drawn, and how long they get."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from gptcli.cli.options import check_seed, parse_biases
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.core.settings import Sampling

_NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "max_tokens": int,
    "seed": int,
}
NAMES = [name.replace("_", "-") for name in (*_NUMBERS, "stop", "logit_bias")]


@dataclass(frozen=True)
class Settings:
    """Of every answer; the one of turn i has the seed ``seed + i``."""

    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    seed: int

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.max_tokens < -1:
            raise UsageError(f"--max-tokens {self.max_tokens} is out of range", "it should be -1 or more")

    def as_json(self) -> dict[str, Any]:
        """By their names."""
        values = {name: getattr(self.sampling, name) for name in _NUMBERS if hasattr(self.sampling, name)}
        biases = [f"{id_}:{bias}" for id_, bias in self.sampling.logit_bias.items()]
        return {
            **values,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": list(self.stop),
            "logit_bias": biases,
        }

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """With some values of ``as_json``. Raises UsageError for a name or a value that is none."""
        changed = self
        for name, value in values.items():
            changed = changed._with(name, value)
        return changed

    def told(self, name: str, text: str) -> Settings:
        """With one value as a person writes it: texts in quotes where they hold spaces, ``\\n`` for a line end."""
        key = name.replace("-", "_")
        if key not in ("stop", "logit_bias"):
            return self._with(key, text)
        words = shlex.shlex(text, posix=True)
        words.whitespace_split, words.escape, words.commenters = True, "", ""
        try:
            found = [word.replace("\\n", "\n") for word in words if word]
        except ValueError:
            raise UsageError(f"a quote is open in {text!r}", 'for instance /set stop "The end"') from None
        return self._with(key, found)

    def shown(self, name: str) -> str:
        """A value as a person would write it."""
        value = self.as_json()[name.replace("-", "_")]
        if not isinstance(value, list):
            return str(value)
        return " ".join('"' + word.replace("\n", "\\n") + '"' for word in value) or '""'

    def _with(self, key: str, value: Any) -> Settings:
        if key in ("stop", "logit_bias"):
            if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
                raise UsageError(f"{key} {value!r} is no list of texts", f"the settings are {', '.join(NAMES)}")
            if key == "stop":
                return replace(self, stop=tuple(value))
            return replace(self, sampling=replace(self.sampling, logit_bias=parse_biases(value)))
        if key not in _NUMBERS:
            raise UsageError(f"there is no setting {key.replace('_', '-')}", f"the settings are {', '.join(NAMES)}")
        kind = _NUMBERS[key]
        try:
            number = kind(value) if isinstance(value, str) or kind is float else int(str(value))
        except (TypeError, ValueError):
            whole = "whole " if kind is int else ""
            raise UsageError(f"{key.replace('_', '-')} {value!r} is not a {whole}number", f"/set {key} 1") from None
        changed: dict[str, Any] = {key: number}
        if key in {field.name for field in fields(self)}:
            return replace(self, **changed)
        return replace(self, sampling=replace(self.sampling, **changed))
