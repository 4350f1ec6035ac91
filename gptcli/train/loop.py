"""The training loop: an iterator of events, with the model folder as its only side effect."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.core.checkpoint import save_folder
from gptcli.core.model import Transformer
from gptcli.errors import UsageError
from gptcli.train.data import Batches, Corpus
from gptcli.train.optim import learning_rate, make_adamw

# Logits of one forward pass take at most this much memory, gradients not counted; more rows are accumulated.
_LOGIT_BYTES = 1 << 29


@dataclass(frozen=True)
class Plan:
    """How to train. Of ``steps`` and ``minutes`` one is set; ``lr`` is the peak; every N steps, 0 is never."""

    batch_tokens: int = 8192
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    clip: float = 1.0
    steps: int | None = None
    minutes: float | None = None
    eval_every: int = 250
    save_every: int = 1000
    seed: int = 0
    dtype: torch.dtype = torch.float32
    save_dtype: torch.dtype = torch.float32
    compile: bool = False


Event = dict[str, Any]


def train(
    model: Transformer, corpus: Corpus, valid: Sequence[Corpus], plan: Plan, out: Path, files: Mapping[str, bytes]
) -> Iterator[Event]:
    """Train ``model`` in place and save it in ``out``.

    Yields events: ``start``, a ``step`` for each step (loss in nats a token, before the update), ``eval`` (bits per
    byte), ``save``, ``done``. Each is also a line of ``out/metrics.jsonl``. A step whose gradient is not finite is
    skipped and counted. Closing the iterator leaves the last save; Ctrl-C (within a step, or thrown into
    it) saves first.

    Raises UsageError when the data is too small, OutputError when ``out`` can't be written.
    """
    run = _Run(model, corpus, valid, plan, out, files)
    with (out / "metrics.jsonl").open("w") as metrics:
        yield from run.events(metrics)


class _Run:
    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        valid: Sequence[Corpus],
        plan: Plan,
        out: Path,
        files: Mapping[str, bytes],
    ) -> None:
        if (plan.steps is None) == (plan.minutes is None):
            raise UsageError("the length of training is not clear", "give either steps or minutes")
        config = model.config
        self.model, self.corpus, self.valid, self.plan, self.out, self.files = model, corpus, valid, plan, out, files
        self.device = model.embedding.weight.device
        rows = max(1, round(plan.batch_tokens / config.context))
        most = max(1, _LOGIT_BYTES // (4 * config.context * config.vocab_size))
        self.micro = -(-rows // -(-rows // most))  # as even as it goes
        self.rows = rows
        self.batches = Batches(corpus, rows, config.context, plan.seed)
        self.optimizer = make_adamw(model, plan.lr, plan.weight_decay)
        self.forward: Any = torch.compile(model) if plan.compile else model
        self.skipped = 0
        self.best: float | None = None
        self.began = time.perf_counter()

    def events(self, metrics: TextIO) -> Iterator[Event]:
        step = 0
        try:
            for event in self._steps():
                step = event.get("step", 0)
                yield _told(event, metrics)
        except KeyboardInterrupt:
            if step:
                yield _told(self._save(step), metrics)
            raise

    def _steps(self) -> Iterator[Event]:
        plan, config = self.plan, self.model.config
        yield {
            "event": "start",
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "config": config.to_dict(),
            "train_tokens": len(self.corpus.tokens),
            "train_bytes": self.corpus.text_bytes,
            "batch_tokens": self.rows * config.context,
            "steps": plan.steps,
            "minutes": plan.minutes,
            "seed": plan.seed,
            "device": str(self.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
        }
        self.began = time.perf_counter()
        step, last = 0, False
        while not last:
            yield self._step(step)
            step += 1
            last = self._progress(step) >= 1.0  # asked once: by the clock, a later answer may differ
            if self.valid and (last or (plan.eval_every and step % plan.eval_every == 0)):
                yield self._evaluate(step)
            if last or (plan.save_every and step % plan.save_every == 0):
                yield self._save(step)
        yield {
            "event": "done",
            "step": step,
            "tokens": step * self.rows * config.context,
            "seconds": time.perf_counter() - self.began,
            "skipped": self.skipped,
            "bits_per_byte": self.best,
        }

    def _save(self, step: int) -> Event:
        save_folder(self.model, self.out, dtype=self.plan.save_dtype, files=self.files)
        return {"event": "save", "step": step, "path": str(self.out)}

    def _progress(self, step: int) -> float:
        if self.plan.steps is not None:
            return step / self.plan.steps
        return (time.perf_counter() - self.began) / (60 * (self.plan.minutes or 1))

    def _step(self, step: int) -> Event:
        start = time.perf_counter()
        lr = learning_rate(self.plan.lr, max(self._progress(step), 1e-4), self.plan.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = self.batches.at(step)
        ids, targets = (torch.from_numpy(array).to(self.device) for array in (batch.ids, batch.targets))
        total = torch.zeros((), device=self.device)
        self.model.train()
        for first in range(0, self.rows, self.micro):
            part = slice(first, first + self.micro)
            loss = self._loss(self.forward, ids[part], targets[part]) / targets.numel()
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        else:
            self.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return {
            "event": "step",
            "step": step + 1,
            "tokens": (step + 1) * targets.numel(),
            "loss": _number(total.item()),
            "lr": lr,
            "grad_norm": _number(norm.item()),
            "tokens_per_second": targets.numel() / seconds,
            "seconds": time.perf_counter() - self.began,
            "progress": min(1.0, self._progress(step + 1)),
        }

    def _loss(self, forward: Any, ids: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy in nats."""
        with torch.autocast(self.device.type, self.plan.dtype, enabled=self.plan.dtype is not torch.float32):
            logits = forward(ids)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def _evaluate(self, step: int) -> Event:
        self.model.eval()
        by_name = {}
        nats = size = tokens = 0.0
        for corpus in self.valid:
            # Not the compiled model: its last window has a shape of its own, and would be compiled for that.
            loss = partial(self._loss, self.model)
            total, count = corpus_nats(loss, corpus, self.model.config.context, self.micro, self.device)
            by_name[corpus.name] = total / math.log(2) / corpus.text_bytes
            nats, size, tokens = nats + total, size + corpus.text_bytes, tokens + count
        bits = nats / math.log(2) / size
        self.best = bits if self.best is None else min(bits, self.best)
        return {"event": "eval", "step": step, "loss": nats / tokens, "bits_per_byte": bits, "valid": by_name}


def corpus_nats(loss: Any, corpus: Corpus, context: int, rows: int, device: torch.device) -> tuple[float, int]:
    """Total cross entropy (nats) of a corpus, every token but the first predicted once, in windows side by side.

    Returns ``(nats, tokens scored)``. A window knows nothing of the one before, so this is an upper bound of what the
    model can do.
    """
    stream = torch.from_numpy(corpus.tokens[:].astype("int64"))
    whole = (len(stream) - 1) // context
    total = 0.0
    for first in range(0, whole, rows):
        last = min(first + rows, whole)
        part = stream[first * context : last * context + 1]
        ids, targets = part[:-1].view(-1, context), part[1:].view(-1, context)  # [B, T]
        total += loss(ids.to(device), targets.to(device)).item()
    rest = stream[whole * context :]
    if len(rest) > 1:
        total += loss(rest[None, :-1].to(device), rest[None, 1:].to(device)).item()
    return total, len(stream) - 1


def _told(event: Event, metrics: TextIO) -> Event:
    metrics.write(json.dumps(event) + "\n")
    metrics.flush()
    return event


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
