"""The processes that train together: the one that trains alone, and how to join several.

Several are in ``group.py``, which alone imports torch's distributed half.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gptcli.core import runtime
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
    writers = 1  # so many ranks, the first ones, have parts that a checkpoint needs
    interrupted = False  # Ctrl-C or the like came, and this process is to stop when all can

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def share(self, kind: str, dtype: torch.dtype) -> Ranks:
        """The same processes, sharing a model as ``spec.plan.choose_parallel`` says; ``dtype`` as in ``loop.Plan``."""
        return self

    def wrap(self, objective: nn.Module) -> nn.Module:
        """The module to call in its place. Its parameters may be other objects than before."""
        return objective

    def alone(self, objective: nn.Module) -> nn.Module | None:
        """What this rank can call without the others, of a wrapped module; None where it can't."""
        return objective

    def accumulate(self, objective: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: gradients need not be exchanged before the ``last``."""
        return contextlib.nullcontext()

    def settle(self, objective: nn.Module) -> None:
        """To be called after forward passes that no backward pass follows: parameters are as before them."""

    def agree(self, data: bytes) -> bytes:
        """What rank 0 has, on every rank."""
        return data

    def sums(self, *numbers: float) -> list[float]:
        """The sum over ranks of each number."""
        return list(numbers)

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

    def whole_model(self, model: Transformer) -> Transformer:
        """A model that rank 0 can run by itself; every rank has to ask for it, and on the others it may be empty."""
        return model

    def save_folder(self, model: Transformer, out: Path, dtype: torch.dtype, files: Mapping[str, bytes]) -> None:
        """Write the model folder, whole."""
        save_folder(model, out, dtype=dtype, files=files)

    def wait(self) -> None:
        """Until every rank is here."""

    def deferring_interrupts(self) -> AbstractContextManager[None]:
        """Within, what would interrupt a rank of several sets ``interrupted``, for all to stop at the same step."""
        return contextlib.nullcontext()

    def leave(self) -> None:
        """At the end of a run that went well."""


def join(device: str = "auto") -> Ranks:
    """The ranks that torchrun, or whatever sets its variables, started; one process alone otherwise.

    ``device`` is as ``runtime.pick_device`` takes it; of several ranks each takes a CUDA device of its own where there
    are any. How they share a model is said later, by ``share``. Raises UsageError for a device that several can't have
    or variables that say nothing sensible, ResourceError when there are too few devices.
    """
    place = runtime.rank_place()
    if place is None:
        return Ranks(runtime.pick_device(device))
    from gptcli.train.group import Group

    return Group.start(place, device)
