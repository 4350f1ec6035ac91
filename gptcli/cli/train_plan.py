"""The card of ``gptcli train --plan``: what each rank would hold, and whether it fits."""

from __future__ import annotations

from gptcli.cli.out import Output, harmless
from gptcli.spec.plan import TrainingPlan

_WAYS = {
    "none": "on one card",
    "ddp": "a whole copy on each (DDP)",
    "fsdp": "weights, gradients and optimizer sharded (FSDP)",
}
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
_BAR = 20


def show_plan(said: Output, plan: TrainingPlan, title: str = "") -> None:
    """Show a plan on stdout, as a card or as one JSON object; ``title`` names the model. It fitting or not is data."""
    if said.json:
        said.record({"model": title or None, **plan.to_dict()})
    else:
        said.data(_as_card(said, plan, title or plan.config.family))


def _as_card(said: Output, plan: TrainingPlan, title: str) -> str:
    config, rank = plan.config, plan.rank
    checkpointing = "on" if plan.checkpoint_activations else "off"
    lines = [
        said.style(harmless(title), "bold")
        + f"  {plan.parameters:,} parameters: {config.layers} layers, width {config.width:,}, "
        f"vocabulary {config.vocab_size:,}, context {plan.context:,}",
        f"{_cards(plan.ranks, plan.card_bytes)}: {_WAYS[plan.parallel]}",
        f"{_OPTIMIZERS[plan.optimizer]}, {plan.dtype}, activation checkpointing {checkpointing}",
        f"{plan.batch_tokens:,} tokens a step: micro-batch of {_count(plan.micro_batch_rows, 'row')} on each card, "
        f"accumulated {_count(plan.accumulate, 'time')}; {plan.flops_per_token * plan.batch_tokens:.3g} FLOPs",
        "",
        said.style("Each rank holds", "bold"),
    ]
    rows = [
        ("Weights", rank.weights),
        ("Gradients", rank.gradients),
        ("Optimizer", rank.optimizer),
        ("Activations", rank.activations),
        ("Logits", rank.logits),
        ("Gathered" if plan.parallel == "fsdp" else "Copies", rank.gathered),
        ("Overhead", rank.overhead),
    ]
    digits = max(len(_gigabytes(size)) for size in (rank.total, plan.card_bytes or 0))
    label = max(len(name) for name, _ in rows)
    largest = max(plan.card_bytes or 0, rank.total)
    for name, size in rows:
        bar = "█" * round(size / largest * _BAR) if said.on_terminal else ""
        lines.append(f"  {name:<{label}}  {_gigabytes(size):>{digits}}  {bar}".rstrip())
    lines.append("  " + said.style("-" * (label + 2 + digits), "dim"))
    lines.append("  " + said.style(f"{'Total':<{label}}  {_gigabytes(rank.total):>{digits}}", "bold"))
    if plan.card_bytes is not None:
        lines.append(f"  {'Card':<{label}}  {_gigabytes(plan.card_bytes):>{digits}}")
        lines += ["", *_verdict(said, plan)]
    return "\n".join(lines)


def _verdict(said: Output, plan: TrainingPlan) -> list[str]:
    spare = plan.spare_bytes or 0
    if spare >= 0:
        return [said.style("It fits", "bold") + f", with {_gigabytes(spare)} to spare."]
    lines = [said.style("It does not fit", "bold") + f": {_gigabytes(-spare)} too much on each card."]
    least = "fully sharded, activation checkpointing on, one row at a time"
    if plan.least_ranks is None:
        lines.append("More cards of this size would not help: one block and its activations are too large for one.")
    elif plan.least_ranks <= plan.ranks:
        lines.append(f"It would fit on {_cards(plan.least_ranks, plan.card_bytes)}, {least}.")
    else:
        lines.append(f"It takes at least {_cards(plan.least_ranks, plan.card_bytes)}, {least}.")
    return lines


def _cards(count: int, size: int | None) -> str:
    cards = _count(count, "card")
    return cards if size is None else f"{cards} of {size / 1e9:,.6g} GB"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
