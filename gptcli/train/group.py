"""Several processes that train one model: each holds a copy of it (DDP), or each a part (FSDP2).

Every rank runs the same loop on its rows of the same batches, and they do in step whatever needs the others. All see
one file system: rank 0 writes the model folder, and each rank that holds something of its own writes its part of a
checkpoint. If one ends with an error, whoever started them ends the rest; the last checkpoint is good.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gptcli.core import group, runtime
from gptcli.core.checkpoint import save_folder
from gptcli.core.model import Transformer
from gptcli.core.signals import not_ignored
from gptcli.errors import UsageError
from gptcli.train.loss import Objective
from gptcli.train.ranks import Part, Ranks


class Group(Ranks):
    """Processes that know each other; ``share`` makes them hold a model together."""

    kind = "group"

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.count = rank, count

    @classmethod
    def start(cls, place: runtime.RankPlace, device: str) -> Group:
        """Meet the others; see ``ranks.join``."""
        return cls(place.rank, place.count, group.meet(place, device))

    def share(self, kind: str, dtype: torch.dtype) -> Group:
        kinds = {"ddp": DataParallel, "fsdp": FullyShard}
        if kind not in kinds:
            raise UsageError(f"{self.count} ranks can't share a model by {kind!r}", "use auto, ddp or fsdp")
        return kinds[kind](self, dtype)

    def agree(self, data: bytes) -> bytes:
        return group.broadcast(data)

    def sums(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def total(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def least(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, dist.ReduceOp.MIN)

    def _reduced(self, tensor: Tensor, by: Any) -> Tensor:
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced, by)
        return reduced

    def save_folder(self, model: Transformer, out: Path, dtype: torch.dtype, files: Mapping[str, bytes]) -> None:
        if self.rank == 0:
            save_folder(model, out, dtype=dtype, files=files)

    def wait(self) -> None:
        self.sums(0.0)

    @contextlib.contextmanager
    def deferring_interrupts(self) -> Iterator[None]:
        """A second signal interrupts at once, and then nothing is saved."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def told(number: int, frame: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        # torchrun tells its processes by SIGTERM, or by what it was told itself.
        heard = not_ignored(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {each: signal.signal(each, told) for each in heard}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def leave(self) -> None:
        self.wait()
        group.leave()


class DataParallel(Group):
    """Every rank holds all; gradients are averaged while the backward pass goes on."""

    kind = "ddp"

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        super().__init__(group.rank, group.count, group.device)

    def wrap(self, objective: nn.Module) -> nn.Module:
        return DistributedDataParallel(objective.to(self.device), gradient_as_bucket_view=True)

    def alone(self, objective: nn.Module) -> nn.Module | None:
        assert isinstance(objective, DistributedDataParallel)
        return objective.module

    def accumulate(self, objective: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        assert isinstance(objective, DistributedDataParallel)
        return contextlib.nullcontext() if last else objective.no_sync()


class FullyShard(Group):
    """Every rank holds some rows of each tensor: of weights, gradients and optimizer state.

    A block's matrices are brought together, in the type that they are multiplied in, when it is their turn, and let go
    again; their gradients are averaged and parted in float32 after every micro-batch. Norms and what belongs to no
    block stay float32, as they do in one process, and stay together through a pass.

    The weights to begin with are made whole on every rank's host (each from the same seed, or file) and then parted,
    block by block: a host needs room for one model a rank, a device for one block beside its part.
    """

    kind = "fsdp"

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        super().__init__(group.rank, group.count, group.device)
        self.writers = self.count
        self._dtype = dtype
        self._mesh = init_device_mesh(self.device.type, (self.count,))

    def wrap(self, objective: nn.Module) -> nn.Module:
        assert isinstance(objective, Objective)
        matrices = MixedPrecisionPolicy()
        if self._dtype is not torch.float32:
            matrices = MixedPrecisionPolicy(self._dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in objective.transformer.blocks:
            parts = [block.get_submodule(name) for name in ("attention", "mlp")]
            # Of query and key.
            norms: list[nn.Module] = [module for module in parts[0].children() if isinstance(module, nn.RMSNorm)]
            if norms:
                fully_shard(norms, mesh=self._mesh)
            fully_shard(parts, mesh=self._mesh, mp_policy=matrices)
        fully_shard(objective, mesh=self._mesh)
        # Attention and MLP return views, which nothing writes to.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        return objective

    def alone(self, objective: nn.Module) -> nn.Module | None:
        return None

    def settle(self, objective: nn.Module) -> None:
        assert isinstance(objective, FSDPModule)
        objective.reshard()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: Tensor) -> Part:
        if not isinstance(tensor, DTensor):
            return super().part(tensor)
        # As torch.chunk parts them: the last ranks may have fewer rows, or none.
        rows = len(tensor)
        start = min(rows, self.rank * -(-rows // self.count))
        return Part(tensor.to_local().detach(), start, rows)

    def whole_model(self, model: Transformer) -> Transformer:
        """Rank 0's copy, on its device where that has room for one more, else on the host."""
        whole = self._brought_together(model, self._dtype)
        if self.rank == 0:
            try:
                whole.to(self.device)
            except torch.OutOfMemoryError:
                whole.to("cpu")  # what has moved already
        return whole

    def save_folder(self, model: Transformer, out: Path, dtype: torch.dtype, files: Mapping[str, bytes]) -> None:
        whole = self._brought_together(model, dtype)
        if self.rank == 0:
            save_folder(whole, out, dtype=dtype, files=files)

    def _brought_together(self, model: Transformer, dtype: torch.dtype) -> Transformer:
        """A copy of the model on rank 0's host, filled tensor by tensor; on the other ranks it is never filled."""
        with torch.device("meta"):
            copy = Transformer(model.config)
        for name, parameter in model.named_parameters():
            whole = self.whole(parameter.detach())
            if self.rank == 0:
                owner, _, leaf = name.rpartition(".")
                held = nn.Parameter(whole.to("cpu", dtype), requires_grad=False)
                setattr(copy.get_submodule(owner), leaf, held)
        copy.tie()
        return copy.eval()
