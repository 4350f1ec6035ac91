"""The optimizers and their schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptcli.train.ranks import Ranks

Kind = Literal["adamw", "muon"]
KINDS: tuple[Kind, ...] = ("muon", "adamw")


class Optimizers:
    """What updates a model: AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest.

    Muon makes every update of a matrix orthogonal (all its directions equally long), so that rare directions are learnt
    as fast as common ones; it is scaled to AdamW's usual step length, so that both take the same learning rates. AdamW
    decays matrices only, with the betas that GPT-3 was trained with.

    Sources: Jordan et al. 2024 (Muon), Liu et al. 2025 (its scale), Brown et al. 2020, appendix B (betas).
    """

    def __init__(
        self, kind: Kind, model: nn.Module, lr: float, weight_decay: float, ranks: Ranks | None = None
    ) -> None:
        """To be called when ``ranks`` have wrapped the model, since that may change its parameters."""
        self._lr = lr
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        muon = [name for name in named if kind == "muon" and _is_block_matrix(name, named[name])]
        rest = [name for name in named if name not in set(muon)]
        self._names = {id(parameter): name for name, parameter in named.items()}
        self._each: list[torch.optim.Optimizer] = []
        if muon:
            matrices = [named[name] for name in muon]
            if ranks is not None and ranks.writers > 1:
                self._each.append(_PartedMuon(matrices, lr, weight_decay, ranks))
            else:
                self._each.append(_muon(matrices, lr, weight_decay, momentum=0.95))
        if rest:
            groups = [
                {"params": [named[name] for name in rest if named[name].dim() >= 2], "weight_decay": weight_decay},
                {"params": [named[name] for name in rest if named[name].dim() < 2], "weight_decay": 0.0},
            ]
            groups = [group for group in groups if group["params"]]
            self._each.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True))

    def step(self, scale: float) -> None:
        """Update the parameters at ``scale`` times the peak learning rate, and forget their gradients."""
        for optimizer in self._each:
            for group in optimizer.param_groups:
                group["lr"] = self._lr * scale
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self._each:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """The state: a parameter's name, what it is (``exp_avg``, ...), and the tensor. Empty before the first step."""
        for optimizer in self._each:
            for parameter, state in optimizer.state.items():
                for kind, tensor in state.items():
                    yield self._names[id(parameter)], kind, tensor

    def create_state(self) -> None:
        """Make the state as a first step would, zeros, so that a checkpoint can be read into it."""
        for optimizer in self._each:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state[parameter]
                    if isinstance(optimizer, torch.optim.Muon):
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    else:
                        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                        state["exp_avg"] = torch.zeros_like(parameter)
                        state["exp_avg_sq"] = torch.zeros_like(parameter)


def _muon(matrices: list[nn.Parameter], lr: float, weight_decay: float, **more: Any) -> torch.optim.Muon:
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", **more)


class _PartedMuon(torch.optim.Muon):
    """Muon where each rank holds some rows of a matrix: what is orthogonal is the whole of it.

    A matrix at a time is brought together on every rank, and each makes the same update of it and takes its rows.
    Equals torch's own within rounding.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float, ranks: Ranks) -> None:
        super().__init__(matrices, lr=lr, weight_decay=weight_decay, momentum=0.95)
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, momentum = self.state[matrix], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                held = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                step = self._orthogonal(self._ranks.whole(matrix.grad.lerp(held, momentum)), group["lr"])
                own = self._ranks.part(matrix)
                own.tensor.mul_(1 - group["lr"] * group["weight_decay"])
                own.tensor.add_(step[own.start : own.start + len(own.tensor)])

    def _orthogonal(self, direction: Tensor, lr: float) -> Tensor:
        """The step that torch's Muon makes from zero, along a direction that has its momentum already."""
        start = nn.Parameter(torch.zeros_like(direction))
        start.grad = direction
        _muon([start], lr, 0.0, momentum=0.0, nesterov=False).step()
        return start.detach()


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return ".blocks." in f".{name}" and parameter.dim() == 2


def schedule(progress: float, warmup: float) -> float:
    """The part of the peak learning rate at ``progress`` (0 to 1 of the run).

    Up on a line over the part ``warmup``, then down on a line to zero: for a run whose length is known, going all the
    way down beats stopping at a tenth. Source: Bergsma et al. 2025 (Straight to Zero).
    """
    if progress < warmup:
        return progress / warmup
    if progress >= 1.0:
        return 0.0
    return (1.0 - progress) / (1.0 - warmup)
