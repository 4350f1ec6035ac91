"""``gptcli bench``: how fast a model is on this machine, beside what the machine would allow."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output
from gptcli.errors import GptcliError, LimitError, ResourceError, UsageError

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.measure import Figure, Machine

PARTS = ("load", "prefill", "decode", "train", "tokenize")
_PREFILL, _DECODE, _TOKENS = 512, 32, 128  # tokens, where the context has room for them
_MOST_ROWS = 4096


def bench(
    ctx: typer.Context,
    model: options.Model = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PART[,PART...]", help=f"Of {', '.join(PARTS)}.")
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            "--prompt", metavar="N", help="Tokens of the prompt; by default 512 to prefill, 32 to decode from."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", help="Tokens to decode, 2 or more; by default 128.")
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="N[,N...]", help="Rows decoded together.")] = "1,8,32",
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often each thing is measured.")] = 5,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = "none",
    threads: options.Threads = None,
    offline: options.Offline = False,
) -> None:
    """Measure this machine with a model.

    Loading, a prompt, decoding, a training step, tokenizing: the median of some rounds, with the least and the most,
    beside the limit that memory and arithmetic set, measured in the same run.
    """
    out: Output = ctx.obj
    parts = _parts(only)
    sizes = _batches(batch)
    options.choice("--quantize", quantize, options.QUANTIZE)
    for name, value, least in (("--prompt", prompt, 1), ("--tokens", tokens, 2), ("--rounds", rounds, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is out of range", f"it should be {least} or more")

    from gptcli.cli.opening import find, open_for_inference

    loaded = open_for_inference(model, out, device=device, dtype=dtype, quantize=quantize, threads=threads)
    work = _Work(out, loaded, find(model).folder, rounds)
    work.plan(parts, sizes, prompt, tokens)
    work.measure(asked=only is not None)


def _parts(only: str | None) -> list[str]:
    if only is None:
        return list(PARTS)
    given = [word.strip() for word in only.split(",")]
    for word in given:
        options.choice("--only", word, PARTS)
    return [part for part in PARTS if part in given]


def _batches(given: str) -> list[int]:
    words = [word.strip() for word in given.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 6 and 1 <= int(word) <= _MOST_ROWS):
            raise UsageError(f"--batch {word!r} is no number of rows", f"for instance 1,8,32; at most {_MOST_ROWS:,}")
    return list(dict.fromkeys(map(int, words)))


class _Work:
    """What is to be measured with one model, and what has been."""

    def __init__(self, out: Output, model: Model, folder: Any, rounds: int) -> None:
        self.out, self.model, self.folder, self.rounds = out, model, folder, rounds
        self.jobs: list[
            tuple[str, str, Callable[[], Figure]]
        ] = []  # part, what it is called on the way, how it is done
        self.figures: list[Figure] = []
        self.left_out: list[tuple[str, GptcliError]] = []
        self.machine: Machine | None = None

    def plan(self, parts: list[str], batches: list[int], prompt: int | None, tokens: int | None) -> None:
        """Raises LimitError for a prompt and tokens beyond the context."""
        from gptcli.core import measure

        model, rounds, context = self.model, self.rounds, self.model.config.context
        prefill = min(_PREFILL, context) if prompt is None else prompt
        before = min(_DECODE, max(1, context // 2)) if prompt is None else prompt
        made = min(_TOKENS, max(2, context - before)) if tokens is None else tokens
        longest = max([prefill] * ("prefill" in parts) + [before + made] * ("decode" in parts), default=0)
        if longest > context:
            raise LimitError(
                f"{longest:,} tokens are asked for, and the context of {model.name} is {context:,}",
                "give a smaller --prompt or --tokens",
            )
        if "load" in parts:
            self._add("load", "load", partial(measure.measure_load, self.folder, model, rounds))
        if "prefill" in parts:
            self._add("prefill", f"prefill {prefill}", partial(measure.measure_prefill, model, prefill, rounds))
        for size in batches if "decode" in parts else []:
            told = f"decode {before} + {made}, batch {size}"
            self._add("decode", told, partial(measure.measure_decode, model, size, before, made, rounds))
        if "train" in parts:
            self._add("train", "train", self._train)
        if "tokenize" in parts:
            self._add("tokenize", "tokenize", partial(measure.measure_tokenize, model.tokenizer, rounds))

    def _add(self, part: str, told: str, job: Callable[[], Figure]) -> None:
        self.jobs.append((part, told, job))

    def _train(self) -> Figure:
        from gptcli.train.measure import measure_train

        return measure_train(self.folder, self.model.tokenizer, self.model.device, self.model.dtype, self.rounds)

    def measure(self, *, asked: bool) -> None:
        """Do what was planned; Ctrl-C keeps what is done. A part that memory is too small for is left out, and told.

        Raises ResourceError for it where the parts were ``asked`` for.
        """
        from gptcli.core.measure import measure_machine

        def look_at_machine() -> None:
            found = measure_machine(self.model.device, self.model.dtype)
            self.machine = found if self.machine is None else self.machine.better_of(found)

        try:
            with self._progress() as tell:
                tell("the machine")
                look_at_machine()
                for part, told, job in self.jobs:
                    tell(told)
                    try:
                        self.figures.append(job())
                    except ResourceError as error:
                        if asked:
                            raise
                        self.left_out.append((part, error))
                        self.out.note(f"{part} is left out: {error.message}")
                tell("the machine")
                look_at_machine()
        finally:
            if self.machine is not None and self.figures:
                self._show(self.machine)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[str], None]]:
        """Tells what is measured now: on a terminal beside a bar, elsewhere to who asked for detail."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

        columns = (TextColumn("measuring {task.description}"), BarColumn(), MofNCompleteColumn())
        with self.out.progress(columns) as progress:
            task = progress.add_task("", total=len(self.jobs) + 2)
            begun = 0

            def tell(name: str) -> None:
                nonlocal begun
                progress.update(task, description=name, completed=begun)
                self.out.detail(f"measuring {name}")
                begun += 1

            yield tell

    def _show(self, machine: Machine) -> None:
        from gptcli.cli import bench_view

        if not self.out.json:
            for line in bench_view.lines(self.model, machine, self.figures, self.out):
                self.out.data(line)
        if self.out.json or not self.out.on_terminal:  # in a log both are wanted
            self.out.record(self._record(machine))

    def _record(self, machine: Machine) -> dict[str, Any]:
        from gptcli import __version__
        from gptcli.core import runtime
        from gptcli.core.measure import weight_bytes

        model = self.model
        return {
            "model": model.name,
            "parameters": sum(parameter.numel() for parameter in model.transformer.parameters()),
            "weights_bytes": weight_bytes(model.transformer),
            **model.used,
            "device_name": runtime.device_name(model.device),
            "threads": runtime.threads(),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            "versions": {"gptcli": __version__, "torch": runtime.torch_version()},
            "machine": {
                "bytes_per_second": machine.bytes_per_second,
                "flops_per_second": machine.flops_per_second,
                "flops_dtype": machine.flops_dtype,
            },
            "figures": [_figure(figure, machine) for figure in self.figures],
            "left_out": [{"part": part, "why": error.message} for part, error in self.left_out],
        }


def _figure(figure: Figure, machine: Machine) -> dict[str, Any]:
    least, by = figure.limit(machine)
    middle, fastest, slowest = figure.summary()
    rates = {"tokens_per_second": figure.tokens, "bytes_per_second": figure.data_bytes}
    return {
        "part": figure.part,
        **figure.settings,
        "rounds": len(figure.seconds),
        "seconds": {"median": middle, "least": fastest, "most": slowest},
        **{
            name: {"median": number / middle, "least": number / slowest, "most": number / fastest}
            for name, number in rates.items()
            if number is not None
        },
        "bytes": figure.moved_bytes or figure.data_bytes,
        "flops": figure.flops or None,
        "limit": by,
        "limit_seconds": least,
        "fraction": least / middle,
    }
