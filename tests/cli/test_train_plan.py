"""The card of ``train --plan``: on stdout, plain off a terminal, one object as JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from gptcli.cli.out import Output
from gptcli.cli.train_plan import show_plan
from gptcli.spec.plan import parse_cards, plan_training
from gptcli.spec.presets import read_preset


def shown(name: str, cards: str | None, *, title: str | None = None, as_json: bool = False, **changes: Any) -> str:
    """What stdout gets; stderr gets nothing."""
    stdout, stderr = io.StringIO(), io.StringIO()
    ranks, size = parse_cards(cards) if cards else (1, None)
    plan = plan_training(read_preset(name), ranks=ranks, card_bytes=size, **{"batch_tokens": 491_520, **changes})
    show_plan(Output(stdout, stderr, json=as_json), plan, name if title is None else title)
    assert stderr.getvalue() == ""
    return stdout.getvalue()


def test_gpt3_on_8_cards_of_141_gb() -> None:
    lines = shown("gpt3", "8x141GB", batch_tokens=3_200_000).splitlines()
    assert lines[0].startswith("gpt3  174,604,259,328 parameters: 96 layers, width 12,288")
    assert lines[1] == "8 cards of 141 GB: weights, gradients and optimizer sharded (FSDP)"
    assert lines[2] == "AdamW, bfloat16, activation checkpointing on"
    assert lines[3].startswith("3,194,880 tokens a step: micro-batch of 1 row on each card, accumulated 195 times")
    rows = {line.split()[0]: line.split()[1] for line in lines if line.startswith("  ") and line.endswith("GB")}
    assert list(rows) == [
        *("Weights", "Gradients", "Optimizer", "Activations", "Logits", "Gathered", "Overhead", "Total", "Card"),
    ]
    assert rows["Weights"] == rows["Gradients"] == "87.30"
    assert rows["Optimizer"] == "174.60"
    parts = sum(float(size) for name, size in rows.items() if name not in ("Total", "Card"))
    assert parts == pytest.approx(float(rows["Total"]), abs=0.04)
    too_much = float(rows["Total"]) - float(rows["Card"])
    assert lines[-2] == f"It does not fit: {too_much:.2f} GB too much on each card."
    assert lines[-1].startswith("It takes at least 28 cards of 141 GB, fully sharded")


def test_a_plan_that_fits_says_what_is_left() -> None:
    text = shown("gpt2", "80GB")
    assert "1 card of 80 GB: on one card\n" in text
    assert "  Copies " in text
    assert text.splitlines()[-1].startswith("It fits, with ")


def test_small_cards_that_no_number_helps_are_told_so() -> None:
    assert "More cards of this size would not help" in shown("gpt3", "8x10GB").splitlines()[-1]


def test_cards_that_would_do_if_told_otherwise_are_told_so() -> None:
    text = shown("gpt2-xl", "8x40GB", micro_batch_rows=60, checkpoint_activations=False)
    assert text.splitlines()[-1].startswith("It would fit on ")


def test_without_a_card_there_is_no_verdict() -> None:
    text = shown("gpt2", None)
    assert "Total" in text
    assert "fit" not in text
    assert "Card" not in text


@pytest.mark.parametrize(("cards", "fits"), [("8x141GB", False), ("64x141GB", True), (None, None)])
def test_json_is_one_object_with_every_number_exact(cards: str | None, fits: bool | None) -> None:
    text = shown("gpt3", cards, as_json=True)
    assert text.count("\n") == 1
    value = json.loads(text)
    assert (value["model"], value["fits"], value["parameters"]) == ("gpt3", fits, 174_604_259_328)
    assert set(value["rank"]) == {
        "weights_bytes",
        "gradients_bytes",
        "optimizer_bytes",
        "activations_bytes",
        "logits_bytes",
        "gathered_bytes",
        "overhead_bytes",
        "total_bytes",
    }


def test_a_title_is_shown_harmless() -> None:
    assert "\x1b" not in shown("gpt2", "80GB", title="\x1b[2Jx")
