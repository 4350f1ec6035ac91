"""Decoding that stays on the device: a step draws its own token and feeds it to the next.

On CUDA a step of a small model is hundreds of kernels of some microseconds, and the host needs longer to ask for each
than the device to compute it. So the whole step, from the token through the blocks to the next token, is captured once
in a CUDA graph and then replayed, which the host asks for with one call. Nothing in it may depend on the host: lengths,
positions, seeds and tokens are tensors that the step reads and advances itself (``StaticCache``, ``DeviceSampler``).
The host only reads the tokens, and asks for the step after before it does, so the device never waits for it.

The same step runs on any device without being captured, which is how the tests hold it against the ordinary decoder.
Shapes as in ``core/model.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from gptcli.core.cache import KVCache, StaticCache
from gptcli.core.device_sampling import DeviceSampler
from gptcli.core.model import Transformer
from gptcli.core.sampling import History
from gptcli.core.settings import Sampling

# Attention reads as many places as the next power of two has, so that a short text does not pay for a long one. Each
# has a graph of its own, captured when it is reached.
_LEAST_SEEN = 128
# Memory for the cache is also taken by powers of two: requests of like length find graphs that fit.
_LEAST_CAPACITY = 256
# Capturing costs about as much as this many steps that are not captured.
_WORTH_CAPTURING = 16
# With more rows the kernels are long enough to hide the host.
_MOST_ROWS = 64

# Tokens [B] and a cache; the logits [B, V] of the next.
Forward = Callable[[Tensor, StaticCache], Tensor]


def pays(device: torch.device, tokens: int, rows: int) -> bool:
    """Whether a loop on the device is worth its preparation for so many tokens of so many rows: from counts alone."""
    return device.type == "cuda" and tokens >= _WORTH_CAPTURING and rows <= _MOST_ROWS


@dataclass
class _Flight:
    """Tokens on their way to the host: where they arrive, when they have, and which of them are wanted."""

    host: Tensor
    arrived: torch.cuda.Event | None
    places: list[int]


class DeviceLoop:
    """Makes one token after the other for ``rows`` rows, by itself.

    Its memory is its own and stays, and so do its graphs: it can be started again and again. Rows that have ended stay
    too and are computed in vain, which costs next to nothing beside the weights that are read for all.

    Attributes:
        rows, capacity: how many, and how many tokens each can hold. More make it grow, whose graphs are then anew.
        capture_seconds: spent on capturing so far; ``graphs`` how many there are.
        failed: why steps are not captured although this is a CUDA device; None where they are.
    """

    def __init__(
        self, transformer: Transformer, sampling: Sampling, rows: int, capacity: int, forward: Forward | None = None
    ) -> None:
        """``forward`` computes the logits instead of the transformer itself (a compiled one)."""
        weight, config = transformer.embedding.weight, transformer.config
        self.rows, self.capacity = rows, fitting(capacity, config.context)
        self.capture_seconds, self.graphs = 0.0, 0
        self.failed: str | None = None
        self._config, self._device, self._dtype = config, weight.device, weight.dtype
        self._forward = forward or plain_forward(transformer)
        self._sampler = DeviceSampler(sampling, rows, config.vocab_size, weight.device)
        self._tokens = torch.zeros(rows, device=weight.device, dtype=torch.int64)
        self._lengths = torch.zeros_like(self._tokens)
        self._logits = torch.zeros(rows, config.vocab_size, device=weight.device, dtype=weight.dtype)
        self._cache = self._new_cache()
        self._steps: dict[int, Callable[[], None]] = {}  # by how many places they see
        self._beside, self._warm = _StreamBeside(weight.device), _StreamBeside(weight.device)
        self._pool: Any = None  # of memory for graphs
        pinned = weight.device.type == "cuda"  # what the device copies to while the host does something else
        self._buffers = [torch.zeros(rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._flight: _Flight | None = None
        self._live: list[int] = []  # the places of the rows that go on
        self._ahead = True
        self._first: Tensor | None = None

    def fits(self, sampling: Sampling, rows: int, capacity: int) -> bool:
        """Whether it can do this without being made anew."""
        return self._sampler.sampling == sampling and self.rows == rows and self.capacity >= capacity

    @torch.inference_mode()
    def start(
        self,
        cache: KVCache,
        logits: Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
        history: History | None,
        *,
        ahead: bool = True,
    ) -> None:
        """Go on from prompts in ``cache`` and their ``logits``; the rest as ``sample`` takes it. All of it is copied.

        With ``ahead`` a step is begun before the tokens of the one before are read; ``logits`` then says nothing.
        """
        self._ahead = ahead
        self._sampler.start(seeds, positions, history)
        self._live = list(range(self.rows))
        self.refill(cache, logits)

    @torch.inference_mode()
    def refill(self, cache: KVCache, logits: Tensor) -> None:
        """Go on from other prompts in the rows that are left; seeds, positions and history stay."""
        longest = max(cache.lengths)
        if longest > self.capacity:
            self._grow(longest)
        rows = torch.tensor(self._live, device=self._device)
        for mine, theirs in zip(self._tensors(self._cache), self._tensors(cache), strict=True):
            # Zeros behind, not what another request left: a hidden place has weight 0, but 0 times NaN is NaN.
            mine.zero_()
            mine[rows, :, :longest] = theirs[:, :, :longest].to(mine.dtype)
        self._lengths.index_copy_(0, rows, torch.tensor(cache.lengths, device=self._device))
        self._cache.lengths = [0] * self.rows
        for place, length in zip(self._live, cache.lengths, strict=True):
            self._cache.lengths[place] = length
        wide = self._logits.index_copy(0, rows, logits.to(self._logits.dtype))
        if self._live == list(range(self.rows)):
            wide = logits  # in the type that they came in
        self._first = logits
        self._tokens.copy_(self._sampler.draw(wide, self._sampler.noise()))
        self._send()

    @torch.inference_mode()
    def next(self) -> list[int]:
        """The next token of each row that is left."""
        if self._flight is None:
            self._advance()
        flight = self._flight
        assert flight is not None
        self._flight = None
        if self._ahead and self._has_room():
            self._advance()
        if flight.arrived is not None:
            flight.arrived.synchronize()
        tokens = flight.host.tolist()
        return [tokens[place] for place in flight.places]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self._live = [self._live[row] for row in rows]
        if self._flight is not None:
            self._flight.places = [self._flight.places[row] for row in rows]

    def drawn(self) -> tuple[Tensor, Tensor]:
        """What the last tokens were drawn from, ``[rows that are left, V]``, and they, ``[rows that are left]``.

        Only where the loop is not ahead of its reader.
        """
        if self._first is not None:
            return self._first, self._tokens[self._live]
        return self._logits[self._live], self._tokens[self._live]

    @property
    def told(self) -> str:
        """How steps are taken, in words."""
        if self._device.type != "cuda":
            return "a loop that is not captured"
        if self.failed:
            return f"a loop on the device that could not be captured: {self.failed}"
        return (
            f"CUDA graphs: {self.graphs}, captured in {self.capture_seconds:.2f} s, cache of {self.capacity:,} tokens"
        )

    def _has_room(self) -> bool:
        """Whether one more token may go into the rows that are left: never past the context."""
        longest = max((self._cache.lengths[place] for place in self._live), default=self._config.context)
        return longest < self._config.context

    def _advance(self) -> None:
        """Ask for the next step, and for its tokens to be sent to the host."""
        longest = max(self._cache.lengths[place] for place in self._live)
        if longest >= self.capacity:
            self._grow(longest + 1)
        seen = min(self.capacity, _power_of_two(longest + 1, _LEAST_SEEN))
        step = self._steps.get(seen)
        if step is None:
            self._steps[seen] = self._prepared(seen)  # which takes this step
        else:
            step()
        self._first = None
        self._cache.advance(1)
        self._send()

    def _step(self, cache: StaticCache) -> None:
        """One step: what is captured. Noise needs no logits, and is made beside them on a stream of its own."""
        with self._beside:
            noise = self._sampler.noise()
        logits = self._forward(self._tokens, cache)
        self._beside.join()
        self._logits.copy_(logits)
        self._tokens.copy_(self._sampler.draw(self._logits, noise))

    def _prepared(self, seen: int) -> Callable[[], None]:
        """A step that sees so many places, once taken: as it is, or captured for the next time.

        The step that is taken is the warming up that capturing wants: libraries make what they need, fast products are
        chosen, compiled code is compiled.
        """
        cache = StaticCache(self._cache, seen, self._lengths, self._config.context)
        step = partial(self._step, cache)
        if self._device.type != "cuda" or self.failed:
            step()
            return step
        start = time.perf_counter()
        with self._warm:
            step()
        self._warm.join()
        try:
            replay = self._captured(step)
        except RuntimeError as error:
            self.failed = str(error).partition("\n")[0]
            return step
        self.capture_seconds += time.perf_counter() - start
        self.graphs += 1
        return replay

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a graph: capturing computes nothing, replaying does.

        All graphs take what they need in between from one pool. That is safe in any order, since what lasts (tokens,
        lengths, cache, logits) was allocated outside.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Errors of this thread only: another one may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._warm.stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _send(self) -> None:
        """Copy the tokens to the host, without waiting for them: into one of two buffers, as another may be unread."""
        host = self._buffers[0]
        self._buffers.reverse()
        host.copy_(self._tokens, non_blocking=True)
        arrived = None
        if self._device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(self._device))
        self._flight = _Flight(host, arrived, list(self._live))

    def _new_cache(self) -> KVCache:
        return KVCache(self._config, self.rows, self.capacity, device=self._device, dtype=self._dtype)

    def _grow(self, capacity: int) -> None:
        """Make room; steps are then prepared anew."""
        self.capacity = fitting(max(capacity, 2 * self.capacity), self._config.context)
        self._cache.grow(self.capacity)
        self._steps.clear()

    @staticmethod
    def _tensors(cache: KVCache) -> list[Tensor]:
        return [*cache.keys, *cache.values]


def plain_forward(transformer: Transformer) -> Forward:
    """The transformer's own step."""

    def forward(tokens: Tensor, cache: StaticCache) -> Tensor:
        # A StaticCache is all of a KVCache that a forward uses.
        logits: Tensor = transformer(tokens[:, None], cast(KVCache, cache))
        return logits[:, -1]

    return forward


def fitting(capacity: int, context: int) -> int:
    """Tokens a row to have room for, where ``capacity`` are asked for: a power of two, or the whole context."""
    return min(_power_of_two(capacity, _LEAST_CAPACITY), max(context, capacity))


def _power_of_two(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())


class _StreamBeside:
    """A stream beside the current one: what is done within goes there, after all that was asked for before.

    On other devices than CUDA it is nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._within: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            self._within = torch.cuda.stream(self.stream)
        self._within.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._within.__exit__(*raised)

    def join(self) -> None:
        """The current stream goes on after what was done here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
