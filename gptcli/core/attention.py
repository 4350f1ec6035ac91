"""Attention itself: fused where torch is fast, in blocks where a CPU trains, and the slow readable twin of both.

Shapes as in ``core/model.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from gptcli.core.cache import Mask

# Queries a block: small enough that what lies above the diagonal is mostly skipped, large enough for the matrix unit.
_BLOCK = 128
# Queries a block where a mask is made for each: small enough that the masks are small, however long the prompt.
_QUERIES = 512
# Patterns grow with the square of the length: beyond this they would take more memory than they save time.
_LONGEST = 2048


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """What each query gathers: the values, weighted by how well their keys answer.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, K, S, D]``, each shared by H/K heads.
        mask: as ``Mask``.

    Returns:
        ``[B, H, T, D]``; the same numbers as ``gather(attention_pattern(...))`` within rounding.
    """
    if isinstance(mask, int):
        key, value, mask = in_window(query, key, value, mask)
    if _in_blocks(query, key, value, mask):
        # Autocast leaves what was rotated in float32 beside values in bfloat16.
        query, key = query.to(value.dtype), key.to(value.dtype)
        gathered: Tensor = _BlockedCausal.apply(query, key, value)  # type: ignore[no-untyped-call]
        return gathered
    if isinstance(mask, int):
        return _some_at_a_time(query, key, value, mask)
    if isinstance(mask, str) and query.shape[2] < key.shape[2]:
        return _last_queries(query, key, value)
    if query.shape[2] == 1 and query.shape[1] != key.shape[1]:
        # Heads that share keys go as so many queries: one reading of the keys, by whichever kernel takes the mask.
        shared = query.reshape(len(query), key.shape[1], -1, query.shape[3])  # [B, K, H/K, D]
        mask = mask if isinstance(mask, Tensor) else None
        return F.scaled_dot_product_attention(shared, key, value, attn_mask=mask).reshape(query.shape)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask if isinstance(mask, Tensor) else None,
        is_causal=isinstance(mask, str),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def in_window(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor, Mask]:
    """Keys, values and mask without a window where the same can be said without one.

    That is, where all keys are within it, and of a single query, which then gets those alone that it sees.
    """
    count, length = query.shape[2], key.shape[2]
    if length <= window:
        return key, value, "causal" if count > 1 else None
    if count == 1:
        return key[:, :, -window:], value[:, :, -window:], None
    return key, value, window


def _last_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens: a chunk of a long prompt.

    torch's public function means the first T by causal; its flash kernel means the last, and needs no mask (torch's own
    ``causal_lower_right`` relies on the same, but takes seconds to import). Where there is no such kernel, the queries
    go some at a time, each block with a mask of its own and no more keys than it may see.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.shape[3] % 8 == 0:
        asked = SDPAParams(query, key, value, None, 0.0, False, grouped)
        if can_use_flash_attention(asked):
            scale = 1 / math.sqrt(query.shape[3])
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]
    return _some_at_a_time(query, key, value)


def _some_at_a_time(query: Tensor, key: Tensor, value: Tensor, window: int | None = None) -> Tensor:
    """The last T of S tokens in blocks, each with a mask of its own and no keys but those that one of it may see."""
    count, before = query.shape[2], key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    blocks = []
    for start in range(0, count, _QUERIES):
        end = min(start + _QUERIES, count)
        first = 0 if window is None else max(0, before + start + 1 - window)
        diagonal = before + start - first
        mask = torch.ones(end - start, before + end - first, device=query.device, dtype=torch.bool).tril(diagonal)
        if window is not None:
            mask = mask.triu(diagonal + 1 - window)
        sides = query[:, :, start:end], key[:, :, first : before + end], value[:, :, first : before + end]
        blocks.append(F.scaled_dot_product_attention(*sides, attn_mask=mask, enable_gqa=grouped))
    return torch.cat(blocks, 2)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> bool:
    """Whether a gradient is wanted of plain causal attention on a CPU: what ``_BlockedCausal`` is for."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.shape[2] > _LONGEST:
        return False
    return learns and isinstance(mask, str) and query.shape[1:3] == key.shape[1:3] and query.device.type == "cpu"


def causal_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``attend`` with "causal" and as many keys as queries, all ``[B, H, T, D]``: what bfloat16 wants on a CPU."""
    scaled = query * (1 / math.sqrt(query.shape[-1]))
    return _by_blocks(scaled.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)).view(query.shape)


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, patterns: list[Tensor] | None = None) -> Tensor:
    """What scaled queries ``[N, T, D]`` gather of all up to them, block by block; the blocks' patterns are noted."""
    length = query.shape[1]
    later = query.new_full((_BLOCK, _BLOCK), -math.inf).triu(1)
    gathered = torch.empty_like(query)
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        scores = torch.bmm(query[:, start:end], key[:, :end].transpose(1, 2))
        scores[:, :, start:] += later[: end - start, : end - start]
        pattern = scores.softmax(-1)
        gathered[:, start:end] = torch.bmm(pattern, value[:, :end])
        if patterns is not None:
            patterns.append(pattern)
    return gathered


class _BlockedCausal(torch.autograd.Function):
    """Causal attention for training on a CPU: matrix products over blocks of queries, each with the keys up to it.

    torch's fused kernel computes tile by tile without the matrix unit's full rate; these products run at it, forward
    and backward together in less than half the time. The price is memory: the patterns are kept for the backward pass,
    half of ``[B, H, T, T]``. The backward pass is Dao et al. 2022 (FlashAttention), appendix B.2, without the tiling.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, scale = query.shape, 1 / math.sqrt(query.shape[-1])
        # Batch and heads as one axis: [B H, T, D].
        query, key, value = (x.flatten(0, 1) for x in (query * scale, key, value))
        patterns: list[Tensor] = []
        gathered = _by_blocks(query, key, value, patterns)
        ctx.save_for_backward(query, key, value, *patterns)
        return gathered.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *patterns = ctx.saved_tensors
        shape, scale = gradients[0].shape, 1 / math.sqrt(query.shape[-1])
        gradient = gradients[0].flatten(0, 1)
        to_query = torch.empty_like(query)
        # Summed over blocks, so in float32 at least.
        wide = torch.promote_types(key.dtype, torch.float32)
        to_key, to_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        for number, pattern in enumerate(patterns):
            start = number * _BLOCK
            end = start + pattern.shape[1]
            part = gradient[:, start:end]
            to_value[:, :end] += torch.bmm(pattern.transpose(1, 2), part)
            to_pattern = torch.bmm(part, value[:, :end].transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_pattern, pattern, -1, pattern.dtype)
            to_query[:, start:end] = torch.bmm(to_scores, key[:, :end]) * scale
            to_key[:, :end] += torch.bmm(to_scores.transpose(1, 2), query[:, start:end])
        return to_query.view(shape), to_key.to(key.dtype).view(shape), to_value.to(value.dtype).view(shape)


def attention_pattern(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """The slow, readable twin of fused attention, first half: where each query looks.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, K, S, D]``, each shared by H/K heads.
        mask: as ``Mask``.

    Returns:
        ``[B, H, T, S]`` float32 weights, each row summing to 1. Source: Vaswani et al. 2017, section 3.2.1.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # [B, H, S, D]
    scores = query.float() @ key.float().transpose(-2, -1) / math.sqrt(query.shape[-1])
    if isinstance(mask, str | int):
        before = scores.shape[-1] - scores.shape[-2]
        window = mask if isinstance(mask, int) else scores.shape[-1]
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        mask = mask.tril(before).triu(before + 1 - window)
    if isinstance(mask, Tensor):
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1)


def gather(pattern: Tensor, value: Tensor) -> Tensor:
    """Second half: the values ``[B, K, S, D]``, weighted by the pattern ``[B, H, T, S]``; ``[B, H, T, D]``."""
    value = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)  # [B, H, S, D]
    return (pattern @ value.float()).to(value.dtype)
