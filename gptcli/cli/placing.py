"""``--plan``: what each card would hold of a model, before any of it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.out import Output, harmless
from gptcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from gptcli.cli.table import Table
    from gptcli.spec.placing import Placing

Plan = Annotated[bool, typer.Option("--plan", help="Only say what each card would hold, and whether it fits.")]
Gpus = Annotated[
    str | None,
    typer.Option("--gpus", metavar="CARDS", help="With --plan: cards and their memory, as 8x141GB; this machine's."),
]


def asked(ctx: typer.Context, plan: bool) -> bool:
    """Whether only the plan is wanted. Raises UsageError for cards that were typed without it."""
    if not plan and options.strength(ctx, "gpus") == options.TYPED:
        raise UsageError("--gpus goes with --plan", "say --plan too, or leave --gpus out")
    return plan


def show_placing(
    out: Output,
    name: str,
    gpus: str | None,
    *,
    tp: int | None = None,
    offload: bool = False,
    dtype: str = "auto",
    quantize: str = "none",
    context: int | None = None,
    sequences: int = 1,
) -> None:
    """Show where a model's tensors would be. Raises ResourceError (5) when it is shown and does not fit."""
    from gptcli.cli.count_open import only_config
    from gptcli.cli.units import byte_text
    from gptcli.spec.memory import check_use
    from gptcli.spec.placing import plan_placing, storage_of
    from gptcli.spec.plan import parse_cards

    if offload and quantize != "none":
        raise UsageError("--offload keeps the weights as they are", "leave out --quantize, or --offload")
    counted = only_config(name, out)
    config = counted.config
    cards, card_bytes = parse_cards(gpus) if gpus else _own_cards()
    use: dict[str, Any] = {"context": check_use(config, context, sequences), "sequences": sequences}

    def placed(quantize: str, tp: int | None, offload: bool) -> Placing:
        storage = storage_of(dtype, quantize, config.dtype)
        return plan_placing(config, storage, cards=cards, card_bytes=card_bytes, tp=tp, offload=offload, **use)

    plan = placed(quantize, tp, offload)
    if out.json:
        out.record({"model": counted.title, **plan.to_dict()})
    else:
        out.data("\n".join(_lines(out, counted.title, plan)))
    if plan.fits is False:
        ways = [f"--quantize {bits}" for bits in ("int8", "int4") if not offload and placed(bits, tp, False).fits][:1]
        ways += ["--offload"] if not offload and (tp or 1) == 1 and placed("none", 1, True).fits else []
        ways += [f"--tp {plan.fewest} on {plan.fewest} such cards"] if plan.fewest else []
        missing = byte_text(plan.fullest.total - (plan.card_bytes or 0), 2)
        hint = f"use {', or '.join(ways)}" if ways else "use larger cards"
        raise ResourceError(f"{counted.title} does not fit: {missing} too much on a card", hint)


def _own_cards() -> tuple[int, int | None]:
    """This machine's GPUs, or its memory."""
    from gptcli.core import runtime

    return runtime.cards()


def _lines(out: Output, title: str, plan: Placing) -> list[str]:
    from gptcli.cli.table import as_text
    from gptcli.cli.units import byte_text

    cards = f"{plan.cards:,} card{'' if plan.cards == 1 else 's'}"
    if plan.card_bytes is not None:
        cards += f" of {plan.card_bytes / 1e9:,.6g} GB"
    way = "layers on the host" if plan.offload else f"dealt out over {plan.tp}" if plan.tp > 1 else "on one"
    texts = f"{plan.sequences:,} sequence{'' if plan.sequences == 1 else 's'} of {plan.context:,} tokens"
    lines = [out.style(harmless(title), "bold") + f"  {plan.storage}, {cards}: {way}; {texts}", ""]
    lines += as_text(_ranks_table(plan), out)
    lines += ["", *as_text(_tensors_table(plan), out)]
    if plan.fits:
        spare = byte_text((plan.card_bytes or 0) - plan.fullest.total, 2)
        lines += ["", out.style("It fits", "bold") + f", with {spare} to spare on the fullest card."]
    return lines


def _ranks_table(plan: Placing) -> Table:
    """Ranks that hold the same stand in one row."""
    from gptcli.cli.table import Column, Table
    from gptcli.cli.units import byte_text

    groups: list[list[int]] = []
    for rank, held in enumerate(plan.ranks):
        if groups and plan.ranks[groups[-1][0]] == held:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    rows = []
    for group in groups:
        held = plan.ranks[group[0]]
        name = f"rank {group[0]}" if len(group) == 1 else f"ranks {group[0]}-{group[-1]}"
        sizes = (held.weights, held.kv_cache, held.workspace, held.overhead, held.total)
        fits = "" if plan.card_bytes is None else "yes" if held.total <= plan.card_bytes else "no"
        rows.append((name, *(byte_text(size, 2) for size in sizes), fits))
    columns = (
        *(Column("", right=False), Column("weights"), Column("KV cache"), Column("workspace", keep=1)),
        *(Column("overhead", keep=2), Column("together"), Column("fits")),
    )
    notes = (f"On the host: {byte_text(plan.host_bytes, 2)}, all of it moved for every step.",) if plan.offload else ()
    return Table(columns, tuple(rows), "Each card holds", notes)


def _tensors_table(plan: Placing) -> Table:
    from gptcli.cli.table import Column, Table
    from gptcli.cli.units import byte_text

    rows = tuple(
        (each.name, f"{each.count:,}", _shape(each.whole), _shape(each.part), each.how, byte_text(each.bytes, 2))
        for each in plan.tensors
    )
    columns = (
        *(Column("", right=False), Column("tensors", keep=2), Column("shape", keep=1), Column("here")),
        *(Column("dealt out", right=False, keep=3), Column("bytes")),
    )
    return Table(columns, rows, "What is on rank 0" if plan.tp > 1 else "What is where")


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
