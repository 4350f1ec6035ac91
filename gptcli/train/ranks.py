"""The processes that train together: here the one that trains alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptcli.core.checkpoint import save_folder
from gptcli.core.model import Transformer


@dataclass(frozen=True)
class Part:
    """A rank's rows ``[start, start + len(tensor))`` of a tensor that has ``rows`` in all; of a scalar, all of it."""

    tensor: Tensor
    start: int
    rows: int


class Ranks:
    """One process alone, and what several do in its place."""

    kind = "none"
    rank = 0
    count = 1
    device: torch.device | None = None  # the rank's own, where there are several

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        """The end of working together."""

    def agree(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        return value

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module to call in its place. Its parameters may be other objects than before."""
        return objective

    def accumulate(self, objective: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients need not be exchanged before the ``last``."""
        return contextlib.nullcontext()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a small tensor."""
        return tensor

    def least(self, tensor: Tensor) -> Tensor:
        """The least over ranks of a small tensor."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may be spread over ranks, whole on each of them."""
        return tensor

    def part(self, tensor: Tensor) -> Part:
        """This rank's own part of a tensor, sharing its memory."""
        return Part(tensor, 0, len(tensor) if tensor.dim() else 1)

    def save_folder(self, model: Transformer, out: Path, dtype: torch.dtype, files: Mapping[str, bytes]) -> None:
        """Write the model folder, whole."""
        save_folder(model, out, dtype=dtype, files=files)

    def wait(self) -> None:
        """Until every rank is here."""


def join(device: str) -> Ranks:
    """The ranks that this process belongs to."""
    return Ranks()
