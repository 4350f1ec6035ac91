"""Which slice of each tensor a rank holds: all of them together are the model, and nothing stands anywhere twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from gptcli.errors import UnsupportedError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.params import tensors
from gptcli.spec.presets import read_preset
from gptcli.spec.split import Share, check_split, split_sizes

GQA = ModelConfig("gpt2", 301, 16, 2, 24, 8, 2, 3, 90)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [GQA, replace(GQA, tied=False, kv_heads=8), replace(GQA, gated=True)], ids=str)
def test_the_slices_of_all_ranks_are_the_model(config: ModelConfig, ranks: int) -> None:
    shares = [Share(config, rank, ranks) for rank in range(ranks)]
    for tensor in tensors(config):
        slices = [share.slice(tensor.name) for share in shares]
        if slices[-1].by == "first":
            assert [slice_.shape(tensor.shape) for slice_ in slices] == [tensor.shape] + [(0,)] * (ranks - 1)
        elif slices[0].dim is None:
            assert {slice_.shape(tensor.shape) for slice_ in slices} == {tensor.shape}
        else:
            held = Counter(row for slice_ in slices for row in range(slice_.start, slice_.stop))
            shared = max(1, ranks // config.kv_heads) if slices[0].by == "kv_heads" else 1
            assert held == Counter(dict.fromkeys(range(tensor.shape[slices[0].dim]), shared))


def test_uneven_parts_differ_by_one() -> None:
    spans = [Share(GQA, rank, 4).span("vocabulary") for rank in range(4)]
    assert spans == [(0, 75), (75, 150), (150, 225), (225, 301)]
    assert {Share(GQA, rank, 4).part.mlp_width for rank in range(4)} == {22, 23}


def test_queries_stand_beside_the_keys_that_they_share() -> None:
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            share = Share(GQA, rank, ranks)
            first, last = (bound // GQA.head_dim for bound in share.span("heads"))
            keys = [bound // GQA.head_dim for bound in share.span("kv_heads")]
            assert {head // (GQA.heads // GQA.kv_heads) for head in range(first, last)} == set(range(*keys))
            assert (share.part.heads, share.part.kv_heads) == (last - first, keys[1] - keys[0])


@pytest.mark.parametrize(("heads", "kv_heads", "ranks"), [(8, 2, 3), (12, 3, 2), (8, 8, 16), (12, 6, 4)])
def test_what_can_not_be_dealt_out_is_refused_with_what_can(heads: int, kv_heads: int, ranks: int) -> None:
    config = replace(GQA, heads=heads, kv_heads=kv_heads)
    with pytest.raises(UsageError, match=f"can't be dealt out evenly to {ranks} ranks") as refused:
        Share(config, 0, ranks)
    assert ranks not in split_sizes(config)
    assert refused.value.hint.endswith(", ".join(map(str, split_sizes(config))))
    for good in split_sizes(config):
        check_split(config, good)


def test_a_model_for_paper_only_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        check_split(read_preset("gpt1"), 2)


def test_gpt3_over_eight() -> None:
    shares = [Share(read_preset("gpt3"), rank, 8) for rank in range(8)]
    whole = sum(tensor.parameters for tensor in tensors(shares[0].config))
    held = sum(share.parameters for share in shares)
    # Positions and norms stand on each; the biases of output and down on one.
    twice = 7 * (2048 * 12288 + (96 * 2 + 1) * 2 * 12288)
    assert held == whole + twice
