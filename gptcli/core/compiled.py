"""A step compiled by torch (TorchInductor): for processes that live long enough to make up for the time it takes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptcli.core.cache import StaticCache
from gptcli.core.graphs import plain_forward
from gptcli.core.model import Transformer

# With this, on CUDA, a product with one row is a sum that is computed together with what stands before and after it,
# and variants of each kernel are tried. The other half of torch's mode "max-autotune-no-cudagraphs", templates of
# products, is for many rows, and talks. Graphs are our own (``core/graphs.py``).
_OPTIONS: dict[str, dict[str, str | int | bool | Callable[..., Any]]] = {"cuda": {"coordinate_descent_tuning": True}}
# A variant is compiled for each number of places that attention sees, more of them than torch puts up with by itself.
_VARIANTS = 64


class Compiled:
    """Tokens and a ``StaticCache`` to logits, as ``graphs.Forward``: compiled at the first call, and for each shape.

    Whatever a compiler that is not all there raises, it is never a requirement: the transformer's own step is taken.

    Attributes:
        failed: why nothing is compiled; None where it is.
    """

    def __init__(self, transformer: Transformer) -> None:
        self.failed: str | None = None
        self._plain = plain_forward(transformer)
        self._device = transformer.embedding.weight.device.type
        self._compiled: Any = None
        self._known: weakref.WeakSet[StaticCache] = weakref.WeakSet()  # for which there is a variant

    @property
    def told(self) -> str:
        """How steps are taken, in words."""
        return f"steps could not be compiled: {self.failed}" if self.failed else "compiled steps"

    def __call__(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        if self.failed is not None:
            return self._plain(tokens, cache)
        if cache in self._known:
            return self._compiled(tokens, cache)
        lengths = cache.lengths.clone()
        try:
            found = self._variant(tokens, cache)
        except Exception as error:
            self.failed = str(error).strip().partition("\n")[0] or type(error).__name__
            cache.lengths.copy_(lengths)  # however far it came
            return self._plain(tokens, cache)
        self._known.add(cache)
        return found

    def _variant(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        if self._compiled is None:
            self._compiled = torch.compile(self._plain, dynamic=False, options=_OPTIONS.get(self._device))
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            found: Tensor = self._compiled(tokens, cache)
        return found
