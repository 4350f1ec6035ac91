"""Splits over cards: whole heads, nothing lost, nothing twice but what has to be, the simplest that fits."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from gptcli.spec.cards import (
    fit_inference,
    fit_training,
    part_shape,
    split_model,
    tensor_parallel_sizes,
)
from gptcli.spec.memory import STORAGES, inference_memory, kv_bytes_per_token
from gptcli.spec.params import tensors
from gptcli.spec.plan import COMMUNICATION_BYTES, CONTEXT_BYTES, plan_training
from gptcli.spec.presets import read_preset

GB = 10**9
GPT2, XL, GPT3 = read_preset("gpt2"), read_preset("gpt2-xl"), read_preset("gpt3")


def test_whole_heads_are_dealt_out() -> None:
    assert tensor_parallel_sizes(GPT2) == [1, 2, 3, 4, 6]  # 12 heads
    assert tensor_parallel_sizes(XL) == [1, 5]  # 25
    assert tensor_parallel_sizes(GPT3) == [1, 2, 3, 4, 6, 8]
    assert tensor_parallel_sizes(replace(GPT3, kv_heads=8)) == [1, 2, 4, 8]


@pytest.mark.parametrize("cards", [1, 2, 4, 8])
def test_parts_make_up_the_tensor(cards: int) -> None:
    config = replace(GPT3, layers=1, vocab_size=50_304)
    for tensor in tensors(config):
        part = part_shape(tensor, cards)
        whole = tensor.category in ("Norms", "Positions") or (
            tensor.category == "Biases" and ("output" in tensor.name or "down" in tensor.name)
        )
        assert prod(part) * (1 if whole else cards) == tensor.parameters, tensor.name
        if tensor.category == "Output":
            assert part == (12_288, 12_288 // cards)  # columns: what its own heads gathered


@pytest.mark.parametrize("dtype", STORAGES)
def test_one_card_holds_what_memory_says(dtype: str) -> None:
    split = split_model(GPT2, dtype, 1, 1, 1024, 3)
    memory = inference_memory(GPT2, dtype, 1024, 3)
    ((layers, held),) = split.stages
    assert (layers, held.weights, held.kv_cache) == (12, memory.weights, memory.kv_cache)
    assert held.total == held.weights + held.kv_cache + held.workspace + held.overhead
    assert held.overhead == pytest.approx(CONTEXT_BYTES, rel=0.01)


@pytest.mark.parametrize("pipeline", [2, 3, 5, 7, 12])
def test_a_pipeline_holds_every_layer_once_and_a_tied_table_at_both_ends(pipeline: int) -> None:
    split = split_model(GPT2, "bfloat16", 1, pipeline, 1024, 1)
    assert sum(layers for layers, _ in split.stages) == 12
    assert max(layers for layers, _ in split.stages) - min(layers for layers, _ in split.stages) <= 1
    whole = inference_memory(GPT2, "bfloat16", 1024)
    table = 2 * 50_257 * 768
    assert sum(held.weights for _, held in split.stages) == whole.weights + table
    untied = split_model(replace(GPT2, tied=False), "bfloat16", 1, pipeline, 1024, 1)
    assert sum(held.weights for _, held in untied.stages) == whole.weights + table
    assert sum(held.kv_cache for _, held in split.stages) == whole.kv_cache
    assert all(held.overhead >= CONTEXT_BYTES + COMMUNICATION_BYTES for _, held in split.stages)
    assert split.fullest.total == max(held.total for _, held in split.stages)


def test_tensor_parallel_cards_share_weights_and_cache() -> None:
    one, four = (split_model(GPT3, "bfloat16", n, 1, 2048, 1).fullest for n in (1, 4))
    assert four.kv_cache == one.kv_cache / 4 == kv_bytes_per_token(GPT3, "bfloat16") * 2048 / 4
    assert four.weights == pytest.approx(one.weights / 4, rel=0.001)
    assert four.weights > one.weights / 4  # norms and positions everywhere, the vocabulary's last part rounded up


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("card", [2, 3, 4, 8, 16, 40])
@pytest.mark.parametrize("config", [GPT2, replace(XL, layers=20), replace(GPT3, layers=10)], ids=["gpt2", "xl", "gpt3"])
def test_the_answer_is_the_brute_force_one(config: object, card: int, dtype: str) -> None:
    """All splits are built in full and looked at; the answer is the first of the simple ones, and the smallest."""
    fit = fit_inference(config, dtype, card * GB, context=config.context)

    def fits(tensor: int, pipeline: int) -> bool:
        split = split_model(config, dtype, tensor, pipeline, config.context, 1)
        return all(held.total <= card * GB for _, held in split.stages)

    sizes = tensor_parallel_sizes(config)
    every = [(t * p, -t) for t in sizes for p in range(1, config.layers + 1) if fits(t, p)]
    alone = [t for t in sizes if fits(t, 1)]
    if not every:
        assert fit is None
        return
    simplest, fewest = fit
    assert (fewest.cards, -fewest.tensor) == min(every)
    if alone:
        assert (simplest.tensor, simplest.pipeline) == (alone[0], 1)
    else:
        assert simplest == fewest


def test_gpt3_by_hand() -> None:
    """350 GB over cards of 80: more than 4, and 6 is the next count that whole heads divide by."""
    simplest, fewest = fit_inference(GPT3, "bfloat16", 80 * GB, context=2048)
    assert (simplest.tensor, simplest.pipeline, simplest.cards) == (6, 1, 6)
    assert (fewest.tensor, fewest.pipeline) == (1, 5)
    simplest, fewest = fit_inference(GPT3, "bfloat16", 24 * GB, context=2048)
    assert simplest == fewest
    assert simplest.pipeline > 1
    simplest, _ = fit_inference(GPT3, "int4", 141 * GB, context=2048)
    assert simplest.cards == 1
    assert fit_inference(GPT3, "bfloat16", GB, context=2048) is None


def test_longer_and_more_texts_take_more_cards() -> None:
    few, _ = fit_inference(GPT3, "bfloat16", 80 * GB, context=2048)
    many, _ = fit_inference(GPT3, "bfloat16", 80 * GB, context=2048, sequences=32)
    assert many.cards > few.cards


def test_training_is_the_plans_fewest() -> None:
    plan = fit_training(GPT3, "adamw", 141 * GB, 2048)
    assert plan.ranks == plan_training(GPT3, ranks=8, card_bytes=141 * GB, batch_tokens=2048).least_ranks
    assert (plan.fits, plan.parallel, plan.micro_batch_rows) == (True, "fsdp", 1)
    alone = fit_training(GPT2, "muon", 80 * GB, 1024)
    assert (alone.ranks, alone.parallel, alone.fits) == (1, "none", True)
    assert fit_training(GPT3, "adamw", 10 * GB, 2048) is None
