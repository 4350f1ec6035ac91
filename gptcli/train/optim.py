"""The optimizer and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, and betas as GPT-3 was trained (Brown et al. 2020, appendix B)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(lr: float, progress: float, warmup: float, final: float = 0.1) -> float:
    """The rate at ``progress`` (0 to 1 of the run): linear warm-up over the part ``warmup``, then half a cosine.

    Ends at ``final * lr``. Source: Brown et al. 2020, appendix B.
    """
    if progress < warmup:
        return lr * progress / warmup
    done = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))
