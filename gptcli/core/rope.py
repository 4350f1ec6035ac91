"""Rotary positions: queries and keys turn by an angle that grows with their position.

The half-split layout of Hugging Face files only: dimension i pairs with i + R/2, R being how many of a head's numbers
turn, which are its first. Source: Su et al. 2021 (RoFormer).

A text longer than those a model was first trained on turns its vectors further than they ever were; a ``RopeScaling``
turns them less. All kinds are computed as ``transformers`` does (its ``modeling_rope_utils``), in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptcli.spec.config import RopeScaling

# cos and sin, each [B or 1, 1, T, R].
Rotation = tuple[Tensor, Tensor]


def rotation(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rotation:
    """The cosines and sines for positions ``[B or 1, T]`` (int64), each ``[B or 1, 1, T, R]`` in ``dtype``.

    R is ``dim``. Pair i turns by ``position * theta ** (-2i / R)``, or as ``scaling`` makes it; computed in float32.

    With ``dynamic`` scaling it depends on how long the text is: up to the last of these positions. So tokens that are
    computed together are turned alike, and those in a cache stay as they were turned when the text was shorter: what
    ``generate`` of ``transformers`` does too. Beyond the original context, and only there, a text that was added to a
    cache in parts therefore has other logits than one in a single piece.
    """
    turns = frequencies(dim, theta, positions.device, scaling)
    if scaling is not None and scaling.kind == "dynamic":
        turns = _dynamic(positions.amax(-1, keepdim=True) + 1, dim, theta, scaling)[:, None]  # [B or 1, 1, 1, R/2]
    angles = positions[:, None, :, None].float() * turns  # [B, 1, T, R/2]
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if (size := magnitude(scaling)) != 1:
        cos, sin = cos * size, sin * size
    return cos.to(dtype), sin.to(dtype)


def frequencies(dim: int, theta: float, device: torch.device, scaling: RopeScaling | None = None) -> Tensor:
    """By which angle each pair of dimensions turns from one position to the next: ``[R/2]`` float32, in radians.

    With ``dynamic`` scaling, in texts up to the original context.
    """
    turns = 1 / theta ** _exponents(dim, device)
    if scaling is None or scaling.kind == "dynamic":
        return turns
    if scaling.kind == "linear":
        return turns / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(turns, scaling)
    return _yarn(turns, dim, theta, scaling)


def magnitude(scaling: RopeScaling | None) -> float:
    """By what rotated vectors grow: with ``yarn`` distant words then weigh as much as in a shorter text.

    Source: Peng et al. 2023 (YaRN), section 3.4.
    """
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn each pair of ``[B, H, T, D]`` by its angle; what is behind the first R of D numbers stays."""
    cos, sin = turn
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], turn), x[..., turned:]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _exponents(dim: int, device: torch.device) -> Tensor:
    return torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim


def _dynamic(lengths: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """``[..., 1]`` tokens to the frequencies ``[..., R/2]``: a longer text has a larger base.

    Source: u/emozilla 2023, "Dynamically Scaled RoPE"; Peng et al. 2023, section 3.3.
    """
    stretched = scaling.factor * lengths.clamp(min=scaling.original_context) / scaling.original_context
    base = theta * (stretched - (scaling.factor - 1)) ** (dim / (dim - 2))
    return 1 / base ** _exponents(dim, lengths.device)


def _llama3(turns: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow turns become slower, fast ones stay, and between the two it goes smoothly.

    Source: Grattafiori et al. 2024 (Llama 3), section 3.4.2, and the code released with Llama 3.1.
    """
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    wavelengths = 2 * math.pi / turns
    between = (scaling.original_context / wavelengths - low) / (high - low)  # 0 slow, 1 fast
    smooth = (1 - between) * turns / scaling.factor + between * turns
    slow, fast = wavelengths > scaling.original_context / low, wavelengths < scaling.original_context / high
    return torch.where(slow, turns / scaling.factor, torch.where(fast, turns, smooth))


def _yarn(turns: Tensor, dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Pairs that turn often within the original context stay, those that hardly do become slower; a ramp between.

    Source: Peng et al. 2023 (YaRN), sections 3.2 and A.1.
    """

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(dim // 2, device=turns.device, dtype=torch.float32)
    slowed = ((pairs - low) / (high - low)).clamp(0, 1)
    return turns / scaling.factor * slowed + turns * (1 - slowed)
