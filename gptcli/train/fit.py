"""What a run finds out by trying, once: how many rows fit at a time, and whether compiling pays.

It is said, kept in the checkpoint and used again on resuming, so that nothing that moves bits is tried twice.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcli.core import runtime
from gptcli.core.model import Transformer
from gptcli.errors import ResourceError
from gptcli.train.ranks import Ranks

if TYPE_CHECKING:
    from gptcli.train.loop import Plan

# A CPU is no faster with more tokens at a time than this, and the activations leave its cache.
_CPU_TOKENS = 8192


@dataclass(frozen=True)
class Choices:
    """``micro_batch`` is in rows a rank puts through at once."""

    micro_batch: int
    compile: bool
    checkpoint_activations: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(objective: nn.Module, plan: Plan, rows: int, ranks: Ranks) -> Choices:
    """Fill in what the plan leaves open, for ``rows`` of this rank a step.

    On CUDA the largest micro-batch is found by trying halves until one fits, with activation checkpointing where not
    even one row fits without; then a few compiled passes are timed beside plain ones. On a CPU memory is rarely short,
    and compiling does not pay (``tests/bench/train.py``). Raises ResourceError when not even one row fits.
    """
    transformer = _transformer(objective)
    device, context = transformer.embedding.weight.device, transformer.config.context
    if device.type != "cuda":
        most = plan.micro_batch or max(1, _CPU_TOKENS // context)
        return Choices(_even(rows, most), bool(plan.compile), bool(plan.checkpoint_activations))
    saving = bool(plan.checkpoint_activations)
    micro = plan.micro_batch or _largest(objective, rows, saving)
    if micro is None and plan.checkpoint_activations is None:
        saving = True
        micro = _largest(objective, rows, saving)
    if micro is None:
        raise ResourceError(
            "not even one row of the context fits in the memory of the device",
            "use a smaller --context or model, or more ranks; --plan says what fits",
        )
    micro = int(ranks.least(torch.tensor(_even(rows, micro), device=device)))
    compiled = plan.compile if plan.compile is not None else _compiling_pays(objective, micro, saving)
    # All ranks choose alike.
    compiled = bool(ranks.least(torch.tensor(int(compiled), device=device)))
    return Choices(micro, compiled, saving)


def apply(transformer: Transformer, choices: Choices) -> None:
    """Set a model up as was chosen. Blocks are compiled one by one: all have the same code, compiled once."""
    for block in transformer.blocks:
        _checkpointed(block, choices.checkpoint_activations)
        if choices.compile:
            block.compile()


def _checkpointed(block: nn.Module, saving: bool) -> None:
    """Whether a block keeps its activations for the backward pass, or makes them again from what went in."""
    plain = type(block).forward.__get__(block)
    block.forward = partial(checkpoint, plain, use_reentrant=False) if saving else plain


def _transformer(objective: nn.Module) -> Transformer:
    found = next(module for module in objective.modules() if isinstance(module, Transformer))
    return found


def _even(rows: int, most: int) -> int:
    """The largest part of ``rows`` up to ``most`` that splits them evenly, or nearly."""
    return -(-rows // -(-rows // min(most, rows)))


def _largest(objective: nn.Module, rows: int, saving: bool) -> int | None:
    """The most rows whose forward and backward pass fits; None if not even one does."""
    transformer = _transformer(objective)
    for block in transformer.blocks:
        _checkpointed(block, saving)
    tried = rows
    while True:
        try:
            _pass(objective, tried)
            return tried
        except torch.OutOfMemoryError:
            if tried == 1:
                return None
            tried = -(-tried // 2)
        finally:
            objective.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def _pass(objective: nn.Module, rows: int) -> None:
    transformer = _transformer(objective)
    config, device = transformer.config, transformer.embedding.weight.device
    ids = torch.zeros((rows, config.context), dtype=torch.int64, device=device)
    loss: Tensor = objective(ids, ids)
    loss.backward()
    torch.cuda.synchronize(device)


def _compiling_pays(objective: nn.Module, rows: int, saving: bool) -> bool:
    """Whether compiled blocks are at least a twentieth faster; no, where the compiler is missing or fails."""
    transformer = _transformer(objective)

    def seconds() -> float:
        _pass(objective, rows)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            _pass(objective, rows)
            times.append(time.perf_counter() - start)
        return min(times)

    apply(transformer, Choices(rows, False, saving))
    plain = seconds()
    try:
        apply(transformer, Choices(rows, True, saving))
        return seconds() < 0.95 * plain
    except Exception:  # whatever a compiler that is not all there raises: it is never a requirement
        return False
    finally:
        objective.zero_grad(set_to_none=True)
        for block in transformer.blocks:
            block._compiled_call_impl = None
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that the device is capable of: of a known GPU by its data sheet, else measured."""
    known: Callable[[], float | None] = partial(runtime.sheet_flops, device, dtype)
    return known() or runtime.measured_flops(device, dtype)
