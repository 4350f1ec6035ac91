"""How a model goes through prompts and takes steps: which ways are worth it, and what they need, made once and kept.

The transformer itself is always one; on a CPU ``Lean`` is another (``core/lean.py``), and where it was built the native
step (``core/native.py``) is the fastest for a token at a time. On CUDA, and where steps are compiled, they are taken by
a loop that draws its own tokens (``core/graphs.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gptcli.core import graphs, native, native_build, runtime
from gptcli.core.cache import KVCache
from gptcli.core.compiled import Compiled
from gptcli.core.draft import COST, COST_BY_TILES
from gptcli.core.lean import Lean, worth_packing
from gptcli.core.model import Transformer
from gptcli.core.settings import Sampling
from gptcli.errors import GptcliError, NotFoundError, UnsupportedError

Way = Literal["native", "lean", "transformer"]
# Tokens [B] int64, one a row, go into the cache; the logits [B, V] of the next come back.
StepFunction = Callable[[Tensor, KVCache], Tensor]
# Ids, a cache and ``last``, as Transformer.forward takes them.
Forward = Callable[..., Tensor]

# Packing reads and writes every weight once, which costs as much as some steps.
_WORTH_PACKING = 16
# With more rows a step is bound by arithmetic, in which PyTorch's products are as good.
_MOST_ROWS = 64
# Tokens of a prompt up to which that holds as well: a few of them cost PyTorch mostly what its operators do. And of all
# prompts that are read at once, for which the native step makes room.
SHORT, _SHORT_TOGETHER = 64, 512
_WORTH_A_THREAD = 1 << 16  # bytes


def ways(*, tokens: int, rows: int, packed: Collection[Way]) -> tuple[Way, ...]:
    """The ways worth trying for steps, best first; the transformer itself is always the last.

    Decided from counts alone: ``tokens`` still to be made in each row at most, ``rows`` that are decoded together, and
    the ways whose weights are ``packed`` already.
    """
    worth: list[Way] = []
    if rows <= _MOST_ROWS and ("native" in packed or tokens >= _WORTH_PACKING):
        worth.append("native")
    if "lean" in packed or worth_packing(0, tokens, rows):
        worth.append("lean")
    return (*worth, "transformer")


def pick_threads(transformer: Transformer, most: int) -> int:
    """How many threads a native step of a model is worth, up to ``most``.

    Between two waits each has to have more to read than a wait costs, which is a microsecond or two.
    """
    waits = 5 * transformer.config.layers + 1
    return max(1, min(most, held_bytes(transformer) // waits // _WORTH_A_THREAD))


def held_bytes(*modules: nn.Module) -> int:
    """What weights take; those of a module that says so itself (``nbytes``) may be packed and not to be seen."""
    sizes: dict[int, int] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        if hasattr(module, "nbytes"):
            sizes[id(module)] = int(module.nbytes)  # type: ignore[arg-type]
        else:
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            sizes |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}  # a tied one once
    return sum(sizes.values())


class Stepping:
    """The ways that one model has.

    Attributes:
        folder: where native libraries are; None: there are none.
        told: how the last steps were taken, and why, for whoever asks.
        compiled: the step as torch compiles it; None where that was not asked for.
    """

    def __init__(
        self,
        transformer: Transformer,
        folder: Path | None = None,
        *,
        lean: bool = False,
        compile: bool = False,
        plain: str | None = None,
    ) -> None:
        """Of ``transformer`` alone; with a ``folder`` of libraries also natively, and with ``lean`` by a ``Lean``.

        With ``compile`` steps are compiled by torch, which takes up to minutes, instead of all that. ``plain`` is why
        only the transformer's own forward may be used, where something else happens within it; None: any may.
        """
        self.transformer = transformer
        self.folder = None if plain else folder
        self.plain = plain
        self.compiled = Compiled(transformer) if compile else None
        self.told = "no step was taken"
        self._device = transformer.embedding.weight.device
        self._may_lean = lean and not plain and self._device.type == "cpu"
        self._quantized = not isinstance(transformer.unembedding, nn.Linear)
        self._lean: Lean | None = None
        self._library: native_build.Library | None = None
        self._native: native.NativeStep | None = None
        self._no_native = plain  # why there is none; None as well while nobody has looked
        self._prepared: native.NativeStep | None = None  # for short prompts as well
        self._loop: graphs.DeviceLoop | None = None
        self._loop_user: Callable[[], object | None] = lambda: None  # who has it, as long as that one lives

    def prepare(self) -> None:
        """Of a process that lives long: pack what steps need before it is asked, and let short prompts have it, too.

        From the first prompt on, so that the same one is always read in the same way.
        """
        scaling = self.transformer.config.rope_scaling
        step = self._native_step()
        if scaling is None or scaling.kind != "dynamic":  # which turns all of a prompt alike
            self._prepared = step

    def prefill(self, *, prompt: int, tokens: int, rows: int) -> tuple[Forward, torch.dtype]:
        """How to go through prompts of up to so many tokens, and in which type the cache is fastest afterwards.

        ``tokens`` are still to be made in each of ``rows`` rows, as ``step`` will be told.
        """
        dtype = self.transformer.embedding.weight.dtype
        natively = "native" in self._worth(tokens, rows) and self._may_native()
        leaning = self._leaning(prompt, 0 if natively else tokens, rows)
        if natively:  # which reads half as much of half as long numbers, where the weights are rounded more anyway
            dtype = torch.bfloat16 if self._quantized and leaning else dtype
        elif leaning:
            dtype = self._packed_lean().cache_dtype
        if self._prepared:
            return partial(self._briefly, self._prepared, leaning), dtype
        return (self._packed_lean() if leaning else self.transformer), dtype

    def _briefly(
        self, step: native.NativeStep, leaning: bool, ids: Tensor, cache: KVCache, *, last: Tensor | None = None
    ) -> Tensor:
        """A ``Forward`` that is native for short texts; a row's logits are the same to the bit in any company."""
        if ids.shape[1] > SHORT or ids.numel() > _SHORT_TOGETHER:
            forward: Forward = self._packed_lean() if leaning else self.transformer
            made: Tensor = forward(ids, cache, last=last)
            return made
        if last is None:
            return step.verify(ids.tolist(), cache).view(*ids.shape, -1)  # [B, T, V]
        lengths = (last + 1).tolist()
        return step.fill([row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)], cache)

    def step(self, *, tokens: int, rows: int) -> StepFunction:
        """How to take steps for so many tokens of so many rows; what is worth it is loaded and packed here."""
        worth = self._worth(tokens, rows)
        if "native" in worth and (step := self._native_step()):
            self.told = f"native step ({step.library.features}), threads: {step.threads}, {step.library.file}"
            return step.step
        why = self._no_native or f"for {tokens} tokens in {rows} rows nothing else is worth its preparation"
        if "lean" in worth:
            self._packed_lean()
            self.told = f"lean PyTorch step: {self._no_native or f'{rows} rows'}"
            return self._with_lean
        self.told = f"PyTorch step: {why}"
        return self._with_transformer

    def device_loop(
        self, user: object, sampling: Sampling, *, rows: int, tokens: int, capacity: int
    ) -> graphs.DeviceLoop | None:
        """A loop that draws so many tokens of so many rows itself, where that pays; None elsewhere.

        The last one is kept, with its memory and its graphs, and serves again once its ``user`` is gone.
        """
        if self.plain or (self.compiled is None and not graphs.pays(self._device, tokens, rows)):
            return None
        if self._loop is None or self._loop_user() is not None or not self._loop.fits(sampling, rows, capacity):
            self._loop = None
            try:
                self._loop = graphs.DeviceLoop(self.transformer, sampling, rows, capacity, self.compiled)
            except torch.OutOfMemoryError:
                return None
        self._loop_user = weakref.ref(user)
        return self._loop

    @property
    def looking_costs(self) -> float:
        """What it costs to look at one token more in a step, in steps (see ``Lookup``)."""
        by_tiles = self._library is not None and self._library.tiles and not self._quantized
        return COST_BY_TILES if by_tiles and self.transformer.embedding.weight.dtype == torch.bfloat16 else COST

    @property
    def together(self) -> bool:
        """Whether short prompts may be read together, and each is to the bit what it is alone."""
        return self._prepared is not None

    @property
    def fell_back(self) -> bool:
        """Whether steps were to be compiled and could not be."""
        return self.compiled is not None and self.compiled.failed is not None

    def tell(self) -> str:
        """How the last steps were taken."""
        if self._loop is None:
            return self.told
        return self._loop.told if self.compiled is None else f"{self.compiled.told}, {self._loop.told}"

    def _worth(self, tokens: int, rows: int) -> tuple[Way, ...]:
        packed: list[Way] = [*(["native"] if self._native else []), *(["lean"] if self._lean else [])]  # type: ignore[list-item]
        worth = ways(tokens=tokens, rows=rows, packed=packed)
        return worth if self._may_lean else tuple(way for way in worth if way != "lean")

    def _leaning(self, prompt: int, tokens: int, rows: int) -> bool:
        """A quantized model has nothing to pack but its query, key and value side by side."""
        worth = self._lean is not None or self._quantized or worth_packing(prompt, tokens, rows)
        return self._may_lean and worth

    def _packed_lean(self) -> Lean:
        if self._lean is None:
            self._lean = Lean(self.transformer)
        return self._lean

    def _with_lean(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self._packed_lean()(tokens[:, None], cache)[:, -1]  # [B, V]

    def _with_transformer(self, tokens: Tensor, cache: KVCache) -> Tensor:
        logits: Tensor = self.transformer(tokens[:, None], cache)  # [B, 1, V]
        return logits[:, -1]  # [B, V]

    def _native_step(self) -> native.NativeStep | None:
        """The native step, packed at the first call; None where there can't be one, which is found out once.

        Behind the first prompt, that is, unless short ones are to have it: packing lets go of what quantized matrices
        were packed for before, and a long prompt packs them for itself again.
        """
        if self._native is None and self._may_native() and self._library is not None:
            try:
                threads = pick_threads(self.transformer, runtime.threads())
                self._native = native.NativeStep(self._library, self.transformer, threads)
            except GptcliError as error:
                self._no_native = f"{error.message} ({error.hint})"
        return self._native

    def _may_native(self) -> bool:
        """Whether there can be a native step, as far as that can be told before anything is packed."""
        if self._library is None and self._no_native is None:
            try:
                self._library = self._load()
            except GptcliError as error:
                self._no_native = f"{error.message} ({error.hint})"
        return self._no_native is None

    def _load(self) -> native_build.Library:
        if self.folder is None:
            raise NotFoundError("no folder of native libraries was given", "gptcli models prepare builds one")
        if reason := native.why_not(self.transformer):  # before a library is loaded for nothing
            raise UnsupportedError(f"there is no native step: {reason}", "nothing is to be done")
        return native_build.load(self.folder)

    def several(self, *, tokens: int) -> tuple[Callable[[Sequence[int], KVCache], Tensor], bool]:
        """How to add several tokens to one row at once, of whom ``tokens`` are still to come: logits ``[T, V]``.

        The second value says whether they are to the bit those of ``step``, one by one.
        """
        worth = self._worth(tokens, 1)
        if "native" in worth and (step := self._native_step()):
            return (lambda ids, cache: step.verify([ids], cache)), True
        forward: Forward = self._packed_lean() if "lean" in worth else self.transformer

        def several(ids: Sequence[int], cache: KVCache) -> Tensor:
            logits: Tensor = forward(torch.tensor([ids], device=cache.keys[0].device), cache)  # [1, T, V]
            return logits[0]

        return several, False

    @property
    def library(self) -> native_build.Library | None:
        """The native library, where a native step was, or is to be, packed."""
        return self._library
