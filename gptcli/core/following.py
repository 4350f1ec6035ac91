"""A model whose slices are on several ranks, as rank 0 sees it: one transformer, like any other.

Only rank 0 knows texts, tokens, seeds and requests. Whatever it asks of its transformer, and whatever it does to a
cache, it tells the others first, and they do the same with theirs (``follow``); so all that works with a transformer
works with this one, and draws on rank 0 alone. What is done to caches waits for the next forward pass, so a step costs
one message.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptcli.core import runtime
from gptcli.core.cache import KVCache
from gptcli.core.group import Line
from gptcli.core.model import Tap, Transformer
from gptcli.errors import LimitError
from gptcli.spec.config import ModelConfig

# A terminal's Ctrl-C comes to every process, and from torchrun once more: so long it is still the same one.
_SAME_INTERRUPT = 1.0


class Leading(Transformer):
    """Rank 0's slice of a transformer, which tells the other ranks what to do with theirs."""

    def __init__(self, config: ModelConfig, line: Line) -> None:
        super().__init__(config)
        self._line = line
        self._within = False
        self._handles = iter(range(1 << 62))
        self._gone: deque[int] = deque()  # caches that nobody has any more

    def begin(self) -> None:
        """When all modules are in their place: lead."""
        self.unembedding.register_forward_pre_hook(self._tell_unembedding)
        self.unembedding.register_forward_hook(self._end_unembedding)

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, *, last: Tensor | None = None, tap: Tap | None = None
    ) -> Tensor:
        """As ``Transformer.forward``; a ``tap`` sees rank 0's own heads."""
        patient = _Patient(tap) if tap else None
        with self._together("forward", ids=ids, cache=cache, last=last):
            logits = super().forward(ids, cache, last=last, tap=patient)
        if patient:
            patient.raise_again()
        return logits

    def residual_stream(
        self, ids: Tensor, cache: KVCache | None = None, tap: Tap | None = None, *, documents: Tensor | None = None
    ) -> Tensor:
        """As ``Transformer.residual_stream``; packed documents are for training, and not here."""
        if documents is not None:
            raise ValueError("ranks that share a model do not train it")
        patient = _Patient(tap) if tap else None
        with self._together("residual_stream", ids=ids, cache=cache, last=None):
            stream = super().residual_stream(ids, cache, patient)
        if patient:
            patient.raise_again()
        return stream

    def new_cache(self, rows: int, capacity: int, dtype: torch.dtype) -> KVCache:
        return SharedCache(self, next(self._handles), rows, capacity, dtype)

    def note(self, name: str, handle: int, *given: Any) -> None:
        """Something done to a cache, that the others do before they next compute."""
        while self._gone:
            self._line.later({"do": "drop", "cache": self._gone.popleft()})
        self._line.later({"do": name, "cache": handle, "given": given})

    def _tell_unembedding(self, module: Any, given: tuple[Tensor]) -> None:
        """The logits of some vectors alone, which the others have no part of yet."""
        if not self._within:
            vectors = given[0]
            dtype = runtime.DTYPE_NAMES[vectors.dtype]
            self._line.tell({"do": "unembedding", "shape": list(vectors.shape), "dtype": dtype})
            self._line.broken = True  # until it is done
            with self._line.losing():
                torch.distributed.broadcast(vectors.contiguous(), 0)

    def _end_unembedding(self, module: Any, given: tuple[Tensor], made: Tensor) -> None:
        if not self._within:
            self._line.broken = False

    @contextlib.contextmanager
    def _together(self, name: str, *, ids: Tensor, cache: KVCache | None, last: Tensor | None) -> Iterator[None]:
        """Within, the ranks compute the same; what could go wrong on all of them is found before it is told."""
        if self._within:
            yield
            return
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise IndexError(f"one of the tokens is none of the model's {self.config.vocab_size}")
        length = ids.shape[1] + (max(cache.lengths) if cache is not None else 0)
        if cache is not None and length > cache.capacity:
            raise LimitError(f"{length} tokens do not fit a cache of {cache.capacity}", "make a larger cache")
        if self.positions is not None and length > self.config.context:
            raise LimitError(f"{length} tokens, and the model has {self.config.context} positions", "shorten the text")
        while self._gone:
            self._line.later({"do": "drop", "cache": self._gone.popleft()})
        told = {
            "do": name,
            "ids": ids.tolist(),
            "cache": cache.handle if isinstance(cache, SharedCache) else None,
            "last": None if last is None else last.tolist(),
        }
        with _uninterrupted():
            self._line.tell(told)
            self._line.broken = self._within = True  # until it is done
            try:
                with self._line.losing():
                    yield
                self._line.broken = False
            finally:
                self._within = False


class _Patient:
    """A tap whose error, which may only mean that it has seen enough, waits until all ranks are through."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._error: Exception | None = None

    def __call__(self, name: str, value: Tensor) -> None:
        if self._error is None:
            try:
                self._tap(name, value)
            except Exception as error:
                self._error = error

    def raise_again(self) -> None:
        """What the tap raised, if it did."""
        if self._error is not None:
            raise self._error


class SharedCache(KVCache):
    """A KV cache of which each rank has its own heads; this is rank 0's."""

    def __init__(self, leader: Leading, handle: int, rows: int, capacity: int, dtype: torch.dtype) -> None:
        super().__init__(leader.config, rows, capacity, device=leader.embedding.weight.device, dtype=dtype)
        self._own(leader, handle)
        leader.note("new", handle, rows, capacity, runtime.DTYPE_NAMES[dtype])

    def _own(self, leader: Leading, handle: int) -> None:
        self.handle, self._leader = handle, leader
        weakref.finalize(self, leader._gone.append, handle)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        self._leader.note("set_lengths", self.handle, list(lengths))
        super().set_lengths(lengths)

    def grow(self, capacity: int) -> None:
        self._leader.note("grow", self.handle, capacity)
        super().grow(capacity)

    def select(self, rows: Sequence[int]) -> None:
        self._leader.note("select", self.handle, list(rows))
        super().select(rows)

    def join(self, other: KVCache) -> None:
        assert isinstance(other, SharedCache)
        self._leader.note("join", self.handle, other.handle)
        # What joining does by itself, the others do by themselves.
        with self._untold():
            super().join(other)

    def leave(self, row: int) -> None:
        self._leader.note("leave", self.handle, row)
        super().leave(row)

    def fork(self, source: int, target: int) -> None:
        self._leader.note("fork", self.handle, source, target)
        super().fork(source, target)

    def copy(self, row: int, length: int, capacity: int) -> KVCache:
        other = super().copy(row, length, capacity)
        assert isinstance(other, SharedCache)
        other._own(self._leader, next(self._leader._handles))
        self._leader.note("copy", self.handle, row, length, capacity, other.handle)
        return other

    @contextlib.contextmanager
    def _untold(self) -> Iterator[None]:
        leader, self._leader = self._leader, _SILENT
        try:
            yield
        finally:
            self._leader = leader


class _Silent:
    """Notes nothing."""

    def note(self, name: str, handle: int, *given: Any) -> None: ...


_SILENT: Any = _Silent()


def follow(transformer: Transformer, line: Line) -> None:
    """On every rank but the first: do what rank 0 does, with this rank's slice, until it says that that is all.

    Raises what a forward pass raises; the ranks are then out of step, and this one should end.
    """
    follower = _Follower(transformer)
    while True:
        for told in line.hear():
            if told["do"] == "end":
                return
            follower.do(told)


class _Follower:
    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._caches: dict[int, KVCache] = {}
        self._weight = transformer.embedding.weight

    @torch.inference_mode()
    def do(self, told: dict[str, Any]) -> None:
        """One thing that rank 0 does."""
        name = told["do"]
        if name in ("forward", "residual_stream"):
            self._compute(name, told)
        elif name == "unembedding":
            vectors = torch.empty(told["shape"], device=self._weight.device, dtype=runtime.DTYPES[told["dtype"]])
            torch.distributed.broadcast(vectors, 0)
            self._transformer.unembedding(vectors)
        elif name == "drop":
            self._caches.pop(told["cache"], None)
        else:
            self._arrange(name, told["cache"], *told["given"])

    def _compute(self, name: str, told: dict[str, Any]) -> None:
        device = self._weight.device
        ids = torch.tensor(told["ids"], device=device, dtype=torch.int64)
        cache = None if told["cache"] is None else self._caches[told["cache"]]
        if name == "residual_stream":
            self._transformer.residual_stream(ids, cache)
            return
        last = None if told["last"] is None else torch.tensor(told["last"], device=device)
        self._transformer(ids, cache, last=last)

    def _arrange(self, name: str, handle: int, *given: Any) -> None:
        """What is done to a cache."""
        if name == "new":
            rows, capacity, dtype = given
            self._caches[handle] = self._transformer.new_cache(rows, capacity, runtime.DTYPES[dtype])
            return
        cache = self._caches[handle]
        if name == "join":
            cache.join(self._caches[given[0]])
        elif name == "copy":
            row, length, capacity, other = given
            self._caches[other] = cache.copy(row, length, capacity)
        else:
            action: Callable[..., None] = getattr(cache, _ACTIONS[name])
            action(*given)


_ACTIONS = {name: name for name in ("set_lengths", "grow", "select", "leave", "fork")}


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within, Ctrl-C waits: a rank that leaves in the middle leaves the others where nobody can reach them.

    The second time it does not wait.
    """
    inside = threading.current_thread() is threading.main_thread()
    if not inside or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[float] = []

    def told(number: int, frame: Any) -> None:
        if came and time.monotonic() - came[0] > _SAME_INTERRUPT:
            raise KeyboardInterrupt
        came.append(time.monotonic())

    signal.signal(signal.SIGINT, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
