"""Processes that know each other: how they meet, tell each other things, and part. Training and inference share it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gptcli import errors
from gptcli.core import runtime
from gptcli.errors import GptcliError, ResourceError, UsageError

# How long a rank waits for another: as long as it takes rank 0 to prepare data, to save a large model, or to be asked
# for something. A rank that died is found by who started it, and by its connections, and needs no time limit.
_PATIENCE = timedelta(days=7)
# What is told goes out in one piece of this size, and what is longer in a second one.
_PIECE = 4096
_LENGTH = 8


def meet(place: runtime.RankPlace, device: str) -> torch.device:
    """Wait for the other ranks; the device that this one computes on, a CUDA device of its own where there are any.

    ``device`` is as ``runtime.pick_device`` takes it. Raises UsageError for a device that several can't share,
    ResourceError when there are too few.
    """
    if device.startswith("cuda:") or device == "mps":
        raise UsageError(f"{place.count} ranks can't share the device {device}", "use --device cuda or cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        own = runtime.pick_device(f"cuda:{place.local_rank}")
        torch.cuda.set_device(own)
        # Numbers on the host go by gloo, so that no device has to be waited for.
        backend = "cpu:gloo,cuda:nccl"
    else:
        own, backend = runtime.pick_device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    return own


def leave() -> None:
    """At the end, when all are here."""
    dist.destroy_process_group()


def broadcast(data: bytes) -> bytes:
    """What rank 0 gives, on every rank."""
    piece = torch.zeros(_PIECE, dtype=torch.uint8)
    first = dist.get_rank() == 0
    if first:
        _fill(piece, len(data).to_bytes(_LENGTH, "little") + data[: _PIECE - _LENGTH])
    dist.broadcast(piece, 0)
    told = piece.numpy().tobytes()
    length = int.from_bytes(told[:_LENGTH], "little")
    start, left = told[_LENGTH : _LENGTH + length], length - (_PIECE - _LENGTH)
    if left <= 0:
        return start
    rest = torch.zeros(left, dtype=torch.uint8)
    if first:
        _fill(rest, data[_PIECE - _LENGTH :])
    dist.broadcast(rest, 0)
    return start + rest.numpy().tobytes()


def _fill(tensor: torch.Tensor, data: bytes) -> None:
    tensor[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _named(error: GptcliError) -> list[str]:
    """An error's type and words, short enough for one piece however they are escaped."""
    return [type(error).__name__, error.message[:400], error.hint[:200]]


def _explained(error: RuntimeError) -> Exception:
    """A connection that another rank has closed, or memory that ran out, in our words."""
    if runtime.is_out_of_memory(error):
        return ResourceError("there is not enough memory on rank 0", "use a smaller batch, or more ranks")
    if runtime.is_connection_lost(error):
        return GptcliError("another rank has ended", "what it said stands above; start all of them again")
    return error


class Line:
    """From rank 0 to the others: what they are to do next, as JSON.

    Attributes:
        rank, ranks: which of how many this is.
        device: that this rank computes on.
        broken: whether the ranks are no longer at the same step, so that nothing can be told any more.
        when_lost: called when that is so for good.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.broken = False
        self.when_lost: Callable[[], None] = lambda: None
        self._waiting: list[Any] = []  # to be told with the next message
        self._closed = False

    @classmethod
    def start(cls, place: runtime.RankPlace, device: str) -> Line:
        """Meet the others; raises as ``meet``."""
        return cls(place.rank, place.count, meet(place, device))

    def later(self, what: Any) -> None:
        """Something that the others need not hear before the next message."""
        self._waiting.append(what)

    def tell(self, what: Any) -> None:
        """Rank 0: tell the others. Raises GptcliError where they no longer listen."""
        self.check()
        told, self._waiting = [*self._waiting, what], []
        with self.losing():
            broadcast(json.dumps(told).encode())

    def check(self) -> None:
        """Raise GptcliError where the others no longer follow."""
        if self.broken or self._closed:
            raise GptcliError("the ranks no longer work together", "start all of them again")

    def lose(self) -> None:
        """The others can't be reached any more."""
        self.broken = True
        self.when_lost()

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """Within, whatever goes wrong loses the others; a connection or memory that failed is told in our words."""
        try:
            yield
        except RuntimeError as error:
            self.lose()
            raise _explained(error) from error
        except BaseException:
            self.lose()
            raise

    def hear(self) -> list[Any]:
        """The others: what rank 0 tells, in its order."""
        told: list[Any] = json.loads(broadcast(b""))
        return told

    def agree(self, error: GptcliError | None) -> None:
        """On every rank after the same piece of work: raises the error of the first rank that had one, on all."""
        told = b"" if error is None else json.dumps(_named(error)).encode()
        own = torch.zeros(_PIECE, dtype=torch.uint8)
        _fill(own, len(told).to_bytes(_LENGTH, "little") + told)
        every = [torch.zeros_like(own) for _ in range(self.ranks)]
        dist.all_gather(every, own)
        if error is not None and self.rank == 0:
            raise error
        for rank, each in enumerate(every):
            data = each.numpy().tobytes()
            if length := int.from_bytes(data[:_LENGTH], "little"):
                name, message, hint = json.loads(data[_LENGTH : _LENGTH + length])
                kind = getattr(errors, name, GptcliError)
                raise kind(f"rank {rank}: {message}" if rank else message, hint)

    def close(self) -> None:
        """Rank 0, at its end: let the others go."""
        self.when_lost = lambda: None
        if not self.broken and not self._closed:
            try:
                self.tell({"do": "end"})
            except (GptcliError, RuntimeError):
                self.broken = True
        self._closed = True
