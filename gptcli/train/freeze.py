"""Parameters that training leaves alone, chosen by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from gptcli.errors import UsageError


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Switch off the gradients of every parameter whose name matches a pattern; the names, in the model's order.

    Patterns are the shell's (``embedding.weight``, ``blocks.0.*``, ``*.bias``). A matrix that stands under two names,
    as a tied unembedding does, is frozen whole by either and listed once, under its first name.

    Raises UsageError for a pattern that matches nothing and when nothing would be left to train; the model is then as
    it was.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    frozen = set()
    for pattern in patterns:
        matched = [id(every[name]) for name in every if fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(f"no parameter is named {pattern}", _near(pattern, every))
        frozen.update(matched)
    parameters = dict(model.named_parameters())
    if frozen.issuperset(map(id, parameters.values())):
        raise UsageError(f"--freeze {' '.join(patterns)} leaves nothing to train", "freeze less")
    names = [name for name, parameter in parameters.items() if id(parameter) in frozen]
    for name in names:
        parameters[name].requires_grad_(False)
    return names


def _near(pattern: str, names: Iterable[str]) -> str:
    """A hint: names, and patterns of whole modules, like this one."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys([*(".".join(parts[:end]) + ".*" for end in range(1, len(parts))), name])
    if f"{pattern.rstrip('.')}.*" in known:
        return f"did you mean {pattern.rstrip('.')}.*?"
    near = get_close_matches(pattern, list(known), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(_tops(known))}"


def _tops(known: Iterable[str]) -> list[str]:
    return [name for name in known if name.count(".") == 1]
