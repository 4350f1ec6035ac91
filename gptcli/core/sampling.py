"""From logits to one token: penalties and bias, temperature, top-k, top-p, min-p, then the draw.

The draw is argmax(filtered logits / T + Gumbel noise), which picks a token with its softmax probability (Gumbel 1954;
Maddison et al. 2014, "A* sampling", section 2). The noise is a hash of (seed, position, token id): no generator has a
state, any device computes it alike, and a sample is the same alone, in a batch, streamed or repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.core.settings import Sampling

_BITS = 0xFFFFFFFF
# A temperature below this is as good as 0, and float32 could not divide by it.
COLDEST = 1e-30


class History:
    """How often each row has seen each token: ``prompt`` and ``made``, ``[B, V]`` float32."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.prompt = torch.zeros(len(prompts), vocab_size, device=device)
        self.made = torch.zeros_like(self.prompt)
        for row, ids in enumerate(prompts):
            index = torch.tensor(list(ids), device=device, dtype=torch.int64)
            self.prompt[row].index_add_(0, index, torch.ones(len(ids), device=device))

    def add(self, tokens: Tensor) -> None:
        """Count the tokens ``[B]`` that were just made."""
        self.made[torch.arange(len(tokens), device=tokens.device), tokens] += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        index = torch.tensor(rows, device=self.made.device)
        self.prompt, self.made = self.prompt[index], self.made[index]


def filter_logits(
    logits: Tensor, sampling: Sampling, history: History | None = None, bias: Tensor | None = None
) -> Tensor:
    """The logits ``[B, V]`` after the whole chain but the draw: float32, divided by T, -inf where nothing may be drawn.

    ``history`` is needed where ``sampling.looks_back``; ``bias`` is ``bias_vector``'s, made here if it is not given. At
    temperature 0 they are not divided, and only penalties and bias apply.
    """
    logits = logits.float()
    if history is not None and sampling.looks_back:
        seen = history.prompt + history.made > 0
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
        logits = logits - history.made * sampling.frequency_penalty - (history.made > 0) * sampling.presence_penalty
    if sampling.logit_bias:
        logits = logits + (bias_vector(sampling, logits.shape[-1], logits.device) if bias is None else bias)
    if sampling.temperature == 0:
        return logits
    logits = logits / max(sampling.temperature, COLDEST)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        beyond = before >= sampling.top_p
        beyond[:, :1].fill_(False)
        logits = logits.masked_fill(beyond.scatter(1, index, beyond), -math.inf)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdim=True).values + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def bias_vector(sampling: Sampling, size: int, device: torch.device) -> Tensor:
    """What ``sampling.logit_bias`` adds to each of ``size`` logits, float32."""
    known = {token: value for token, value in sampling.logit_bias.items() if token < size}
    bias = torch.zeros(size)
    bias[torch.tensor(list(known), dtype=torch.int64)] = torch.tensor(list(known.values()), dtype=torch.float32)
    return bias.to(device)


def sample(
    logits: Tensor, sampling: Sampling, seeds: Sequence[int], positions: Sequence[int], history: History | None = None
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: ``[B, V]``, as the model gives them.
        sampling: the chain.
        seeds: one a row.
        positions: of the token to be drawn, one a row: how many tokens stand before it.
        history: counts of earlier tokens, where ``sampling.looks_back``.

    Returns:
        ``[B]`` int64.
    """
    filtered = filter_logits(logits, sampling, history)
    if sampling.temperature > 0:
        filtered = filtered + gumbel_noise(seeds, positions, filtered.shape[-1], filtered.device)
    return filtered.argmax(-1)


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise for tokens 0 to ``size``, ``[B, size]`` float32; row i is of (seeds[i], positions[i])."""
    keys = [noise_keys(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    first, second = torch.tensor(keys, device=device, dtype=torch.int64).T[..., None]  # [B, 1] each
    return noise_of_keys(first, second, size)


def noise_of_keys(first: Tensor, second: Tensor, size: int) -> Tensor:
    """``gumbel_noise`` of the rows' ``noise_keys``, ``[B, 1]`` int64 each.

    The integers are the same on every device; the logarithms agree to rounding.
    """
    hashed = torch.arange(size, device=first.device, dtype=torch.int64) * 0x9E3779B1 + first
    hashed = _mix(_mix(hashed & _BITS) ^ second)
    # Of U in (0, 1), -log(1 - U) is exponential with all its precision where it is small, that is, where Gumbel noise
    # is large and decides.
    uniform = ((hashed.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def noise_keys(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys for the noise of one draw, from all 64 bits of the seed."""
    low = _mix_int((seed & _BITS) ^ 0x243F6A88)
    high = _mix_int((seed >> 32 & _BITS) ^ low ^ 0x85A308D3)
    first = _mix_int((position * 0x9E3779B1 + high) & _BITS)
    second = _mix_int((position * 0x85EBCA6B + low + first) & _BITS)
    return first, second


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer (Appleby 2011) on 32-bit numbers in int64: a bijection in which each bit sways all."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)


def _mix_int(x: int) -> int:
    """``_mix`` of one Python number."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return x ^ (x >> 16)
