"""How a model takes its steps: which ways are worth it, and what they need, made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

from torch import Tensor

from gptcli.core import native, native_build, runtime
from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.errors import GptcliError, NotFoundError, UnsupportedError

Way = Literal["native", "transformer"]
# Tokens [B] int64, one a row, go into the cache; the logits [B, V] of the next come back.
StepFunction = Callable[[Tensor, KVCache], Tensor]

# Packing reads and writes every weight once, which costs as much as some steps.
_WORTH_PACKING = 16
# With more rows a step is bound by arithmetic, in which PyTorch's products are as good.
_MOST_ROWS = 64
_WORTH_A_THREAD = 1 << 16  # bytes


def ways(*, tokens: int, rows: int, packed: Collection[Way]) -> tuple[Way, ...]:
    """The ways worth trying, best first; the transformer itself is always the last.

    Decided from counts alone: ``tokens`` still to be made in each row at most, ``rows`` that are decoded together, and
    the ways whose weights are ``packed`` already.
    """
    worth: list[Way] = []
    if rows <= _MOST_ROWS and ("native" in packed or tokens >= _WORTH_PACKING):
        worth.append("native")
    return (*worth, "transformer")


def pick_threads(transformer: Transformer, most: int) -> int:
    """How many threads a native step of a model is worth, up to ``most``.

    Between two waits each has to have more to read than a wait costs, which is a microsecond or two.
    """
    tensors = (*transformer.parameters(), *transformer.buffers())
    waits = 5 * transformer.config.layers + 1
    return max(1, min(most, sum(tensor.nbytes for tensor in tensors) // waits // _WORTH_A_THREAD))


class Stepping:
    """The ways to take steps that one model has.

    Attributes:
        folder: where native libraries are; None: there are none.
        told: how the last steps were taken, and why, for whoever asks.
    """

    def __init__(self, transformer: Transformer, folder: Path | None = None) -> None:
        self.transformer = transformer
        self.folder = folder
        self.told = "no step was taken"
        self._native: native.NativeStep | None = None
        self._no_native: str | None = None  # why there is none; None as well while nobody has looked

    def step(self, *, tokens: int, rows: int) -> StepFunction:
        """How to take steps for so many tokens of so many rows; what is worth it is loaded and packed here."""
        packed: list[Way] = ["native"] if self._native else []
        worth = ways(tokens=tokens, rows=rows, packed=packed)
        if "native" in worth and (step := self._native_step()):
            self.told = f"native step ({step.library.features}), threads: {step.threads}, {step.library.file}"
            return step.step
        self.told = "PyTorch step: " + (
            self._no_native or f"for {tokens} tokens in {rows} rows nothing else is worth its preparation"
        )
        return self._with_transformer

    def _with_transformer(self, tokens: Tensor, cache: KVCache) -> Tensor:
        logits: Tensor = self.transformer(tokens[:, None], cache)  # [B, 1, V]
        return logits[:, -1]  # [B, V]

    def _native_step(self) -> native.NativeStep | None:
        """The native step, packed at the first call; None where there can't be one, which is found out once."""
        if self._native is None and self._no_native is None:
            try:
                self._native = self._pack()
            except GptcliError as error:
                self._no_native = f"{error.message} ({error.hint})"
        return self._native

    def _pack(self) -> native.NativeStep:
        if self.folder is None:
            raise NotFoundError("no folder of native libraries was given", "gptcli models prepare builds one")
        if reason := native.why_not(self.transformer):  # before a library is loaded for nothing
            raise UnsupportedError(f"there is no native step: {reason}", "nothing is to be done")
        threads = pick_threads(self.transformer, runtime.threads())
        return native.NativeStep(native_build.load(self.folder), self.transformer, threads)
