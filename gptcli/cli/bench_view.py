"""How ``gptcli bench`` shows what it measured: a table, the same on a terminal and in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptcli.cli.out import Output
from gptcli.cli.table import Column, Table, as_text
from gptcli.cli.units import byte_text, scaled

if TYPE_CHECKING:
    from gptcli.core.build import Model
    from gptcli.core.measure import Figure, Machine

_COLUMNS = (
    Column("", right=False),
    Column("median"),
    Column("least", keep=1),
    Column("most", keep=2),
    Column("limit", keep=4),
    Column("of it"),
    Column("set by", right=False, keep=3),
)


def lines(model: Model, machine: Machine, figures: Sequence[Figure], out: Output) -> list[str]:
    """The machine, then a row a figure: rates, the limit, and the part of it that was reached."""
    from gptcli.core import runtime

    threads = f", {runtime.threads()} threads" if model.device.type == "cpu" else ""
    title = f"{model.name} on {runtime.device_name(model.device)} in {model.dtype_name}{threads}"
    allows = (
        f"the machine: memory {byte_text(machine.bytes_per_second)}/s, "
        f"products in {machine.flops_dtype} {scaled(machine.flops_per_second, 'FLOP/s', 1)}"
    )
    rows = tuple(_row(figure, machine) for figure in figures)
    return as_text(Table(_COLUMNS, rows, title, (allows,)), out)


def _row(figure: Figure, machine: Machine) -> tuple[str, ...]:
    least, by = figure.limit(machine)
    middle, fastest, slowest = figure.summary()
    speeds = [_rate(figure, seconds) for seconds in (middle, slowest, fastest, least)]
    return (_name(figure), *speeds, f"{least / middle:.0%}", by)


def _name(figure: Figure) -> str:
    settings = figure.settings
    if figure.part == "prefill":
        return f"prefill {settings['prompt_tokens']}"
    if figure.part == "decode":
        made = f"{settings['prompt_tokens']} + {settings['new_tokens']}"
        return f"decode {made}" + (f", batch {settings['batch']}" if settings["batch"] > 1 else "")
    if figure.part == "train":
        return f"train {settings['batch_tokens']} a step"
    return figure.part


def _rate(figure: Figure, seconds: float) -> str:
    if figure.data_bytes is not None:
        return f"{byte_text(figure.data_bytes / seconds)}/s"
    rate = (figure.tokens or 0) / seconds
    return f"{rate:,.{0 if rate >= 100 else 1}f} tokens/s"
