"""A model that is larger than its card: the blocks stay on the host, and each comes to the device when it is its turn.

While one block computes, the next is copied beside it, into the other of two places on the device; the first follows on
the last, since after a step comes another. Every step moves all blocks, so its speed is that of the link: some seconds
a token where a card's own memory takes some hundredths. A prompt moves them once for thousands of tokens.

What belongs to no block (tables, the final norm, the unembedding) is on the device. On CUDA the host's memory is pinned
and a stream of its own copies; on another device the same is done without either, which is how the tests see it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.core import runtime
from gptcli.core.model import Transformer

_PLACES = 2
_ALIGNED = 256  # bytes at whose multiples each tensor begins: what the kernels like


@dataclass
class _Place:
    """Room for one block on the device.

    Attributes:
        layer: which one is here, or on its way.
        arrived: when the copy is done; ``free``: when the block has computed. On CUDA only.
    """

    room: Tensor  # [bytes] uint8
    layer: int | None = None
    arrived: Any = None
    free: Any = None


class Offload:
    """Keeps a transformer's blocks on the host from now on.

    Attributes:
        bytes: of all blocks, which is what a step moves.
        layer_bytes: of the largest.
        bandwidth: bytes a second from the host, measured.
        fetched: how many blocks were copied so far.
    """

    def __init__(self, transformer: Transformer, device: torch.device) -> None:
        """Take over a transformer that is on the host, block by block: its tensors are let go as they are copied."""
        self._device = device
        self._cuda = device.type == "cuda"
        blocks: Sequence[nn.Module] = list(transformer.blocks)
        self._host: list[Tensor] = []
        layouts = []
        for block in blocks:
            packed, layout = self._packed(block)
            self._host.append(packed)
            layouts.append(layout)
        self.layer_bytes = max(map(len, self._host))
        self.bytes = sum(map(len, self._host))
        self._places = [
            _Place(torch.empty(self.layer_bytes, dtype=torch.uint8, device=device))
            for _ in range(min(_PLACES, len(blocks)))
        ]
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None
        self.fetched = 0
        for layer, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
            self._point(block, layout, self._place(layer).room)
            block.register_forward_pre_hook(self._before(layer))
            block.register_forward_hook(self._after(layer))
        for name, child in transformer.named_children():
            if name != "blocks":
                child.to(device)
        transformer.tie()
        self.bandwidth = self._measured()

    @property
    def told(self) -> str:
        """What it costs, in words."""
        gigabytes, seconds = self.bytes / 1e9, self.bytes / self.bandwidth
        return (
            f"offload: {len(self._host)} layers on the host, {gigabytes:,.3f} GB for every step; "
            f"at {self.bandwidth / 1e9:,.1f} GB/s at least {seconds:,.3f} s a token"
        )

    @property
    def resident(self) -> list[int]:
        """The layers that are on the device, or on their way."""
        return [place.layer for place in self._places if place.layer is not None]

    def _packed(self, block: nn.Module) -> tuple[Tensor, list[tuple[nn.Module, str, int, Tensor]]]:
        """A block's tensors one after the other in (pinned) memory, and of each its module, name, place and like."""
        named = [
            (module, name, tensor)
            for module in block.modules()
            for name, tensor in list(module.named_parameters(recurse=False))
        ]
        layout, size = [], 0
        for module, name, tensor in named:
            layout.append((module, name, size, torch.empty_like(tensor, device="meta").contiguous()))
            size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        for (module, name, tensor), (_, _, start, like) in zip(named, layout, strict=True):
            _view(packed, start, like).copy_(tensor)
            setattr(module, name, None)
        return packed, layout

    @staticmethod
    def _point(block: nn.Module, layout: list[tuple[nn.Module, str, int, Tensor]], room: Tensor) -> None:
        """Let a block's parameters be what is in a place, whichever block that is just now."""
        for module, name, start, like in layout:
            setattr(module, name, nn.Parameter(_view(room, start, like), requires_grad=False))

    def _place(self, layer: int) -> _Place:
        return self._places[layer % len(self._places)]

    def _before(self, layer: int) -> Any:
        def before(module: nn.Module, given: Any) -> None:
            self._fetch(layer)
            if self._cuda:
                torch.cuda.current_stream(self._device).wait_event(self._place(layer).arrived)
            following = (layer + 1) % len(self._host)
            if self._place(following) is not self._place(layer):
                self._fetch(following)

        return before

    def _after(self, layer: int) -> Any:
        def after(module: nn.Module, given: Any, made: Any) -> None:
            place = self._place(layer)
            if self._cuda:
                place.free = torch.cuda.Event()
                place.free.record(torch.cuda.current_stream(self._device))

        return after

    def _fetch(self, layer: int) -> None:
        """Begin to copy a layer into its place, behind what computes there; nothing if it is there."""
        place = self._place(layer)
        if place.layer == layer:
            return
        place.layer = layer
        self.fetched += 1
        packed = self._host[layer]
        if not self._cuda:
            place.room[: len(packed)].copy_(packed)
            return
        with torch.cuda.stream(self._stream):
            if place.free is not None:
                self._stream.wait_event(place.free)
            place.room[: len(packed)].copy_(packed, non_blocking=True)
            place.arrived = torch.cuda.Event()
            place.arrived.record(self._stream)

    def _measured(self) -> float:
        """Bytes a second from the host: the better of two copies of a layer."""
        best = float("inf")
        for _ in range(2):
            place = self._places[0]
            runtime.synchronize(self._device)
            start = time.perf_counter()
            place.layer = None
            self._fetch(0)
            runtime.synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        self.fetched = 0
        return len(self._host[0]) / max(best, 1e-9)


def _view(packed: Tensor, start: int, like: Tensor) -> Tensor:
    return packed[start : start + like.nbytes].view(like.dtype).view(like.shape)
