"""Memory on paper, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptcli.errors import LimitError, UsageError
from gptcli.spec.config import from_hf
from gptcli.spec.memory import (
    OPTIMIZERS,
    STORAGES,
    check_use,
    inference_memory,
    kv_bytes_per_token,
    training_memory,
)
from gptcli.spec.params import count_params
from gptcli.spec.plan import plan_training
from gptcli.spec.presets import NAMES, read_preset

TINY = from_hf(
    {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_layer": 2, "n_head": 3, "n_inner": 7}
)


def test_weights_of_tiny_by_hand() -> None:
    """456 numbers in the blocks' matrices, 230 beside them (the tied table once)."""
    stored = count_params(TINY).total_stored
    matrices = 2 * (4 * 36 + 2 * 42)
    beside = stored - matrices
    assert (matrices, beside) == (456, 230)
    weights = {dtype: inference_memory(TINY, dtype, 5).weights for dtype in STORAGES}
    assert weights["float32"] == 4 * stored
    assert weights["bfloat16"] == 2 * stored
    # A float32 scale a row, of 24 rows of attention, 7 up and 6 down, twice, and of the unembedding, 11 rows of 6.
    assert weights["int8"] == matrices + 4 * 2 * (24 + 7 + 6) + 2 * beside + 11 * (6 + 4)
    # Every row takes one whole group of 32, and its bfloat16 scale.
    assert weights["int4"] == (2 * (24 + 7 + 6) + 11) * (16 + 2) + 2 * beside


def test_gpt3_takes_what_everybody_says() -> None:
    gpt3 = read_preset("gpt3")
    memory = {dtype: inference_memory(gpt3, dtype, 2048) for dtype in STORAGES}
    assert memory["bfloat16"].weights == 349_208_518_656  # the well-known 350 GB
    assert memory["bfloat16"].kv_cache_per_token == 2 * 96 * 12_288 * 2  # 4.7 MB
    assert memory["bfloat16"].kv_cache == 2048 * 4_718_592
    assert memory["float32"].weights == 2 * memory["bfloat16"].weights
    assert memory["int8"].weights == pytest.approx(memory["bfloat16"].weights / 2, rel=0.01)  # and the tied table twice
    # 4.5 bits a weight, of which half a bit is scales.
    assert memory["int4"].weights == pytest.approx(gpt3_matrices() * 4.5 / 8, rel=0.02)


def gpt3_matrices() -> int:
    return 96 * 12 * 12_288**2


def test_the_cache_is_not_quantized_and_shared_by_grouped_heads() -> None:
    for dtype in ("bfloat16", "int8", "int4"):
        assert kv_bytes_per_token(TINY, dtype) == 2 * 2 * 6 * 2
    assert kv_bytes_per_token(TINY, "float32") == 2 * 2 * 6 * 4
    assert kv_bytes_per_token(replace(TINY, kv_heads=1), "float32") == 2 * 2 * 2 * 4


def test_every_sequence_has_its_own_cache() -> None:
    one, many = inference_memory(TINY, "float32", 4), inference_memory(TINY, "float32", 4, 10)
    assert many.kv_cache == 10 * one.kv_cache == 10 * 4 * one.kv_cache_per_token
    assert many.weights == one.weights
    assert many.total == many.weights + many.kv_cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt1"])
def test_training_is_the_plans(name: str, optimizer: str, dtype: str) -> None:
    config = read_preset(name)
    memory = training_memory(config, optimizer, dtype)
    rank = plan_training(
        config, ranks=1, card_bytes=None, batch_tokens=1, optimizer=optimizer, dtype=dtype, parallel="none"
    ).rank
    assert (memory.weights, memory.gradients, memory.optimizer) == (rank.weights, rank.gradients, rank.optimizer)
    assert memory.copies == rank.gathered
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.copies


def test_adamw_takes_16_bytes_a_parameter() -> None:
    assert training_memory(TINY, "adamw", "float32").total == 16 * count_params(TINY).total_stored
    saved = training_memory(TINY, "adamw", "float32").total - training_memory(TINY, "muon", "float32").total
    assert saved == 4 * 456


def test_what_can_not_be_asked_for() -> None:
    assert check_use(TINY, None, 1) == 5
    assert check_use(TINY, 3, 2) == 3
    with pytest.raises(LimitError, match="5 positions"):
        check_use(TINY, 6, 1)
    assert check_use(replace(TINY, position="rope"), 6, 1) == 6
    for context, sequences in ((0, 1), (1, 0), (None, -1)):
        with pytest.raises(UsageError):
            check_use(TINY, context, sequences)
