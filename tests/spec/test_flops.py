"""FLOPs on paper: by hand, against the rules of thumb, and token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptcli.spec.config import from_hf
from gptcli.spec.flops import count_flops, flops_per_token
from gptcli.spec.presets import NAMES, read_preset

TINY = from_hf(
    {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 6, "n_layer": 2, "n_head": 3, "n_inner": 7}
)
GPT3 = read_preset("gpt3")


def test_tiny_by_hand() -> None:
    flops = count_flops(TINY)
    blocks = 2 * (4 * 6 * 6 + 2 * 6 * 7)
    assert (flops.block_parameters, flops.unembedding_parameters) == (blocks, 66)
    assert flops.multiplied_parameters == 522
    assert flops.matrices == 1044
    # Scores and weighted values: 2 x 2 x 6 operations a pair of tokens, in each of 2 layers.
    assert flops.attention(1) == 48
    assert flops.forward == 1044 + 5 * 48
    assert flops.forward_causal == 1044 + 3 * 48


def test_a_prompt_is_its_tokens_one_after_the_other_with_logits_for_the_last() -> None:
    flops = count_flops(TINY, 4)
    one_by_one = sum(2 * flops.block_parameters + flops.attention(seen) for seen in range(1, 5)) + 2 * 66
    assert flops.prefill == one_by_one
    assert flops.prefill_attention == (1 + 2 + 3 + 4) * 48
    assert 4 * flops.forward_causal == one_by_one + 3 * 2 * 66  # logits of every token


def test_training_is_three_times_forward() -> None:
    for name in NAMES:
        config = read_preset(name)
        assert flops_per_token(config) == 3 * count_flops(config).forward
        assert flops_per_token(config, 100) == 3 * count_flops(config, 100).forward


def test_gpt3_over_its_300_billion_tokens_is_what_its_paper_says() -> None:
    """Brown et al. 2020, table D.1: 3.14e23, by 6 N."""
    flops = count_flops(GPT3)
    assert 6 * flops.parameters * 300e9 == pytest.approx(3.14e23, rel=0.002)
    assert 3 * flops.forward_causal * 300e9 == pytest.approx(3.14e23, rel=0.02)
    assert 3 * flops.forward * 300e9 == pytest.approx(3.14e23, rel=0.03)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("gpt3")])
def test_the_rule_of_thumb_is_near_where_the_context_is_short(name: str) -> None:
    flops = count_flops(read_preset(name), 128)
    # What is stored counts the positions, and not the attention.
    assert 2 * flops.parameters == pytest.approx(flops.forward_causal, rel=0.02)


def test_an_untied_table_is_stored_and_not_computed_with() -> None:
    tied, untied = count_flops(TINY), count_flops(replace(TINY, tied=False))
    assert untied.parameters == tied.parameters + 66
    assert (untied.forward, untied.prefill) == (tied.forward, tied.prefill)


def test_grouped_queries_save_matrices_and_no_attention() -> None:
    grouped, full = count_flops(replace(TINY, kv_heads=1)), count_flops(TINY)
    assert grouped.attention(5) == full.attention(5)
    assert full.block_parameters - grouped.block_parameters == 2 * 2 * 4 * 6


def test_a_window_cuts_off_what_a_token_looks_at() -> None:
    windowed, full = count_flops(replace(TINY, windows=(None, 3))), count_flops(TINY)
    assert windowed.attention(2) == full.attention(2) == 2 * 48
    assert windowed.attention(5) == 24 * 5 + 24 * 3
    one_by_one = sum(windowed.attention(seen) for seen in range(1, 6))
    assert windowed.prefill_attention == one_by_one == 24 * (1 + 2 + 3 + 4 + 5) + 24 * (1 + 2 + 3 + 3 + 3)
    assert windowed.forward_causal == windowed.matrices + one_by_one / 5
    assert count_flops(replace(TINY, windows=(9, 9))).prefill == full.prefill
