"""Typed look-ups in a Hugging Face ``config.json``, and what every family reads and writes alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.spec.axes import Activation, ModelConfig

_REPORT = "open an issue with the model"


class Keys:
    """Typed look-ups in a config.json whose errors name the key and the file."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def _typed(self, names: str, kinds: tuple[type, ...], default: Any) -> Any:
        """The first of the names (old and new spellings, separated by ``|``) that is there and not null."""
        for name in names.split("|"):
            value = self.raw.get(name)
            if value is None:
                continue
            if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
                return value
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CorruptError(f"{self.where}: {name} is {value!r}, not {wanted}", "check the file")
        if default is ...:
            raise CorruptError(f"{self.where}: {names.split('|')[0]} is missing", "check the file")
        return default

    def integer(self, names: str, default: Any = ...) -> Any:
        return self._typed(names, (int,), default)

    def integer_or_null(self, name: str, default: int | None, null: int | None) -> Any:
        """A number, ``default`` where the key is missing, ``null`` where it is null: not the same in some families."""
        return self.integer(name, null if name in self.raw else default)

    def number(self, names: str, default: float) -> float:
        value = self._typed(names, (int, float), default)
        if not 0 <= value < math.inf or value > sys.float_info.max:
            raise CorruptError(f"{self.where}: {names.split('|')[0]} is out of range", "check the file")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._typed(name, (bool,), default))

    def text(self, names: str, default: str | None) -> Any:
        return self._typed(names, (str,), default)

    def items(self, name: str) -> list[Any] | None:
        found: list[Any] | None = self._typed(name, (list,), None)
        return found

    def table(self, name: str) -> Keys | None:
        """The object under a key, to be read as this one is; None where there is none."""
        value = self._typed(name, (dict,), None)
        return None if value is None else Keys(value, f"{self.where}: {name}")

    def ids(self, name: str) -> tuple[int, ...]:
        value = self._typed(name, (int, list), None)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if any(type(id_) is not int for id_ in ids):
            raise CorruptError(f"{self.where}: {name} is {value!r}, not a list of ids", "check the file")
        return ids

    def activation(self, names: str, default: str) -> Activation:
        name = self.text(names, default)
        if name not in _ACTIVATIONS:
            raise UnsupportedError(f"{self.where}: the activation {name!r} is not here", _REPORT)
        return _ACTIVATIONS[name]

    def refuse_unless(self, name: str, *values: Any) -> None:
        """Refuse a key that changes the forward pass when it has any value but those we compute with."""
        if name in self.raw and self.raw[name] not in (*values, None):
            message = f"{self.where}: {name} = {self.raw[name]!r} changes the forward pass and is not here"
            raise UnsupportedError(message, _REPORT)


_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # GPT-NeoX-20B; the same formula
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ACTIVATION_NAMES = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def read_common(keys: Keys, *, tied: bool, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """The axes that every family spells alike: the vocabulary, tied or not, the type, the start and end of a text.

    The arguments are what the family takes where a key is missing. An id beyond the vocabulary starts no text, and ends
    none.
    """
    vocabulary = keys.integer("vocab_size")
    start = keys.integer("bos_token_id", None) if "bos_token_id" in keys.raw else bos
    ends = keys.ids("eos_token_id")
    if "eos_token_id" not in keys.raw and eos is not None and eos < vocabulary:
        ends = (eos,)
    if start is not None and not 0 <= start < vocabulary:
        start = None
    return {
        "vocab_size": vocabulary,
        "tied": keys.flag("tie_word_embeddings", tied),
        "dtype": read_dtype(keys),
        "bos_id": start,
        "eos_ids": ends,
    }


def write_common(config: ModelConfig, *, null: bool = False) -> dict[str, Any]:
    """What every family writes alike; ``null``: ids that are none are written, for a family with ids of its own."""
    common: dict[str, Any] = {}
    if config.bos_id is not None or null:
        common["bos_token_id"] = config.bos_id
    if config.eos_ids or null:
        several = len(config.eos_ids) > 1
        common["eos_token_id"] = list(config.eos_ids) if several else next(iter(config.eos_ids), None)
    if config.dtype:
        # Older transformers read torch_dtype, newer ones both.
        common["torch_dtype"] = config.dtype
    return common


def read_dtype(keys: Keys) -> str | None:
    """The type that the weights are declared to be of."""
    return (keys.text("dtype|torch_dtype", None) or "").removeprefix("torch.") or None


def divide(width: int, heads: int, where: str) -> int:
    """The dimension of each head. Raises CorruptError where they don't divide the width."""
    if heads < 1 or width % heads:
        raise CorruptError(f"{where}: a width of {width} does not divide into {heads} heads", "check the file")
    return width // heads
