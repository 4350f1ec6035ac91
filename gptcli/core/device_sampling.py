"""``sampling.sample`` without the host: what changes from token to token is kept in tensors on the device.

So a step that draws its own token can be captured and replayed. The numbers are ``sample``'s, which is its twin in the
tests: nothing here is another algorithm, only seeds, positions and history are tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.core.sampling import _BITS, History, _mix, _mix_int, bias_vector, filter_logits, noise_of_keys
from gptcli.core.settings import Sampling


class DeviceSampler:
    """Draws a token for each of ``rows`` rows, again and again, and counts along.

    Attributes:
        sampling: the chain, the same for as long as it lives.
    """

    def __init__(self, sampling: Sampling, rows: int, vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self._size = vocab_size
        self._positions = torch.zeros(rows, device=device, dtype=torch.int64)  # of the tokens that are drawn next
        self._seeds = torch.zeros(2, rows, device=device, dtype=torch.int64)
        self._bias = bias_vector(sampling, vocab_size, device) if sampling.logit_bias else None
        self._history = History([[]] * rows, vocab_size, device) if sampling.looks_back else None

    def start(self, seeds: Sequence[int], positions: Sequence[int], history: History | None) -> None:
        """Begin anew with these, as ``sample`` takes them; they are copied."""
        device = self._positions.device
        self._seeds.copy_(torch.tensor([seed_keys(seed) for seed in seeds], device=device).T)
        self._positions.copy_(torch.tensor(list(positions), device=device))
        if self._history is not None and history is not None:
            self._history.prompt.copy_(history.prompt)
            self._history.made.copy_(history.made)

    def noise(self) -> Tensor | None:
        """The noise ``[B, V]`` of the tokens to be drawn next; it needs no logits. None where nothing is drawn."""
        if self.sampling.temperature == 0:
            return None
        first, second = device_noise_keys(self._seeds[0], self._seeds[1], self._positions)
        return noise_of_keys(first[:, None], second[:, None], self._size)

    def draw(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The tokens ``[B]`` int64 from logits ``[B, V]`` and ``noise()``; positions and history go on by one."""
        filtered = filter_logits(logits, self.sampling, self._history, self._bias)
        tokens = (filtered if noise is None else filtered + noise).argmax(-1)
        self._positions.add_(1)
        if self._history is not None:
            self._history.add(tokens)
        return tokens


def seed_keys(seed: int) -> tuple[int, int]:
    """What ``noise_keys`` makes of a seed alone: two numbers of 32 bits, so that no integer of 64 has to hold all."""
    low = _mix_int((seed & _BITS) ^ 0x243F6A88)
    return low, _mix_int((seed >> 32 & _BITS) ^ low ^ 0x85A308D3)


def device_noise_keys(low: Tensor, high: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """``noise_keys`` of rows, all ``[B]`` int64: their ``seed_keys``, and positions below 2**31."""
    first = _mix((positions * 0x9E3779B1 + high) & _BITS)
    return first, _mix((positions * 0x85EBCA6B + low + first) & _BITS)
