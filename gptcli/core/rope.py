"""Rotary positions: queries and keys turn by an angle that grows with their position.

The half-split layout of Hugging Face files only: dimension i pairs with i + D/2. Source: Su et al. 2021 (RoFormer).
"""

from __future__ import annotations

import torch
from torch import Tensor

# cos and sin, each [B or 1, 1, T, D].
Rotation = tuple[Tensor, Tensor]


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The cosines and sines for positions ``[B or 1, T]`` (int64), each ``[B or 1, 1, T, D]`` in ``dtype``.

    Pair i turns by ``position * theta ** (-2i / D)``; computed in float32.
    """
    turns = frequencies(head_dim, theta, positions.device)
    angles = positions[:, None, :, None].float() * turns  # [B, 1, T, D/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """By which angle each pair of dimensions turns from one position to the next: ``[D/2]`` float32, in radians."""
    pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return theta ** (-pairs / head_dim)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn each pair of ``[B, H, T, D]`` by its angle."""
    cos, sin = turn
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
