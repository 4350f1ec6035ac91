"""Products of integers, for matrices in 8 bits on a CPU of Intel's kind: what is multiplied is rounded to 8 bits too.

Each row of it is divided by its own extreme value before and multiplied with it afterwards, so that no row's numbers
depend on its neighbours. A single row, which is a step, is rounded between its least and its greatest value, within the
kernel: doing here what is done for many rows would cost a quarter of its time.

Two libraries have such products. FBGEMM is faster for few rows, oneDNN for many, and each has its own order of the
matrix: it is packed for what is used, when it is used, and the plain one is then let go, for it can be had back.
Shapes as in ``core/quantize.py``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptcli.core import runtime

# Rows from which oneDNN's product is faster.
MANY = 64
_TINY = 1e-30  # in place of the extreme value of what is all zero


def available() -> bool:
    """Whether this torch has both libraries."""
    return {"fbgemm", "onednn"} <= set(torch.backends.quantized.supported_engines)


class IntegerProduct:
    """The product with one matrix."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """``weight`` int8 ``[R, in]``, ``scale`` float32 ``[R]``, ``bias`` ``[R]``."""
        self._plain: Tensor | None = weight
        self._columns = weight.shape[1]
        self._scale = scale
        self._bias = None if bias is None else bias.float()
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        # Without VNNI the kernels add pairs of products in 16 bits, and two of 8 bits do not fit.
        self._reduced = not torch.cpu._is_vnni_supported()
        self._most = 63 if self._reduced else 127
        self._few: Any = None
        self._many: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., R]``, in the dtype of ``x``."""
        wide = x.float()
        rows = x.numel() // x.shape[-1]
        if rows == 1:
            made = torch.ops.quantized.linear_dynamic(wide, self._for_few(), self._reduced)
        elif rows < MANY:
            made = self._of_few(wide)
        else:
            made = self._of_many(wide.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return made.to(x.dtype)

    def __deepcopy__(self, memo: object) -> IntegerProduct:
        return IntegerProduct(self.weight.clone(), self._scale, self._bias)  # what is packed can't be copied

    @property
    def weight(self) -> Tensor:
        """The matrix, int8 ``[R, in]``: unpacked anew, where it was packed."""
        if self._plain is not None:
            return self._plain
        if self._many is not None:
            return self._many.to_dense().t().contiguous()
        plain: Tensor = torch.ops.quantized.linear_unpack(self._few)[0].int_repr()
        return plain

    def _of_few(self, x: Tensor) -> Tensor:
        extreme = x.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
        product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / extreme, 1 / self._most, self._most + 1, self._for_few()
        )
        # The bias is within already, so what counts is what lies beyond: bias + extreme (product - bias).
        return product.mul_(extreme) if self._bias is None else torch.lerp(self._bias, product, extreme)

    def _of_many(self, x: Tensor) -> Tensor:
        extreme = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).clamp_(min=_TINY)
        levels = torch.mul(x, self._most / extreme).round_().to(torch.int8)
        levels = levels.view(torch.uint8).add_(self._most + 1)  # wraps: what was -1 is one less than what was 0
        kept = (self._for_many(), self._scale, self._zeros, None)
        product = torch.ops.onednn.qlinear_pointwise(
            *(levels, 1 / self._most, self._most + 1, *kept, 1.0, 0, torch.float32, "none", [], "")
        )
        return product.mul_(extreme) if self._bias is None else torch.addcmul(self._bias, product, extreme, out=product)

    def _for_few(self) -> Any:
        if self._few is None:
            with _engine("fbgemm"):
                scale = self._scale.double()
                matrix = torch._make_per_channel_quantized_tensor(self.weight, scale, self._zeros, 0)
                self._few = torch.ops.quantized.linear_prepack(matrix, self._bias)
            del matrix
            self._plain = None
            runtime.give_back_memory()
        return self._few

    def _for_many(self) -> Tensor:
        if self._many is None:
            self._many = torch.ops.onednn.qlinear_prepack(self.weight, [MANY, self._columns])
            self._plain = None
            runtime.give_back_memory()
        return self._many


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    """Within, torch packs quantized matrices for this library, and does not warn that it will move them elsewhere."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = before
