"""What a run finds out by trying, once: how many rows fit at a time, and whether compiling pays.

It is said, kept in the checkpoint and used again on resuming, so that nothing that moves bits is tried twice.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcli.core import runtime
from gptcli.core.model import Transformer
from gptcli.errors import ResourceError
from gptcli.spec.config import ModelConfig
from gptcli.spec.plan import Dtype, plan_training, saved_bytes
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

    On CUDA the largest micro-batch is found by trying halves until one fits (in all but a twentieth of the memory, for
    what a step does besides), with activation checkpointing where not even one row fits without; then a few compiled
    passes are timed beside plain ones. Ranks that can't try alone go by ``spec.plan``, since one that runs out of
    memory in the middle of a pass leaves the others waiting. On a CPU memory is asked for, and compiling does not pay
    (``tests/bench/train.py``). All ranks choose alike. Raises ResourceError when not even one row fits.
    """
    transformer = _transformer(objective)
    device = transformer.embedding.weight.device
    if device.type != "cuda":
        most = plan.micro_batch or _host_rows(transformer.config, plan)
        return Choices(_even(rows, most), bool(plan.compile), bool(plan.checkpoint_activations))
    context = plan.context or transformer.config.context
    alone = ranks.alone(objective)
    if alone is None:
        return _planned(transformer, plan, rows, ranks)

    def least(number: int) -> int:
        return int(ranks.least(torch.tensor(number, device=device)))

    saving = bool(plan.checkpoint_activations)
    apart = plan.mask_documents
    micro = least(plan.micro_batch or _largest(alone, rows, saving, apart, context))
    if not micro and plan.checkpoint_activations is None:
        saving = True
        micro = least(plan.micro_batch or _largest(alone, rows, saving, apart, context))
    if not micro:
        raise _no_room()
    micro = _even(rows, micro)
    compiled = plan.compile if plan.compile is not None else _compiling_pays(alone, micro, saving, apart, context)
    return Choices(micro, bool(least(int(compiled))), saving)


def _host_rows(config: ModelConfig, plan: Plan) -> int:
    """Rows at a time on a CPU: as many as keep it busy, if half of the memory that is free has room for them."""
    context = plan.context or config.context
    rows = max(1, _CPU_TOKENS // context)
    free = runtime.free_memory_bytes()
    if free is None:
        return rows
    saving = bool(plan.checkpoint_activations)
    each = saved_bytes(config, context, _dtype(plan), checkpoint=saving)
    # What attention in blocks keeps beyond that (core/attention.py): half of the patterns.
    patterns = config.heads * context**2 * plan.dtype.itemsize // 2
    each += patterns * (1 if saving else config.layers)
    return max(1, min(rows, free // 2 // each))


def _dtype(plan: Plan) -> Dtype:
    return "float32" if plan.dtype is torch.float32 else "bfloat16"


def _planned(transformer: Transformer, plan: Plan, rows: int, ranks: Ranks) -> Choices:
    """What ``spec.plan`` says of ranks that each hold a part; compiled only where the plan says so."""
    config = transformer.config
    answer = plan_training(
        config,
        ranks=ranks.count,
        card_bytes=runtime.memory_bytes(ranks.device),
        batch_tokens=rows * ranks.count * (plan.context or config.context),
        micro_batch_rows=plan.micro_batch,
        optimizer=plan.optimizer,
        dtype=_dtype(plan),
        parallel="fsdp",
        checkpoint_activations=plan.checkpoint_activations,
        context=plan.context,
    )
    # Cards may differ. A micro-batch that was asked for is tried, whatever paper says.
    fits = plan.micro_batch is not None or answer.fits is not False
    told = torch.tensor([answer.micro_batch_rows, -int(answer.checkpoint_activations), int(fits)], device=ranks.device)
    micro, not_saving, fit = ranks.least(told).tolist()
    if not fit:
        raise _no_room()
    return Choices(_even(rows, micro), bool(plan.compile), bool(not_saving))


def _no_room() -> ResourceError:
    return ResourceError(
        "not even one row of the context fits in the memory of the device",
        "use a smaller --context or model, or more ranks; --plan says what fits",
    )


def apply(transformer: Transformer, choices: Choices) -> None:
    """Set a model up as was chosen. Blocks are compiled one by one: all have the same code, compiled once."""
    for block in transformer.blocks:
        _checkpointed(block, choices.checkpoint_activations)
        if choices.compile:
            block.compile()


def _checkpointed(block: nn.Module, saving: bool) -> None:
    """Whether a block keeps its activations for the backward pass, or makes them again from what went in."""
    if saving:
        # A method of ours: what stands in one of torch's files, as a partial of ``checkpoint`` does, is not compiled.
        block.forward = _forward_again.__get__(block)
    else:
        vars(block).pop("forward", None)


def _forward_again(block: nn.Module, *inputs: Any) -> Any:
    # Nothing is drawn at random within a block, so there is no state of a generator to keep.
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _transformer(objective: nn.Module) -> Transformer:
    return next(module for module in objective.modules() if isinstance(module, Transformer))


def _even(rows: int, most: int) -> int:
    """The largest part of ``rows`` up to ``most`` that splits them evenly, or nearly."""
    return -(-rows // -(-rows // min(most, rows)))


def uncompiled(choices: Choices) -> AbstractContextManager[Any]:
    """Around what compiled blocks are not for: sampling, whose shapes are others at every token."""
    return torch.compiler.set_stance("force_eager") if choices.compile else contextlib.nullcontext()


def _largest(objective: nn.Module, rows: int, saving: bool, apart: bool = False, context: int | None = None) -> int:
    """The most rows whose forward and backward pass fits; 0 if not even one does. ``apart`` masks documents."""
    transformer = _transformer(objective)
    for block in transformer.blocks:
        _checkpointed(block, saving)
    tried = rows
    while True:
        spare = None
        try:
            spare = _spare(transformer.embedding.weight.device)
            # Where there are several parts to a step, the second is beside the gradients of the first.
            for _ in range(1 if tried == rows else 2):
                _pass(objective, tried, apart, context)
            return tried
        except torch.OutOfMemoryError:
            if tried == 1:
                return 0
            tried = -(-tried // 2)
        finally:
            del spare
            objective.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def _spare(device: torch.device) -> Tensor | None:
    """A twentieth of a card's memory, held while the rest is tried."""
    size = runtime.memory_bytes(device)
    return None if size is None else torch.empty(size // 20, dtype=torch.uint8, device=device)


def _pass(objective: nn.Module, rows: int, apart: bool, context: int | None = None) -> None:
    transformer = _transformer(objective)
    config, device = transformer.config, transformer.embedding.weight.device
    ids = torch.zeros((rows, context or config.context), dtype=torch.int64, device=device)
    loss: Tensor = objective(ids, ids, ids.int() if apart else None)
    loss.backward()
    torch.cuda.synchronize(device)


def _compiling_pays(
    objective: nn.Module, rows: int, saving: bool, apart: bool = False, context: int | None = None
) -> bool:
    """Whether compiled blocks are at least a twentieth faster; no, where the compiler is missing or fails."""
    transformer = _transformer(objective)

    def seconds() -> float:
        _pass(objective, rows, apart, context)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            _pass(objective, rows, apart, context)
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that the device can do: of a known GPU by its data sheet, else measured."""
    return runtime.sheet_flops(device, dtype) or runtime.measured_flops(device, dtype)
