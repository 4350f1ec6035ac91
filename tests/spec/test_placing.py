"""The plan before loading: to the byte what loading would leave on each card, and whether that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptcli.core.build import new_part
from gptcli.core.stepping import held_bytes
from gptcli.errors import UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.placing import plan_placing, storage_of, weights_bytes
from gptcli.spec.presets import read_preset
from gptcli.spec.split import Share

GQA = ModelConfig("gpt2", 301, 16, 2, 24, 8, 2, 3, 90)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "config", [read_preset("gpt3"), GQA, replace(GQA, tied=False, gated=True)], ids=lambda c: c.family
)
def test_a_dry_run_on_the_meta_device_holds_what_the_plan_says(config: ModelConfig, ranks: int) -> None:
    for rank in (0, ranks - 1):
        share = Share(config, rank, ranks)
        model = new_part(share)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        numbers = sum(parameter.numel() for parameter in model.parameters())  # a tied one once
        assert numbers == share.parameters
        assert 2 * numbers == weights_bytes(share, "bfloat16")
        assert 4 * numbers == weights_bytes(share, "float32")
    assert held_bytes(torch.nn.Linear(2, 3)) == 36  # what the count of a real model goes by


def test_gpt3_is_placed_on_eight_cards() -> None:
    plan = plan_placing(read_preset("gpt3"), "bfloat16", cards=8, card_bytes=141 * 10**9, tp=8, context=2048)
    assert plan.fits
    assert [round(each.weights / 1e9, 2) for each in plan.ranks] == [43.71] + [43.7] * 7
    assert sum(each.weights for each in plan.ranks) >= 2 * 174_600_000_000
    assert {each.kv_cache for each in plan.ranks} == {2 * 96 * 12288 * 2 * 2048 // 8}
    assert sum(each.bytes for each in plan.tensors) == plan.ranks[0].weights


def test_by_itself_a_plan_takes_as_few_cards_as_fit() -> None:
    config, size = read_preset("gpt3"), 80 * 10**9
    plan = plan_placing(config, "bfloat16", cards=8, card_bytes=size, context=2048)
    assert (plan.tp, plan.fewest, plan.fits) == (6, 6, True)
    assert not plan_placing(config, "bfloat16", cards=8, card_bytes=size, tp=4, context=2048).fits
    short = plan_placing(config, "bfloat16", cards=2, card_bytes=size, context=2048)
    assert (short.tp, short.fewest, short.fits) == (2, 6, False)
    assert plan_placing(config, "int4", cards=2, card_bytes=size, context=2048).fits
    unknown = plan_placing(config, "bfloat16", cards=1, card_bytes=None, context=2048)
    assert (unknown.tp, unknown.fewest, unknown.fits) == (1, None, None)


def test_offloaded_two_blocks_are_on_the_card() -> None:
    config = read_preset("gpt3")
    plan = plan_placing(config, "bfloat16", cards=1, card_bytes=80 * 10**9, offload=True, context=2048)
    whole = weights_bytes(Share(config, 0, 1), "bfloat16")
    assert plan.fits
    assert plan.host_bytes + plan.ranks[0].weights == whole + plan.host_bytes // 48
    with pytest.raises(UsageError):
        plan_placing(config, "bfloat16", cards=2, card_bytes=None, tp=2, offload=True, context=2048)


def test_more_cards_than_there_are_can_not_be_taken() -> None:
    with pytest.raises(UsageError, match="--tp 4 takes 4 cards, and there are 2"):
        plan_placing(GQA, "bfloat16", cards=2, card_bytes=10**9, tp=4, context=16)


@pytest.mark.parametrize(
    ("dtype", "quantize", "stored", "storage"),
    [
        ("auto", "none", None, "bfloat16"),
        ("auto", "none", "float32", "float32"),
        ("auto", "none", "float16", "bfloat16"),
        ("float16", "none", "float32", "bfloat16"),
        ("float32", "int8", None, "int8"),
    ],
)
def test_storage(dtype: str, quantize: str, stored: str | None, storage: str) -> None:
    assert storage_of(dtype, quantize, stored) == storage
