"""What ``count-params`` says of a model beyond its parameters: memory, FLOPs, and how many cards it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.cli.table import Column, Table
from gptcli.cli.units import byte_text, scaled
from gptcli.spec.cards import fit_inference, fit_training, inference_dict
from gptcli.spec.config import ModelConfig
from gptcli.spec.flops import Flops, count_flops
from gptcli.spec.memory import (
    GROUP,
    OPTIMIZERS,
    STORAGES,
    TRAINED,
    check_use,
    inference_memory,
    training_memory,
)
from gptcli.spec.plan import parse_cards

_OPTIMIZER_NAMES = {"adamw": "AdamW", "muon": "Muon"}
_SPLITS = {"none": "one card", "fsdp": "sharded (FSDP)"}
_STORED = (
    "Quantized are the matrices of the blocks and the unembedding: int8 with a scale a row, int4 with a scale for "
    f"{GROUP} weights. float16 takes what bfloat16 takes."
)


@dataclass(frozen=True)
class Asked:
    """Which of the three are asked for, and of what use: ``cards`` as ``8x80GB``."""

    memory: bool
    flops: bool
    cards: str | None
    context: int | None
    sequences: int

    def __bool__(self) -> bool:
        return self.memory or self.flops or self.cards is not None


def figures(config: ModelConfig, asked: Asked) -> dict[str, Any]:
    """What is asked for, as JSON has it: ``memory``, ``flops``, ``gpus``.

    Raises UsageError for cards that are none and counts below 1, LimitError for a context that the model lacks.
    """
    context = check_use(config, asked.context, asked.sequences)
    found: dict[str, Any] = {}
    if asked.memory:
        found["memory"] = _memory(config, context, asked.sequences)
    if asked.flops:
        found["flops"] = _flops(count_flops(config, context))
    if asked.cards is not None:
        found["gpus"] = _gpus(config, *parse_cards(asked.cards), context, asked.sequences)
    return found


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The same for people."""
    builders = {"memory": _memory_tables, "flops": _flops_tables, "gpus": _gpus_tables}
    return [table for name, value in found.items() for table in builders[name](value)]


def csv_rows(title: str, found: Mapping[str, Any]) -> list[tuple[str, str, object]]:
    """The same for a sheet, a figure a row: ``gpt3, memory.inference.int8.weights_bytes, 175922569540``."""
    return [(title, name, value) for name, value in _leaves("", found)]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else name, inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            keys = [str(inner[key]) for key in ("optimizer", "dtype") if key in inner]
            yield from _leaves(f"{path}.{'.'.join(keys) or number}", inner)
    else:
        yield path, str(value).lower() if isinstance(value, bool) else value


# --- Memory


def _memory(config: ModelConfig, context: int, sequences: int) -> dict[str, Any]:
    kinds = [(optimizer, dtype) for optimizer in OPTIMIZERS for dtype in TRAINED]
    return {
        "context": context,
        "sequences": sequences,
        "inference": [inference_memory(config, dtype, context, sequences).to_dict() for dtype in STORAGES],
        "training": [training_memory(config, optimizer, dtype).to_dict() for optimizer, dtype in kinds],
    }


def _memory_tables(memory: Mapping[str, Any]) -> list[Table]:
    names = ("weights_bytes", "kv_cache_bytes_per_token", "kv_cache_bytes", "total_bytes")
    rows = [(row["dtype"], *(_bytes(row[name]) for name in names)) for row in memory["inference"]]
    columns = _columns("", "weights", "KV, a token", "KV cache", "together")
    inference = Table(columns, tuple(rows), f"Memory to answer {_use(memory)}", (_STORED,))
    parts = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "copies_bytes", "total_bytes")
    rows = [
        (f"{_OPTIMIZER_NAMES[row['optimizer']]}, {row['dtype']}", *(_bytes(row[name]) for name in parts))
        for row in memory["training"]
    ]
    columns = _columns("", "weights", "gradients", "optimizer", "copies", "together")
    note = (
        "Weights, gradients and optimizer state are float32; copies are the weights that bfloat16 multiplies with. "
        "Activations come on top: --gpus, or gptcli train --plan."
    )
    return [inference, Table(columns, tuple(rows), "Memory to train, on one device", (note,))]


# --- FLOPs


def _flops(flops: Flops) -> dict[str, Any]:
    return {
        "context": flops.context,
        "parameters": flops.parameters,
        "multiplied_parameters": flops.multiplied_parameters,
        "forward": flops.forward,
        "forward_matrices": flops.matrices,
        "forward_attention": flops.attention(flops.context),
        "forward_causal": flops.forward_causal,
        "forward_rule": 2 * flops.parameters,
        "training": 3 * flops.forward,
        "training_causal": 3 * flops.forward_causal,
        "training_rule": 6 * flops.parameters,
        "prefill": flops.prefill,
        "prefill_attention": flops.prefill_attention,
        "decode": flops.forward,
    }


def _flops_tables(flops: Mapping[str, Any]) -> list[Table]:
    matrices, context = flops["forward_matrices"], flops["context"]
    kinds: tuple[tuple[str, float, float, str], ...] = (
        ("Forward, a token that sees the whole context", matrices, flops["forward"], "2N"),
        ("Forward, a token on average", matrices, flops["forward_causal"], "2N"),
        ("Training, a token, as if it saw all", 3 * matrices, flops["training"], "6N"),
        ("Training, a token on average", 3 * matrices, flops["training_causal"], "6N"),
    )
    rules = {"2N": flops["forward_rule"], "6N": flops["training_rule"]}
    rows = [
        (name, _flop(whole), _flop(whole - multiplied), f"{rule} = {_flop(rules[rule])}")
        for name, multiplied, whole, rule in kinds
    ]
    rows.append((f"Prefill of {context:,} tokens", _flop(flops["prefill"]), _flop(flops["prefill_attention"]), ""))
    rows.append((f"Decode, the token behind {context - 1:,} others", rows[0][1], rows[0][2], ""))
    columns = (*_columns("", "FLOPs", "attention"), Column("rule of thumb", keep=1))
    notes = (
        f"N is all {flops['parameters']:,} parameters that are stored; {flops['multiplied_parameters']:,} of them "
        "multiply: the matrices, the unembedding among them, not the tables that are looked up.",
        "Counted are matrices and attention; not norms, softmax, activations, biases, the optimizer. Training is three "
        "times forward.",
    )
    return [Table(columns, tuple(rows), f"FLOPs with a context of {context:,} tokens", notes)]


# --- Cards


def _gpus(config: ModelConfig, count: int, card_bytes: int, context: int, sequences: int) -> dict[str, Any]:
    """``count`` 1 asks how many; more are there, and it is said what they do."""
    there = count if count > 1 else None
    inference = []
    for dtype in STORAGES[1:]:
        fit = fit_inference(config, dtype, card_bytes, context=context, sequences=sequences)
        inference.append(inference_dict(dtype, fit, there))
    training = []
    for optimizer in OPTIMIZERS if config.norm_first else ():
        plan = fit_training(config, optimizer, card_bytes, context)
        training.append(
            {
                "optimizer": optimizer,
                "dtype": "bfloat16",
                "cards": plan.ranks if plan else None,
                "parallel": plan.parallel if plan else None,
                "checkpoint_activations": plan.checkpoint_activations if plan else None,
                "card": plan.rank.to_dict() if plan else None,
                "fits": None if there is None else plan is not None and plan.ranks <= there,
            }
        )
    sizes = {"card_bytes": card_bytes, "count": there, "context": context, "sequences": sequences}
    return {**sizes, "inference": inference, "training": training}


def _gpus_tables(gpus: Mapping[str, Any]) -> list[Table]:
    there = gpus["count"]
    cards = f"cards of {gpus['card_bytes'] / 1e9:,.6g} GB"
    inference = _inference_table(gpus, there, f"To answer {_use(gpus)}: {cards}")
    if not gpus["training"]:
        note = "This family is here for counting only: it can't be trained."
        return [Table(inference.columns, inference.rows, inference.title, (*inference.notes, note))]
    return [inference, _training_table(gpus["training"], there, f"To train: {cards}")]


def _inference_table(gpus: Mapping[str, Any], there: int | None, title: str) -> Table:
    rows, notes = [], []
    names = ("weights_bytes", "kv_cache_bytes", "workspace_bytes", "overhead_bytes", "total_bytes")
    for row in gpus["inference"]:
        if row["cards"] is None:
            rows.append((row["dtype"], "-", "no split fits", *[""] * len(names), "none"))
            continue
        sizes = [_bytes(row["card"][name]) for name in names]
        copies = row["data"]
        rows.append((row["dtype"], f"{row['cards']:,}", _split(row), *sizes, f"{copies:,} x" if copies else "none"))
        if row["fewest_cards"] < row["cards"]:
            notes.append(
                f"{row['dtype']}: {row['fewest_cards']:,} would do in a pipeline, where cards wait for each other."
            )
    notes.append("The fullest card; a pipeline's last holds the unembedding too. " + _STORED)
    columns = (
        *(Column("", right=False), Column("cards"), Column("split", right=False), Column("weights", keep=3)),
        *(Column("KV cache", keep=3), Column("workspace", keep=1), Column("overhead", keep=2), Column("each holds")),
        Column(f"on {there}: copies"),
    )
    return _without_count(columns, rows, there, title, notes)


def _training_table(training: Sequence[Mapping[str, Any]], there: int | None, title: str) -> Table:
    rows = []
    names = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    for row in training:
        name = f"{_OPTIMIZER_NAMES[row['optimizer']]}, {row['dtype']}"
        if row["cards"] is None:
            rows.append((name, "-", "no number fits", *[""] * 6, "no"))
            continue
        card = row["card"]
        rest = sum(card[f"{part}_bytes"] for part in ("logits", "gathered", "overhead"))
        sizes = [_bytes(card[part]) for part in names] + [_bytes(rest), _bytes(card["total_bytes"])]
        rows.append((name, f"{row['cards']:,}", _SPLITS[row["parallel"]], *sizes, "yes" if row["fits"] else "no"))
    notes = ["One row of the context on each card, its activations computed again where they would not fit."]
    if any(row["cards"] is None for row in training):
        notes.append("Training is split over data alone: one block with its activations must fit a card.")
    else:
        notes.append("A larger batch: gptcli train --plan --gpus CARDS.")
    columns = (
        *(Column("", right=False), Column("cards"), Column("split", right=False), Column("weights", keep=4)),
        *(Column("gradients", keep=2), Column("optimizer", keep=4), Column("activations", keep=3)),
        *(Column("rest", keep=1), Column("each holds"), Column(f"fits {there}")),
    )
    return _without_count(columns, rows, there, title, notes)


def _without_count(
    columns: Sequence[Column], rows: Sequence[tuple[str, ...]], there: int | None, title: str, notes: Sequence[str]
) -> Table:
    """The last column is about the cards that are there: gone where none are named."""
    if there is None:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(tuple(columns), tuple(rows), title, tuple(notes))


def _split(row: Mapping[str, Any]) -> str:
    ways = [f"{name} {row[name]}" for name in ("tensor", "pipeline") if row[name] > 1]
    return " x ".join(ways) or "one card"


def _use(value: Mapping[str, Any]) -> str:
    sequences = value["sequences"]
    return f"{sequences:,} sequence{'' if sequences == 1 else 's'} of {value['context']:,} tokens"


def _columns(first: str, *others: str) -> tuple[Column, ...]:
    return (Column(first, right=False), *map(Column, others))


def _bytes(count: int) -> str:
    return byte_text(count, 2)


def _flop(count: float) -> str:
    return scaled(count, "", 2)
