"""The lean forward against the transformer's own, in all that a decoder does with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptcli.core import attention, lean
from gptcli.core.attention import attention_pattern, causal_in_blocks, gather
from gptcli.core.cache import KVCache
from gptcli.core.lean import Lean, worth_packing
from gptcli.core.model import Transformer
from gptcli.core.quantize import quantize_
from gptcli.errors import LimitError
from gptcli.spec.config import ModelConfig
from tests.core.test_model import CONFIGS, GPT2, every_config, some_ids, visible_model

Forward = Callable[..., Tensor]

# Largest error against the twin, of the largest logit. float32 differs by rounding alone; bfloat16 by what is rounded
# where; int8 and int4 by how many rows at a time are rounded to 8 bits, and by a stream that stays in float32. A cache
# that is rounded where the twin's is not makes some inputs of int8 fall to the next of their 8 bits.
WITHIN = {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.05, "int4": 0.03, "int8, rounded cache": 0.2}


def model_of(config: ModelConfig, kind: str) -> Transformer:
    model = visible_model(config)
    if kind == "bfloat16":
        model = model.bfloat16()
        model.tie()
    return quantize_(model, kind) if kind.startswith("int") else model


def cache_for(model: Transformer, rows: int, capacity: int = 32, dtype: torch.dtype | None = None) -> KVCache:
    dtype = dtype or model.embedding.weight.dtype
    return KVCache(model.config, rows, capacity, device="cpu", dtype=dtype)


def assert_within(kind: str, found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    assert error < WITHIN[kind], f"{error}"


every_kind = pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])


@every_kind
@every_config
def test_whole_sequences_with_and_without_a_cache(kind: str, config: ModelConfig) -> None:
    model = model_of(config, kind)
    ids = some_ids(config)
    wanted = model(ids)
    made = Lean(model)
    assert_within(kind, made(ids), wanted)
    cache, same = cache_for(model, 2), cache_for(model, 2)
    assert_within(kind, made(ids, cache), wanted)
    model(ids, same)
    assert cache.lengths == [9, 9]
    for ours, theirs in zip(cache.keys + cache.values, same.keys + same.values, strict=True):
        assert_within(kind, ours, theirs)


@every_kind
@every_config
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_of_rows_of_different_length_then_steps(
    kind: str, config: ModelConfig, cache_dtype: torch.dtype
) -> None:
    """All that a decoder does: a padded prefill, steps where rows differ, growth, rows let go and doubled."""
    model = model_of(config, kind)
    made = Lean(model)
    if cache_dtype is torch.bfloat16:  # what is kept is rounded so
        kind = "int8, rounded cache" if kind == "int8" else "bfloat16"
    caches = cache_for(model, 3, 10, cache_dtype), cache_for(model, 3, 10)
    ids, lengths = some_ids(config, rows=3), [9, 2, 6]

    def both(*args: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        return made(*args, caches[0], **named), model(*args, caches[1], **named)

    assert_within(kind, *both(ids, last=torch.tensor(lengths) - 1))
    for cache in caches:
        cache.set_lengths(lengths)
    assert_within(kind, *both(ids[:, :1]))
    for cache in caches:
        cache.grow(20)
        cache.select([2, 1, 1, 0])
    for token in (3, 4, 5):
        assert_within(kind, *both(torch.full((4, 1), token)))
    assert caches[0].lengths == caches[1].lengths == [10, 6, 6, 13]
    for cache in caches:
        cache.select([2])
    assert_within(kind, *both(torch.tensor([[7]])))
    assert_within(kind, *both(torch.tensor([[8, 9, 10]])))
    assert_within(kind, *both(torch.tensor([[8, 9, 10]]), last=torch.tensor([1])))


@every_config
def test_float32_is_the_same_to_1e_4(config: ModelConfig) -> None:
    model = visible_model(config)
    ids = some_ids(config)
    torch.testing.assert_close(Lean(model)(ids), model(ids), atol=1e-4, rtol=0)


def greedy(forward: Forward, model: Transformer, ids: Tensor, count: int, dtype: torch.dtype) -> list[list[int]]:
    cache = cache_for(model, len(ids), ids.shape[1] + count, dtype)
    token = forward(ids, cache, last=torch.full((len(ids),), ids.shape[1] - 1)).argmax(-1)
    made = [token]
    for _ in range(count - 1):
        made.append(forward(made[-1][:, None], cache)[:, -1].argmax(-1))
    return torch.stack(made, 1).tolist()


@every_config
def test_greedy_text_is_the_same(config: ModelConfig) -> None:
    model = visible_model(config)
    made = Lean(model)
    ids = some_ids(config, rows=3, count=5)
    assert greedy(made, model, ids, 20, made.cache_dtype) == greedy(model, model, ids, 20, torch.float32)


@every_config
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_without_onednn_it_is_the_same(config: ModelConfig, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise NotImplementedError

    monkeypatch.setattr(lean, "_Packed", missing)
    model = model_of(config, kind)
    ids = some_ids(config)
    assert_within(kind, Lean(model)(ids), model(ids))


def test_matrices_are_packed_where_onednn_is_there() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    layer = Lean(visible_model(CONFIGS["gpt2"]))._layers[0]
    for each in (layer._qkv, layer._output, layer._up, layer._down):
        assert isinstance(each, lean._Packed)


def test_a_long_prompt_in_bfloat16_goes_by_blocks() -> None:
    config = ModelConfig(**{**GPT2, "context": 400})
    model = model_of(config, "bfloat16")
    ids = some_ids(config, count=300)
    blocks = []

    def noted(*args: Tensor) -> Tensor:
        blocks.append(args[0].shape[2])
        return causal_in_blocks(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "causal_in_blocks", noted)
        assert_within("bfloat16", Lean(model)(ids), model(ids))
    assert blocks == [300, 300]


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_blocks_are_the_slow_reference(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, count, 8, generator=generator) for _ in range(3))
    wanted = gather(attention_pattern(query, key, "causal"), value)
    torch.testing.assert_close(causal_in_blocks(query, key, value), wanted, atol=1e-5, rtol=0)
    assert attention._BLOCK == 128


def test_what_does_not_fit_is_refused_before_anything_is_computed() -> None:
    model = visible_model(CONFIGS["gpt2"])
    cache = cache_for(model, 1, 4)
    with pytest.raises(LimitError):
        Lean(model)(some_ids(model.config, rows=1), cache)
    assert cache.lengths == [0]


def test_the_transformer_stays_as_it_is() -> None:
    model = visible_model(CONFIGS["llama-like"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Lean(model)(some_ids(model.config))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("counts", "worth"),
    [((5, 1), False), ((5, 8, 4), False), ((5, 64), True), ((5, -1), True), ((800, 1), True), ((100, 1, 8), True)],
)
def test_small_jobs_pack_nothing(counts: tuple[int, ...], worth: bool) -> None:
    assert worth_packing(*counts) == worth


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_quantized_prompts_go_in_pieces_and_are_the_same(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    made = Lean(model_of(config, "int8"))
    ids = some_ids(config, rows=rows)
    whole = made(ids)
    monkeypatch.setattr(lean, "_PIECE", 4)
    torch.testing.assert_close(made(ids), whole, atol=1e-5, rtol=0)


def test_gelu_in_small_steps_is_gelu() -> None:
    x = torch.cat((torch.linspace(-12, 12, 10_001), torch.tensor([-1e30, -1e4, 1e4, 1e30])))
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(lean._gelu_tanh(x).double(), wanted, atol=1e-6, rtol=1e-6)
