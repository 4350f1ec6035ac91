"""Tensor parallelism: each rank's slice of a model, and what its modules do together with those of the others.

Which slices is said in ``spec/split.py``. Here ``styles`` is a table, as torch's ``parallelize_module`` takes it, of
what happens around a module: what output and down make is added up over the ranks, the embedding's rows too, and the
logits are gathered on rank 0. All others work on the rank's own heads or hidden numbers and need nothing: heads are
inferred from the matrices.

The slices are ordinary tensors, so whatever knows one (quantizing, the cache, the kernels) knows a slice; torch's own
styles keep them as DTensors, which take every operator through Python: some 600 microseconds a block's MLP where this
takes 24, on one CPU, which a step of one token pays in every layer. The collectives are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from gptcli.core.model import Transformer
from gptcli.spec.split import Share


def styles(share: Share) -> dict[str, ParallelStyle]:
    """What happens around which modules; the others are left alone."""
    config = share.config
    together = {}
    if config.qk_norm == "whole":
        together = {
            "blocks.*.attention.query_norm": NormedTogether(config.heads * config.head_dim),
            # A key that several ranks hold is counted by each.
            "blocks.*.attention.key_norm": NormedTogether(max(config.kv_heads, share.ranks) * config.head_dim),
        }
    return {
        **together,
        "embedding": LookedUp(*share.span("vocabulary")),
        "blocks.*.attention.output": Summed(),
        "blocks.*.mlp.down": Summed(),
        "unembedding": Gathered([Share(share.config, rank, share.ranks).span("vocabulary") for rank in _ranks(share)]),
    }


def _ranks(share: Share) -> range:
    return range(share.ranks)


def join_ranks(transformer: Transformer, share: Share, device: torch.device) -> DeviceMesh:
    """Have a rank's slice of a transformer, loaded, work together with those of the other ranks."""
    mesh = init_device_mesh(device.type, (share.ranks,))
    parallelize_module(transformer, mesh, styles(share), src_data_rank=None)
    return mesh


class Summed(ParallelStyle):
    """A map whose inputs are dealt out: the sum of what all ranks make of theirs."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()

        def sum_up(module: nn.Module, given: Any, made: Tensor) -> Tensor:
            made = made.contiguous()
            dist.all_reduce(made, group=group)
            return made

        module.register_forward_hook(sum_up)
        return module


class LookedUp(ParallelStyle):
    """A table whose rows are dealt out: a token's row comes from the rank that has it, and zeros from the others."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._start, self._stop = start, stop

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh.get_group()
        foreign: list[Tensor] = []  # which of the tokens being looked up are another rank's

        def look_up_own(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            ids = given[0]
            foreign[:] = [(ids < self._start) | (ids >= self._stop)]
            return (ids.clamp(self._start, self._stop - 1) - self._start,)

        def sum_up(module: nn.Module, given: tuple[Tensor], made: Tensor) -> Tensor:
            made = made.masked_fill(foreign.pop()[..., None], 0)
            dist.all_reduce(made, group=group)
            return made

        module.register_forward_pre_hook(look_up_own)
        module.register_forward_hook(sum_up)
        return module


class NormedTogether(ParallelStyle):
    """An RMS norm of numbers that are dealt out: ``size`` of them on all ranks together."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        norm: Any = module
        group, weight, eps = mesh.get_group(), norm.weight, norm.eps

        def forward(x: Tensor) -> Tensor:
            wide = x.float()
            squares = wide.square().sum(-1, keepdim=True)
            dist.all_reduce(squares, group=group)
            return (wide * torch.rsqrt(squares / self._size + eps) * weight.float()).to(x.dtype)

        norm.forward = forward
        return module


class Gathered(ParallelStyle):
    """A map whose outputs are dealt out in ``spans``, one after the other: all of them on rank 0.

    The other ranks, which need none, keep their own.
    """

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        super().__init__()
        self._sizes = [stop - start for start, stop in spans]

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group, first = mesh.get_group(), mesh.get_local_rank() == 0
        most = max(self._sizes)

        def gather(module: nn.Module, given: Any, made: Tensor) -> Tensor:
            own = nn.functional.pad(made, (0, most - made.shape[-1])).contiguous()
            every = [torch.empty_like(own) for _ in self._sizes] if first else None
            dist.gather(own, every, dst=0, group=group)
            if every is None:
                return made
            return torch.cat([each[..., :size] for each, size in zip(every, self._sizes, strict=True)], -1)

        module.register_forward_hook(gather)
        return module
