"""The training loop: an iterator of events, with the model folder as its only side effect."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.core import runtime
from gptcli.core.files import output_errors
from gptcli.core.model import Transformer
from gptcli.errors import DivergedError, UsageError
from gptcli.spec.flops import flops_per_token
from gptcli.train import fit, state
from gptcli.train.data import IGNORED, Batch, Batches, Corpus
from gptcli.train.evaluate import bits_per_byte
from gptcli.train.log import METRICS, Event, logged, number, undivided
from gptcli.train.loss import Objective
from gptcli.train.optim import Kind, Optimizers, schedule
from gptcli.train.ranks import Part, Ranks
from gptcli.train.state import Checkpoint

# So many steps in a row whose loss or gradient is not finite, and training goes back to the last checkpoint, with this
# much of its learning rate; after so many times, it gives up.
_PATIENCE = 4
_BACK_OFF = 0.5
_MOST_ROLLBACKS = 6


@dataclass(frozen=True)
class Plan:
    """How to train. Of ``steps`` and ``minutes`` one is set; ``lr`` is the peak; every N steps, 0 is never.

    ``micro_batch`` (rows at once), ``compile`` and ``checkpoint_activations`` are found out where they are None.
    ``context`` is tokens a row, up to the model's own, which is what None is: a long one takes memory and examples.
    """

    batch_tokens: int = 8192
    context: int | None = None
    lr: float = 5e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    clip: float = 1.0
    optimizer: Kind = "muon"
    steps: int | None = None
    minutes: float | None = None
    eval_every: int = 250
    save_every: int = 1000
    keep: int = 2
    seed: int = 0
    dtype: torch.dtype = torch.float32
    save_dtype: torch.dtype = torch.float32
    mask_documents: bool = False
    micro_batch: int | None = None
    compile: bool | None = None
    checkpoint_activations: bool | None = None


# Continues a text with the model as it is after a step, for an event ``sample``.
Sampler = Callable[[Transformer, int], Event]


def train(
    model: Transformer,
    corpus: Corpus,
    valid: Sequence[Corpus],
    plan: Plan,
    out: Path,
    files: Mapping[str, bytes],
    *,
    sampler: Sampler | None = None,
    sample_every: int | None = None,
    resume: Checkpoint | None = None,
    options: Mapping[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Event]:
    """Train ``model`` in place and save it in ``out``.

    Yields events: ``start``, a ``step`` for each step (loss in nats a token, before the update), ``eval`` (bits per
    byte), ``sample``, ``save``, ``rollback``, ``done``. Each is also a line of ``out/metrics.jsonl``. A step whose loss
    or gradient is not finite is skipped and counted; after a few in a row training goes back to the last checkpoint
    with a smaller learning rate. Closing the iterator leaves the last save; Ctrl-C (within a step, or thrown into it)
    saves first. Of several ranks, any of which may be told by Ctrl-C or SIGTERM, all save after the same step.

    Args:
        files: what else belongs into the model folder (the tokenizer).
        sampler: called every ``sample_every`` steps, or at each evaluation where that is None.
        resume: where to go on; as if it had never stopped, to the bit on a CPU with the same torch and threads.
            Without it the checkpoints of an earlier run in ``out`` are removed.
        options: kept in each checkpoint, for whoever resumes to compare.
        ranks: the processes that train together; every one of them runs this, and rank 0 writes and has all events.

    Raises UsageError when the data is too small, OutputError when ``out`` can't be written, CorruptError for a
    checkpoint that is not this model's, DivergedError when going back does not help.
    """
    ranks = ranks or Ranks(model.embedding.weight.device)
    run = _Run(model, corpus, valid, plan, out, files, ranks)
    run.sampler, run.sample_every, run.options = sampler, sample_every, dict(options or {})
    if resume is not None:
        run.go_back_to(resume)
        run.resumed = resume
        if ranks.rank == 0:
            state.keep_metrics_until(out / METRICS, resume.step)
    elif ranks.rank == 0:
        state.remove_checkpoints(out)
    file = out / METRICS if ranks.rank == 0 else Path(os.devnull)
    with output_errors(file):
        out.mkdir(parents=True, exist_ok=True)
        # Without a buffer, so that nothing is left to be written when the disk is full.
        opened = file.open("ab" if resume else "wb", buffering=0)
    with opened as metrics:
        yield from run.events(metrics)


class _Run:
    sampler: Sampler | None = None
    sample_every: int | None = None
    options: Mapping[str, Any] = {}
    resumed: Checkpoint | None = None

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        valid: Sequence[Corpus],
        plan: Plan,
        out: Path,
        files: Mapping[str, bytes],
        ranks: Ranks,
    ) -> None:
        if (plan.steps is None) == (plan.minutes is None):
            raise UsageError("the length of training is not clear", "give either steps or minutes")
        config = model.config
        self.model, self.corpus, self.valid, self.plan, self.out, self.files = model, corpus, valid, plan, out, files
        self.ranks = ranks
        self.context = plan.context or config.context
        self.own_rows = max(1, round(plan.batch_tokens / self.context / ranks.count))
        self.rows = self.own_rows * ranks.count
        self.batches = Batches(corpus, self.rows, self.context, plan.seed, mask_documents=plan.mask_documents)
        self.objective = ranks.wrap(Objective(model, plan.dtype))
        self.device = model.embedding.weight.device
        self.optimizers = Optimizers(plan.optimizer, model, plan.lr, plan.weight_decay, ranks)
        # At once, so that trying what fits finds the memory as full as it will be.
        self.optimizers.create_state()
        self.step = self.skipped = self.rollbacks = self.saves = 0
        self.lr_scale = 1.0
        self.best: float | None = None
        self.seconds_before = 0.0  # of the parts before this one
        self.began = time.perf_counter()
        self.clock = 0.0  # of several ranks: what rank 0's showed when they last agreed
        self.stopping = False
        self.untold: Event | None = None  # of a step that is done

    # --- The run as a whole

    def events(self, metrics: FileIO) -> Iterator[Event]:
        with self.ranks.deferring_interrupts():
            try:
                for event in self._events():
                    self.untold = None
                    yield logged(event, metrics)
            except KeyboardInterrupt:
                if self.untold:
                    yield logged(self.untold, metrics)
                # Several ranks have saved before, at a step that they agreed upon; here each may be elsewhere.
                if self.step and self.ranks.count == 1:
                    yield logged(self._save(), metrics)
                raise

    def _events(self) -> Iterator[Event]:
        choices = self._choices()
        yield self._start(choices)
        plan = self.plan
        self.began = time.perf_counter()
        batch = self._batch(self.step)
        failed = 0  # steps in a row
        last = self.step > 0 and self._progress() >= 1.0  # however short the time, one step is made
        while not last:
            event, batch = self._train_step(batch)
            yield event
            if self.stopping:
                yield self._save()
                raise KeyboardInterrupt
            failed = failed + 1 if event["skipped"] else 0
            last = self._progress() >= 1.0  # asked once: by the clock, a later answer may differ
            if failed >= _PATIENCE or (last and failed and not self._is_sound(self.step - failed - 1)):
                yield self._roll_back(failed)
                batch, failed, last = self._batch(self.step), 0, False
                continue
            evaluate = self._is_time(plan.eval_every, last)
            if evaluate and self.valid:
                yield self._evaluate()
            if self.sampler and (evaluate if self.sample_every is None else self._is_time(self.sample_every, last)):
                whole = self.ranks.whole_model(self.model)
                if self.ranks.rank == 0:
                    with fit.uncompiled(choices):
                        told = self.sampler(whole, self.step)
                    yield {"event": "sample", **self._position(), **told}
            # Not what may turn out to be broken, while there is more to come.
            if self._is_time(plan.save_every, last) and (last or not failed):
                yield self._save()
        seconds = self._seconds()
        yield {
            "event": "done",
            **self._position(),
            "seconds": seconds,
            "skipped": self.skipped,
            "bits_per_byte": self.best,
            "tokens_per_second": self._tokens() / max(seconds, 1e-9),
        }

    def _choices(self) -> fit.Choices:
        """Find out, or read from a checkpoint of the like devices, what is chosen by trying; set the model up so."""
        told = self.resumed.state if self.resumed else {}
        here = runtime.device_name(self.device)
        alike = told.get("ranks") == self.ranks.count and told.get("device", here) == here
        known = told["options"].get("choices") if alike else None
        chosen = fit.Choices(**known) if known else fit.choose(self.objective, self.plan, self.own_rows, self.ranks)
        self.options = {**self.options, "choices": chosen.to_dict()}
        fit.apply(self.model, chosen)
        self.micro, self.choices = chosen.micro_batch, chosen
        return chosen

    def _start(self, choices: fit.Choices) -> Event:
        plan, config = self.plan, self.model.config
        self.flops = flops_per_token(config, self.context)
        self.peak = fit.peak_flops(self.device, plan.dtype)
        return {
            "event": "start",
            **self._position(),
            "parameters": sum(self.ranks.part(one).rows * math.prod(one.shape[1:]) for one in self.model.parameters()),
            "config": config.to_dict(),
            "train_tokens": len(self.corpus.tokens),
            "train_bytes": self.corpus.text_bytes,
            "batch_tokens": self.rows * self.context,
            "micro_batch": choices.micro_batch,
            "accumulate": -(-self.own_rows // choices.micro_batch),
            "steps": plan.steps,
            "minutes": plan.minutes,
            "seed": plan.seed,
            "device": str(self.device),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "optimizer": plan.optimizer,
            "compile": choices.compile,
            "checkpoint_activations": choices.checkpoint_activations,
            "ranks": self.ranks.count,
            "parallel": self.ranks.kind,
            "flops_per_token": self.flops,
            "peak_flops_per_second": self.peak,
            "resumed": self.resumed is not None,
        }

    def _position(self) -> Event:
        return {"step": self.step, "tokens": self._tokens()}

    def _tokens(self) -> int:
        return self.step * self.rows * self.context

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _progress(self) -> float:
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        # Several ranks have to come to the same answer.
        seconds = self._seconds() if self.ranks.count == 1 else self.clock
        return seconds / (60 * (self.plan.minutes or 1))

    def _is_time(self, every: int, last: bool) -> bool:
        return last or bool(every and self.step % every == 0)

    # --- One step

    def _batch(self, step: int) -> tuple[Batch, int]:
        """This rank's batch of a step, on the host, and how many tokens the whole batch has to learn.

        Here, once a step, ranks also agree on the time and on whether to stop.
        """
        ranks = self.ranks
        batch = self.batches.at(step, ranks.rank, ranks.count)
        seconds = self._seconds() if ranks.rank == 0 else 0.0
        learnt, self.clock, told = ranks.sums(int((batch.targets != IGNORED).sum()), seconds, int(ranks.interrupted))
        self.stopping = told > 0
        return batch, max(1, int(learnt))

    def _train_step(self, made: tuple[Batch, int]) -> tuple[Event, tuple[Batch, int]]:
        """Train on a batch; returns the event and the next batch, made while the device was at work."""
        start = time.perf_counter()
        batch, learnt = made
        lr_scale = schedule(max(self._progress(), 1e-4), self.plan.warmup) * self.lr_scale
        loss = self._gradients(batch, learnt)
        norm = self._clip()
        following = self._batch(self.step + 1)
        nats, length = loss.item(), norm.item()
        finite = math.isfinite(nats) and math.isfinite(length)
        with undivided():
            if finite:
                self.optimizers.step(lr_scale)
            else:
                self.optimizers.zero_grad()
                self.skipped += 1
            self.step += 1
            tokens = self.rows * self.context
            rate = tokens / (time.perf_counter() - start)
            event = self.untold = {
                "event": "step",
                **self._position(),
                "loss": number(nats),
                "lr": self.plan.lr * lr_scale,
                "grad_norm": number(length),
                "tokens_per_second": rate,
                "seconds": self._seconds(),
                "progress": min(1.0, self._progress()),
                "utilization": rate * self.flops / self.peak / self.ranks.count if self.peak else None,
                "skipped": not finite,
            }
        return event, following

    def _gradients(self, batch: Batch, learnt: int) -> Tensor:
        """Gradients of the mean loss over the whole batch, micro-batch by micro-batch; the mean loss, in nats."""
        self.objective.train()
        total = torch.zeros((), device=self.device)
        for first in range(0, self.own_rows, self.micro):
            part = slice(first, first + self.micro)
            with self.ranks.accumulate(self.objective, last=first + self.micro >= self.own_rows):
                loss = self.objective(*self._on_device(batch, part))
                # What several ranks have is averaged over them, while the loss is a mean over the tokens of all.
                (loss * (self.ranks.count / learnt)).backward()
            total += loss.detach()
        return self.ranks.total(total) / learnt

    def _on_device(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        def moved(array: Any) -> Tensor:
            tensor = torch.from_numpy(array[part])
            if self.device.type != "cuda":
                return tensor
            # What is not contiguous would be copied once more, to where the device has to be waited for.
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)

        return moved(batch.ids), moved(batch.targets), None if batch.documents is None else moved(batch.documents)

    def _clip(self) -> Tensor:
        """Shorten the gradient to length ``clip`` where it is longer; its length before."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        return self.ranks.whole(torch.nn.utils.clip_grad_norm_(parameters, self.plan.clip))

    def _is_sound(self, step: int) -> bool:
        """Whether the loss of an earlier step's batch, which was finite before its update, still is."""
        if step < 0:
            return False
        loss = self._gradients(*self._batch(step))
        self.optimizers.zero_grad()
        return math.isfinite(loss.item())

    # --- Evaluating

    def _evaluate(self) -> Event:
        with fit.uncompiled(self.choices):  # batches of short documents have shapes of their own
            told = bits_per_byte(self.objective, self.valid, self.context, self.micro, self.ranks)
        self.best = min((bits for bits in (told["bits_per_byte"], self.best) if bits is not None), default=None)
        return {"event": "eval", **self._position(), **told, "best": self.best}

    # --- Saving, and going back

    def _save(self) -> Event:
        told = {
            "step": self.step,
            "seconds": self._seconds(),
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "lr_scale": self.lr_scale,
            "best": self.best,
            "options": self.options,
            "ranks": self.ranks.count,
            "device": runtime.device_name(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        # What an earlier run left in the folder is not kept.
        keep = self.plan.keep if self.resumed else min(self.plan.keep, self.saves + 1)
        checkpoint = state.save_checkpoint(self.out, self._parts(), told, self.ranks, keep)
        self.saves += 1
        self.ranks.save_folder(self.model, self.out, self.plan.save_dtype, self.files)
        return {"event": "save", **self._position(), "path": str(self.out), "checkpoint": str(checkpoint)}

    def _parts(self) -> dict[str, Part]:
        """This rank's part of all that a checkpoint holds: parameters and optimizer state."""
        parts = {f"model.{name}": self.ranks.part(tensor.detach()) for name, tensor in self.model.named_parameters()}
        for name, kind, tensor in self.optimizers.tensors():
            parts[f"optimizer.{name}.{kind}"] = self.ranks.part(tensor)
        return parts

    def go_back_to(self, checkpoint: Checkpoint) -> None:
        """Become what the run was when it wrote a checkpoint."""
        state.load_checkpoint(checkpoint, self._parts())
        self.step = checkpoint.step
        told = checkpoint.state
        self.clock = self.seconds_before = told["seconds"]
        self.skipped, self.best = told["skipped"], told["best"]
        self.rollbacks, self.lr_scale = told["rollbacks"], told["lr_scale"]
        self.began = time.perf_counter()

    def _roll_back(self, failed: int) -> Event:
        """After several steps in vain: back to the last checkpoint, with a smaller learning rate."""
        before, seconds, skipped, rollbacks = self._position(), self._seconds(), self.skipped, self.rollbacks + 1
        own = state.checkpoints(self.out) if self.resumed or self.saves else iter(())
        checkpoint = next(own, None)
        if checkpoint is None or rollbacks > _MOST_ROLLBACKS:
            where = "before the first checkpoint" if checkpoint is None else "again and again"
            raise DivergedError(
                f"the loss or its gradient was not finite for {failed} steps in a row, {where} (step {self.step})",
                "start anew with --force and a smaller --lr, or --dtype float32",
            )
        smaller = self.lr_scale * _BACK_OFF
        with undivided():
            self.go_back_to(checkpoint)
            # What happened has happened, though the weights are the old ones.
            self.seconds_before, self.skipped, self.rollbacks, self.lr_scale = seconds, skipped, rollbacks, smaller
            self.began = time.perf_counter()
        return {"event": "rollback", **before, "to_step": self.step, "lr_scale": smaller}
