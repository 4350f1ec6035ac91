"""The talk of ``gptcli train``: a live picture on a terminal, lines off one, NDJSON if asked for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from gptcli.cli.metrics import Event
from gptcli.cli.out import Output
from gptcli.cli.train_picture import TrainPicture, clock, shown

_LINE_EVERY_SECONDS = 10.0
_MOST_SAMPLE = 300


class TrainView:
    """Shows the events of a run, one by one; a context manager.

    ``history`` are the events of the run's earlier parts (``metrics.read_events``), so that its curve goes on. At the
    end a picture leaves a summary in the scrollback, and the folder's name goes to stdout, unless something was raised.
    """

    def __init__(
        self,
        said: Output,
        out: Path,
        history: Iterable[Event] = (),
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.said, self.out = said, out
        self.saved = False  # whether this part of the run has saved something
        self._now = now
        self._told: float | None = None
        self._drawn = False
        self._stack = contextlib.ExitStack()
        unicode = os.environ.get("TERM") != "linux"  # the kernel's console has no braille
        self.picture = TrainPicture(out.resolve().name or str(out), unicode=unicode, clock=now)
        self.picture.recall(history)

    def __enter__(self) -> TrainView:
        self._drawn = self._stack.enter_context(self.said.live(self.picture))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._drawn and self.picture.step is not None:
            self.picture.ended = "done" if kind is None else "stopped"
            self._summary()
        if kind is None and not self.said.json:
            self.said.data(str(self.out))

    def show(self, event: Event) -> None:
        """Take in one event."""
        self.picture.show(event)
        self.saved |= event["event"] == "save"
        if self.said.json:
            self.said.record(event)
        elif event["event"] == "rollback":
            scale = f", the learning rate times {event['lr_scale']:g}" if event.get("lr_scale") is not None else ""
            self.said.warn(
                f"step {event['step']:,}: too many steps were not finite; back to step {event['to_step']:,}{scale}"
            )
        elif not self._drawn and (line := self._line(event)):
            self.said.note(line)

    def _summary(self) -> None:
        console = self.said.console(stderr=True)
        for line in self.picture.frame(console, min(console.width, 120), 32):
            console.print(line, soft_wrap=True)

    def _line(self, event: Event) -> str:
        """What is said of an event where there is no picture; "" for nothing."""
        kind = event["event"]
        if kind == "step":
            return self._step_line(event)
        if kind == "start":
            asked = [event["device"], event["dtype"], *([event["optimizer"]] if event.get("optimizer") else [])]
            asked.append(f"{event['batch_tokens']:,} tokens a step")
            if (event.get("ranks") or 1) > 1:
                asked.append(f"{event['ranks']} ranks ({event.get('parallel')})")
            at = f"on from step {event['step']:,}: " if event.get("resumed") else ""
            return f"{at}{event['parameters']:,} parameters, {', '.join(asked)}"
        if kind == "eval":
            parts = "  ".join(f"{name} {shown(bits)}" for name, bits in event["valid"].items())
            best, bits = event.get("best"), event["bits_per_byte"]
            told = f"  (best {best:.4f})" if best is not None and (bits is None or best < bits) else ""
            return f"step {event['step']:,}: bits per byte {parts}{told}"
        if kind == "sample":
            text = " ".join((event["prompt"] + event["text"]).split())
            return f"step {event['step']:,}: sample: {text[:_MOST_SAMPLE]}{'…' if len(text) > _MOST_SAMPLE else ''}"
        if kind == "save":
            return f"step {event['step']:,}: saved"
        if kind == "done":
            skipped = f", {event['skipped']} steps skipped" if event["skipped"] else ""
            return f"{event['tokens']:,} tokens in {event['seconds']:,.0f} s{skipped}"
        return ""

    def _step_line(self, event: Event) -> str:
        now = self._now()
        if self._told is not None and now - self._told < _LINE_EVERY_SECONDS:
            return ""
        self._told = now
        loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
        used = "" if event.get("utilization") is None else f"  {100 * event['utilization']:.0f} % used"
        left = self.picture.seconds_left
        to_go = "" if left is None else f"  {clock(left)} left"
        rate = f"{event['tokens_per_second']:,.0f} tokens/s"
        return f"step {self.picture.steps}  loss {loss}  lr {event['lr']:.2e}  {rate}{used}{to_go}"
