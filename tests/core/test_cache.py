"""The KV cache against a full recomputation: in chunks, with rows of different length, grown, selected, taken back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptcli.core.build import random_model
from gptcli.core.cache import KVCache
from gptcli.core.decode import Decoder
from gptcli.core.model import Transformer
from gptcli.errors import LimitError
from gptcli.spec.config import ModelConfig

CONFIGS = {
    "learned": ModelConfig("gpt2", 40, 32, layers=2, width=16, heads=2, kv_heads=2, head_dim=8, mlp_width=32),
    "rope, grouped": ModelConfig(
        "gpt2", 40, 32, layers=2, width=16, heads=4, kv_heads=2, head_dim=8, mlp_width=32, position="rope"
    ),
    "windows": ModelConfig(
        *("gpt2", 40, 32, 3, 16, 4, 2, 8, 32), position="rope", windows=(3, None, 6), rope_dim=4, qk_norm="head"
    ),
}
TOLERANCE = 2e-5


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request: pytest.FixtureRequest) -> Transformer:
    model = random_model(request.param, 0).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, as it may on any day."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def new_cache(model: Transformer, rows: int, capacity: int = 32) -> KVCache:
    return KVCache(model.config, rows, capacity, device="cpu", dtype=torch.float32)


def some_ids(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(40, (rows, count), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "sizes", [[1] * 12, [12], [5, 7], [1, 4, 2, 5], [6, *[1] * 6]], ids=["ones", "whole", "halves", "chunks", "prefill"]
)
@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_cached_equals_uncached(model: Transformer, sizes: list[int]) -> None:
    ids = some_ids(3, sum(sizes))
    cache = new_cache(model, 3)
    parts = [model(chunk, cache) for chunk in ids.split(sizes, dim=1)]
    assert cache.lengths == [12, 12, 12]
    close(torch.cat(parts, dim=1), model(ids))


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_rows_of_different_length_equal_each_row_alone(model: Transformer) -> None:
    """Right padding, then steps: what stands behind a shorter row, written or not, is never seen."""
    lengths = [2, 9, 5]
    prompts, more = some_ids(3, 9), some_ids(3, 6, seed=1)
    cache = new_cache(model, 3)
    model(prompts, cache)
    cache.set_lengths(lengths)
    parts = [model(more[:, t : t + 1], cache) for t in range(3)]
    parts.append(model(more[:, 3:], cache))  # a chunk, too
    assert cache.lengths == [length + 6 for length in lengths]
    got = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat([prompts[row, :length], more[row]])[None]
        close(got[row], model(alone)[0, length:])


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_decoder_pads_on_the_right_and_grows(model: Transformer) -> None:
    """Prompts of different length through the decoder, past the capacity asked for."""
    prompts = [[3, 1], [4, 1, 5, 9, 2, 6, 5], [3]]
    decoder = Decoder(model)
    logits = decoder.prefill(prompts, 8)
    rows = [list(prompt) for prompt in prompts]
    for step in range(12):
        for row, ids in enumerate(rows):
            close(logits[row], model(torch.tensor([ids]))[0, -1])
        tokens = torch.tensor([(7 * step + row) % 40 for row in range(3)])
        for ids, token in zip(rows, tokens.tolist(), strict=True):
            ids.append(token)
        logits = decoder.step(tokens)
    assert decoder.lengths == [len(ids) for ids in rows]
    assert decoder.cache is not None
    assert decoder.cache.capacity >= 19


def test_decoder_computes_equal_prompts_once(model: Transformer) -> None:
    decoder = Decoder(model)
    together = decoder.prefill([[1, 2, 3]] * 4, 8)
    assert decoder.lengths == [3] * 4
    alone = Decoder(model).prefill([[1, 2, 3]], 8)
    assert torch.equal(together, alone.expand(4, -1))
    tokens = torch.tensor([5, 6, 7, 5])
    logits = decoder.step(tokens)
    for row, token in enumerate(tokens.tolist()):
        close(logits[row], model(torch.tensor([[1, 2, 3, token]]))[0, -1])


def test_select_reorders_drops_and_repeats(model: Transformer) -> None:
    prompts, lengths = some_ids(3, 6), [6, 2, 4]
    cache = new_cache(model, 3)
    model(prompts, cache)
    cache.set_lengths(lengths)
    order = [2, 0, 2, 1]
    cache.select(order)
    assert cache.lengths == [4, 6, 4, 2]
    more = some_ids(4, 3, seed=2)
    got = torch.cat([model(more[:, t : t + 1], cache) for t in range(3)], dim=1)
    for place, row in enumerate(order):
        alone = torch.cat([prompts[row, : lengths[row]], more[place]])[None]
        close(got[place], model(alone)[0, lengths[row] :])
    assert not torch.allclose(got[0], got[2])  # the two copies go their own ways
    assert cache.lengths == [7, 9, 7, 5]


def test_select_copies(model: Transformer) -> None:
    cache = new_cache(model, 1)
    model(some_ids(1, 4), cache)
    cache.select([0, 0])
    cache.keys[0][0].fill_(0)
    assert cache.keys[0][1, :, :4].abs().min() > 0


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_grow_keeps_what_is_held(model: Transformer) -> None:
    ids = some_ids(2, 10)
    cache = new_cache(model, 2, capacity=6)
    first = model(ids[:, :6], cache)
    cache.set_lengths([6, 4])
    with pytest.raises(LimitError):
        model(ids[:, 6:7], cache)
    cache.grow(10)
    assert cache.capacity == 10
    assert cache.lengths == [6, 4]
    assert all(tensor.shape[2] == 10 for tensor in cache.keys + cache.values)
    rest = torch.cat([model(ids[:, t : t + 1], cache) for t in range(6, 10)], dim=1)
    close(torch.cat([first, rest], dim=1)[0], model(ids)[0])
    alone = torch.cat([ids[1, :4], ids[1, 6:]])[None]
    close(rest[1], model(alone)[0, 4:])


def test_without_the_memory_no_layer_has_grown(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor shrunk: who goes on with the cache has to find it as it was."""
    cache = new_cache(model, 2, capacity=6)
    model(some_ids(2, 3), cache)
    held, moves, new_zeros = [tensor.clone() for tensor in (*cache.keys, *cache.values)], cache.moves, Tensor.new_zeros

    def scarce(self: Tensor, *size: int) -> Tensor:
        if self is cache.values[-1]:
            raise MemoryError
        return new_zeros(self, *size)

    monkeypatch.setattr(Tensor, "new_zeros", scarce)
    with pytest.raises(MemoryError):
        cache.grow(60)
    monkeypatch.undo()
    assert cache.capacity == 6
    assert cache.moves > moves  # the tensors are others
    for now, before in zip((*cache.keys, *cache.values), held, strict=True):
        assert torch.equal(now, before)


def test_set_lengths_takes_tokens_back(model: Transformer) -> None:
    ids, other = some_ids(2, 8), some_ids(2, 3, seed=3)
    cache = new_cache(model, 2)
    model(ids, cache)
    cache.set_lengths([5, 5])
    got = torch.cat([model(other[:, :2], cache), model(other[:, 2:], cache)], dim=1)
    assert cache.lengths == [8, 8]
    close(got, model(torch.cat([ids[:, :5], other], dim=1))[:, 5:])
    cache.set_lengths([0, 0])
    close(model(ids, cache), model(ids))


@pytest.mark.parametrize("lengths", [[5, 5], [5, 3]])
def test_over_capacity_is_refused_and_changes_nothing(model: Transformer, lengths: list[int]) -> None:
    ids = some_ids(2, 5)
    cache = new_cache(model, 2, capacity=7)
    model(ids, cache)
    cache.set_lengths(lengths)
    before = [tensor.clone() for tensor in cache.keys + cache.values]
    with pytest.raises(LimitError, match="8 tokens do not fit a cache of 7"):
        model(some_ids(2, 3, seed=4), cache)
    assert cache.lengths == lengths
    assert all(torch.equal(a[:, :, :5], b[:, :, :5]) for a, b in zip(before, cache.keys + cache.values, strict=True))
    got = model(ids[:, :2], cache)  # and what fits still goes on rightly
    for row, length in enumerate(lengths):
        close(got[row], model(torch.cat([ids[row, :length], ids[row, :2]])[None])[0, length:])


def test_a_full_cache_takes_exactly_its_capacity(model: Transformer) -> None:
    cache = new_cache(model, 1, capacity=6)
    ids = some_ids(1, 6)
    close(model(ids, cache), model(ids))
    with pytest.raises(LimitError):
        model(ids[:, :1], cache)


def test_wrong_number_of_rows_is_refused(model: Transformer) -> None:
    with pytest.raises(ValueError, match="2 rows of ids for a cache of 3 rows"):
        model(some_ids(2, 3), new_cache(model, 3))
