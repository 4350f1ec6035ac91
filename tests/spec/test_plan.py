"""Training on paper: the arithmetic, what is chosen by itself, what does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from gptcli.errors import UnsupportedError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.flops import flops_per_token
from gptcli.spec.params import count_params, tensors
from gptcli.spec.plan import (
    LOGIT_BYTES,
    TrainingPlan,
    choose_parallel,
    parse_cards,
    plan_training,
    shard_parameters,
)
from gptcli.spec.presets import NAMES, read_preset

GB = 10**9
GPT2, GPT3 = read_preset("gpt2"), read_preset("gpt3")


def plan(config: ModelConfig = GPT2, **changes: Any) -> TrainingPlan:
    return plan_training(config, **{"ranks": 1, "card_bytes": 80 * GB, "batch_tokens": 491_520, **changes})


# --- The question


def test_gpt3_does_not_fit_on_8_cards_of_141_gb() -> None:
    answer = plan(GPT3, ranks=8, card_bytes=141 * GB, batch_tokens=3_200_000)
    assert (answer.fits, answer.parallel, answer.checkpoint_activations) == (False, "fsdp", True)
    # 16 bytes a parameter, over 8 ranks; every first dimension of gpt3 but the vocabulary's 50,257 divides by 8.
    a_rank = answer.parameters / 8
    assert answer.rank.weights == answer.rank.gradients == pytest.approx(4 * a_rank, rel=1e-6)
    assert answer.rank.optimizer == pytest.approx(8 * a_rank, rel=1e-6)
    assert answer.rank.total > 349 * GB


def test_the_least_cards_fit_and_one_fewer_do_not() -> None:
    least = plan(GPT3, ranks=8, card_bytes=141 * GB).least_ranks
    assert least is not None
    assert 20 < least < 35
    assert plan(GPT3, ranks=least, card_bytes=141 * GB).fits is True
    assert plan(GPT3, ranks=least - 1, card_bytes=141 * GB).fits is False


def test_no_number_of_small_cards_holds_one_large_block() -> None:
    answer = plan(GPT3, ranks=8, card_bytes=10 * GB)
    assert (answer.fits, answer.least_ranks) == (False, None)


# --- What a rank holds


def test_without_sharding_a_rank_holds_16_bytes_a_parameter() -> None:
    answer = plan()
    assert answer.parameters == count_params(GPT2).total_stored == 124_439_808
    assert answer.rank.weights + answer.rank.gradients + answer.rank.optimizer == 16 * answer.parameters


def test_ddp_ranks_hold_whole_copies_and_fsdp_ranks_parts() -> None:
    alone, copies = plan(micro_batch_rows=4), plan(ranks=4, parallel="ddp", micro_batch_rows=4)
    parts = plan(ranks=4, parallel="fsdp", micro_batch_rows=4)
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(copies.rank, name) == getattr(alone.rank, name)
        assert getattr(parts.rank, name) == pytest.approx(getattr(alone.rank, name) / 4, rel=1e-4)
    assert alone.rank.activations == copies.rank.activations == parts.rank.activations


def test_a_shard_is_rounded_up_along_the_first_dimension() -> None:
    embedding = next(tensors(GPT2))
    assert embedding.shape == (50_257, 768)
    assert shard_parameters(embedding, 8) == 6_283 * 768
    assert shard_parameters(embedding, 100_000) == 768


def test_muon_keeps_half_of_adamws_state_for_the_blocks_matrices() -> None:
    count = count_params(GPT2)
    names = ("Key", "Query", "Value", "Output", "Up-projection", "Down-projection")
    matrices = sum(row.parameters for row in count.categories if row.name in names)
    assert plan().rank.optimizer - plan(optimizer="muon").rank.optimizer == 4 * matrices


def test_bfloat16_saves_activations_and_pays_for_copies() -> None:
    half, whole = plan(micro_batch_rows=8), plan(micro_batch_rows=8, dtype="float32")
    assert whole.rank.gathered == 0
    # Every matrix and its bias, the unembedding; not the 25 norms, not the positions.
    norms, positions = 25 * 2 * 768, 1024 * 768
    assert half.rank.gathered == 2 * (124_439_808 - norms - positions)
    assert 0.5 * whole.rank.activations < half.rank.activations < 0.7 * whole.rank.activations


def test_fsdp_gathers_matrices_as_they_are_multiplied_and_the_rest_in_float32() -> None:
    half = plan(ranks=4, parallel="fsdp", micro_batch_rows=8)
    whole = plan(ranks=4, parallel="fsdp", micro_batch_rows=8, dtype="float32")
    # The matrices of a block with their biases; all else: the tables, the 25 norms.
    block = 12 * 768 * 768 + 9 * 768
    root = 124_439_808 - 12 * block
    assert whole.rank.gathered == 4 * (2 * block + root + block + root) + 4 * block
    assert half.rank.gathered == 2 * 3 * block + 4 * 2 * root + 4 * block + 2 * 50_257 * 768


def test_logits_are_held_in_chunks() -> None:
    assert plan(micro_batch_rows=8).rank.logits == LOGIT_BYTES
    assert plan(micro_batch_rows=1, context=128).rank.logits == 128 * 50_257 * 8


def test_activations_grow_with_rows_and_context_alike() -> None:
    one = plan(micro_batch_rows=1).rank.activations
    assert plan(micro_batch_rows=6).rank.activations == 6 * one
    assert plan(micro_batch_rows=2, context=512).rank.activations == one


def test_the_total_is_the_sum_of_the_parts() -> None:
    rank = plan().rank
    assert rank.total == sum(asdict(rank).values()) == rank.to_dict()["total_bytes"]


# --- What is chosen


def test_micro_batch_is_the_most_that_fits_as_even_as_it_goes() -> None:
    answer = plan(card_bytes=40 * GB)
    rows = 491_520 // 1024
    assert answer.batch_tokens == rows * 1024
    assert answer.fits is True
    assert answer.micro_batch_rows == -(-rows // answer.accumulate)
    fewer = -(-rows // (answer.accumulate - 1))
    assert plan(card_bytes=40 * GB, micro_batch_rows=fewer, checkpoint_activations=False).fits is False


def test_a_micro_batch_that_is_given_stays_and_is_no_more_than_the_rows() -> None:
    answer = plan(batch_tokens=6 * 1024, micro_batch_rows=4)
    assert (answer.micro_batch_rows, answer.accumulate) == (4, 2)
    answer = plan(batch_tokens=6 * 1024, micro_batch_rows=40)
    assert (answer.micro_batch_rows, answer.accumulate) == (6, 1)


def test_each_rank_gets_as_many_rows_and_at_least_one() -> None:
    answer = plan(ranks=4, batch_tokens=4 * 3 * 1024)
    assert answer.micro_batch_rows * answer.accumulate == 3
    assert plan(ranks=4, batch_tokens=1).batch_tokens == 4 * 1024


def test_checkpointing_comes_only_where_nothing_fits_without() -> None:
    with_it = plan(checkpoint_activations=True, micro_batch_rows=1).rank.total
    without = plan(checkpoint_activations=False, micro_batch_rows=1).rank.total
    assert with_it < without
    assert plan(card_bytes=without).checkpoint_activations is False
    between = plan(card_bytes=without - 1)
    assert (between.checkpoint_activations, between.fits) == (True, True)
    assert plan(card_bytes=with_it - 1).fits is False


def test_a_total_that_is_exactly_the_card_fits() -> None:
    total = plan(micro_batch_rows=1, checkpoint_activations=True).rank.total
    answer = plan(card_bytes=total, micro_batch_rows=1, checkpoint_activations=True)
    assert (answer.fits, answer.spare_bytes) == (True, 0)
    assert answer.least_ranks == 1


def test_parallel_is_none_alone_ddp_up_to_half_a_card_and_fsdp_beyond() -> None:
    copy = 16 * 124_439_808
    assert choose_parallel(GPT2, 1, 1) == "none"
    assert choose_parallel(GPT2, 2, 2 * copy) == "ddp"
    assert choose_parallel(GPT2, 2, 2 * copy - 1) == "fsdp"
    assert choose_parallel(GPT2, 2, 2 * copy - 1, "muon") == "ddp"
    assert choose_parallel(GPT3, 8, 141 * GB) == "fsdp"
    assert choose_parallel(GPT3, 8, None) == "ddp"


def test_nothing_is_said_of_fitting_where_the_card_is_not_known() -> None:
    answer = plan(card_bytes=None)
    assert (answer.fits, answer.spare_bytes, answer.least_ranks, answer.micro_batch_rows) == (None, None, None, 1)


# --- FLOPs


def test_flops_of_gpt2_are_what_the_formula_says() -> None:
    matrices = 12 * (4 * 768**2 + 2 * 768 * 3072) + 50_257 * 768
    assert flops_per_token(GPT2) == 6 * matrices + 12 * 12 * 768 * 1024
    assert flops_per_token(GPT2, 512) == 6 * matrices + 12 * 12 * 768 * 512


def test_an_untied_unembedding_computes_no_more_than_a_tied_one() -> None:
    assert flops_per_token(replace(GPT2, tied=False)) == flops_per_token(GPT2)


def test_gpt3_over_its_300_billion_tokens_is_near_what_its_paper_says() -> None:
    # Brown et al. 2020, table D.1: 3.14e23, without attention's own part.
    assert flops_per_token(GPT3) * 300e9 == pytest.approx(3.14e23, rel=0.05)


# --- Every size, and wrong use


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt1"])
@pytest.mark.parametrize("ranks", [1, 3, 1024])
def test_every_preset_can_be_planned_and_told_as_json(name: str, ranks: int) -> None:
    told = plan(read_preset(name), ranks=ranks).to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["rank"]["total_bytes"] == sum(v for k, v in told["rank"].items() if k != "total_bytes")
    assert told["fits"] == (told["spare_bytes"] >= 0)


def test_a_model_that_is_for_counting_only_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        plan(read_preset("gpt1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"ranks": 0},
        {"ranks": 1 << 30},
        {"batch_tokens": 0},
        {"context": 0},
        {"card_bytes": 0},
        {"micro_batch_rows": 0},
        {"ranks": 2, "parallel": "none"},
    ],
)
def test_numbers_that_mean_nothing_are_wrong_use(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan(**changes)


@pytest.mark.parametrize(
    ("text", "cards"),
    [
        ("8x141GB", (8, 141 * GB)),
        ("141GB", (1, 141 * GB)),
        ("80GiB", (1, 80 << 30)),
        (" 2 x 79.6 gib ", (2, int(79.6 * (1 << 30)))),
        ("4×500MB", (4, GB // 2)),
        ("1x1.5TB", (1, 1500 * GB)),
        ("16X24GB", (16, 24 * GB)),
    ],
)
def test_cards_are_read(text: str, cards: tuple[int, int]) -> None:
    assert parse_cards(text) == cards


@pytest.mark.parametrize(
    "text",
    ["", "8", "8x", "x141GB", "0x141GB", "8x0GB", "8x141", "8x141GBs", "-1x8GB", "8x1e3GB", "9999999x1GB", "nanGB"],
)
def test_what_names_no_cards_is_wrong_use(text: str) -> None:
    with pytest.raises(UsageError):
        parse_cards(text)
