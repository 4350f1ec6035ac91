"""What a row gives natively is the same to the bit: alone, in a batch of any size, and several tokens in one step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gptcli.core.cache import KVCache
from gptcli.core.model import Transformer
from gptcli.core.native import NativeMatrix, NativeStep
from gptcli.core.native_build import Library
from gptcli.errors import LimitError
from tests.core.test_model import CONFIGS, some_ids, visible_model
from tests.core.test_native import KINDS, Quantized, in_kind, library, some_cache  # noqa: F401  (fixtures)

MODELS = {name: CONFIGS[name] for name in ("gpt2", "llama-like")}
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def copied(cache: KVCache, model: Transformer) -> KVCache:
    weight = model.embedding.weight
    copy = KVCache(model.config, len(cache.lengths), cache.capacity, device="cpu", dtype=weight.dtype)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        copy.keys[layer].copy_(keys)
        copy.values[layer].copy_(values)
    copy.set_lengths(cache.lengths)
    return copy


def held(cache: KVCache) -> list[torch.Tensor]:
    """The keys and values that are real, row after row."""
    tensors = cache.keys + cache.values
    return [tensor[row, :, :length] for tensor in tensors for row, length in enumerate(cache.lengths)]


@every_kind
def test_a_product_is_the_same_in_any_company(library: Library, kind: str) -> None:  # noqa: F811
    torch.manual_seed(3)
    linear = nn.Linear(200, 50)
    matrix: nn.Module = linear.to(torch.bfloat16) if kind == "bfloat16" else linear
    if kind.startswith("int"):
        matrix = Quantized(linear, kind)
    x = torch.randn(33, 200)
    product = NativeMatrix(library, matrix)
    alone = torch.cat([product(x[row : row + 1]) for row in range(33)])
    for rows in range(1, 34):
        assert torch.equal(product(x[:rows]), alone[:rows])


@every_kind
@every_model
def test_a_row_is_the_same_in_any_company(library: Library, kind: str, name: str) -> None:  # noqa: F811
    """Two steps of a row alone, and of the same among up to 32 others, wherever it stands."""
    model = in_kind(visible_model(MODELS[name]), kind)
    step = NativeStep(library, model, 2)
    lengths = [1 + row * 5 % 13 for row in range(33)]
    whole, ids = some_cache(model, lengths, 16), some_ids(model.config, 33, 2, seed=1)

    def steps(rows: list[int]) -> torch.Tensor:
        cache = copied(whole, model)
        cache.select(rows)
        return torch.stack([step.step(ids[rows, place], cache) for place in range(2)])  # [2, B, V]

    alone = torch.cat([steps([row]) for row in range(33)], 1)
    for rows in range(2, 34):
        chosen = [(7 * rows + place) % 33 for place in range(rows)]
        assert torch.equal(steps(chosen), alone[:, chosen])


@every_kind
@every_model
@pytest.mark.parametrize("threads", [1, 3])
def test_several_tokens_in_one_step_are_the_steps_one_by_one(
    library: Library,  # noqa: F811
    kind: str,
    name: str,
    threads: int,
) -> None:
    """Logits and cache, of one row and of rows that bring different numbers of tokens."""
    model = in_kind(visible_model(MODELS[name]), kind)
    step = NativeStep(library, model, threads)
    for lengths, counts in (([5], [2]), ([5], [9]), ([3], [17]), ([9, 1, 4], [1, 7, 3])):
        whole = some_cache(model, lengths, 24)
        tokens = [some_ids(model.config, 1, count, seed=row)[0].tolist() for row, count in enumerate(counts)]
        singly, rows = [], []
        for row, ids in enumerate(tokens):
            cache = copied(whole, model)
            cache.select([row])
            singly += [step.step(torch.tensor([id_]), cache) for id_ in ids]
            rows.append(cache)
        cache = copied(whole, model)
        each = torch.cat(singly)
        assert torch.equal(step.verify(tokens, cache), each)
        last = [sum(counts[: row + 1]) - 1 for row in range(len(counts))]
        assert torch.equal(step.fill(tokens, copied(whole, model)), each[last])
        assert cache.lengths == [length + count for length, count in zip(lengths, counts, strict=True)]
        for row, alone in enumerate(rows):
            ours = copied(cache, model)
            ours.select([row])
            assert all(torch.equal(mine, other) for mine, other in zip(held(ours), held(alone), strict=True))


def test_tokens_taken_back_leave_nothing_behind(library: Library) -> None:  # noqa: F811
    model = visible_model(MODELS["llama-like"])
    step = NativeStep(library, model, 2)
    cache, clean = (some_cache(model, [6], 20) for _ in range(2))
    step.verify([[3, 4, 5, 6, 7]], cache)
    cache.set_lengths([8])
    step.verify([[3, 4]], clean)
    for token in (9, 10, 11):
        assert torch.equal(step.verify([[token]], cache), step.step(torch.tensor([token]), clean))


def test_what_has_no_room_is_refused(library: Library) -> None:  # noqa: F811
    model = visible_model(MODELS["gpt2"])
    step = NativeStep(library, model, 1)
    with pytest.raises(LimitError, match="9 tokens"):
        step.verify([[1], [1, 2, 3, 4, 5]], some_cache(model, [2, 4], 8))
    with pytest.raises(IndexError, match="position 32"):
        step.verify([[1, 2, 3]], some_cache(model, [30], 40))
    with pytest.raises(IndexError):
        step.verify([[1, model.config.vocab_size]], some_cache(model, [3], 8))
    with pytest.raises(ValueError, match="2 tokens for a cache of 1"):
        step.verify([[1], [2]], some_cache(model, [3], 8))
    with pytest.raises(ValueError, match="without a token"):
        step.verify([[1], []], some_cache(model, [3, 3], 8))
