"""The loop that draws its own tokens against the ordinary decoder: on a CPU it is the same step, not captured."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gptcli.core import graphs
from gptcli.core.build import Model, open_model
from gptcli.core.cache import KVCache, StaticCache
from gptcli.core.decode import Decoder
from gptcli.core.device_sampling import DeviceSampler, device_noise_keys, seed_keys
from gptcli.core.generate import generate
from gptcli.core.graphs import DeviceLoop, fitting
from gptcli.core.model import Transformer
from gptcli.core.quantize import KINDS, quantize_
from gptcli.core.requests import Request, Step
from gptcli.core.sampling import History, gumbel_noise, noise_keys, sample
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_generate import CHAINS, PROMPTS
from tests.core.test_model import CONFIGS, GPT2, every_config, visible_model

SEEDS = [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1, 2**63 + 7]
POSITIONS = [0, 1, 7, 1023, 100, 2**31 - 1]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets so small that a short text passes several."""
    monkeypatch.setattr(graphs, "_LEAST_SEEN", 4)
    monkeypatch.setattr(graphs, "_LEAST_CAPACITY", 8)


@pytest.fixture
def model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The tiny model with weights enlarged, so that its choices differ by more than rounding; every job by a loop."""
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    model.stepping = Stepping(model.transformer)
    monkeypatch.setattr(graphs, "pays", lambda *counts: True)
    return model


def plainly(model: Model, requests: Sequence[Request], sampling: Sampling, **more: object) -> list[Step]:
    """What the ordinary decoder makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "pays", lambda *counts: False)
        model.stepping = Stepping(model.transformer)
        return list(generate(model, requests, sampling, **more))  # type: ignore[arg-type]


def test_noise_keys_are_those_of_the_host() -> None:
    seeds = torch.tensor([seed_keys(seed) for seed in SEEDS])
    first, second = device_noise_keys(seeds[:, 0], seeds[:, 1], torch.tensor(POSITIONS))
    found = list(zip(first.tolist(), second.tolist(), strict=True))
    assert found == [noise_keys(seed, position) for seed, position in zip(SEEDS, POSITIONS, strict=True)]


@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())
def test_what_is_drawn_is_what_sample_draws(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [[1, 2, 2, 9], [5], [7, 8], [0], [3], [4]]
    history = History(prompts, 500, torch.device("cpu"))
    sampler = DeviceSampler(sampling, 6, 500, torch.device("cpu"))
    sampler.start(SEEDS, [0, 1, 2, 3, 4, 5], history)
    for step in range(12):
        logits = 3 * torch.randn(6, 500, generator=generator)
        wanted = sample(logits, sampling, SEEDS, [step + row for row in range(6)], history)
        history.add(wanted)
        noise = sampler.noise()
        if sampling.temperature > 0:
            assert noise is not None
            assert torch.equal(noise, gumbel_noise(SEEDS, [step + row for row in range(6)], 500, "cpu"))
        assert torch.equal(sampler.draw(logits, noise), wanted)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_over_a_static_cache_have_the_transformers_logits(config: ModelConfig, dtype: torch.dtype) -> None:
    """Rows of different length; places that hold nothing change nothing, even where memory held rubbish."""
    model = visible_model(config).to(dtype)
    model.tie()
    lengths = [5, 2, 7]
    cache = KVCache(config, 3, 16, device="cpu", dtype=dtype)
    ids = torch.arange(21).view(3, 7) % config.vocab_size
    model(ids, cache)
    cache.set_lengths(lengths)
    twin = KVCache(config, 3, 16, device="cpu", dtype=dtype)
    for mine, theirs in zip(twin.keys + twin.values, cache.keys + cache.values, strict=True):
        mine.copy_(theirs)
        mine[:, :, 7:] = 1e4
    static = StaticCache(twin, 12, torch.tensor(lengths), most=16)
    for token in (3, 4, 5, 6):
        tokens = torch.full((3, 1), token)
        found, wanted = model(tokens, static), model(tokens, cache)
        bound = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(found, wanted, atol=bound, rtol=bound)
    assert static.lengths.tolist() == cache.lengths == [9, 6, 11]


def test_a_row_that_is_full_is_held_at_its_last_place() -> None:
    """Rows that nobody reads any more go on beside the others, never past the positions that the model has."""
    model = visible_model(CONFIGS["gpt2"])
    cache = KVCache(model.config, 2, 8, device="cpu", dtype=torch.float32)
    static = StaticCache(cache, 8, torch.tensor([7, 2]), most=6)
    for _ in range(3):
        positions, mask = static.begin(torch.zeros(2, 1, dtype=torch.int64))
        static.advance(1)
    assert positions.tolist() == [[5], [4]]
    assert (mask == 0).sum(-1).flatten().tolist() == [6, 5]
    with pytest.raises(ValueError, match="one token"):
        static.begin(torch.zeros(2, 2, dtype=torch.int64))


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("slide", [False, True])
def test_generated_steps_are_the_ordinary_decoders(model: Model, sampling: Sampling, slide: bool) -> None:
    """Rows of different length that end at different times, in a cache that grows, past the context too."""
    limits = [90, 25, -1 if not slide else 70, 3]
    requests = [
        Request(prompt, seed=2**40 + 11 * i, max_tokens=limit, ignore_eos=i == 0)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    ours = list(generate(model, requests, sampling, slide=slide))
    assert model.stepping._loop is not None
    assert len(model.stepping._loop._steps) >= 1
    assert ours == plainly(model, requests, sampling, slide=slide)
    model.stepping = Stepping(model.transformer)
    for row, request in enumerate(requests):
        alone = list(generate(model, [request], sampling, slide=slide))
        assert [step.token for step in alone] == [step.token for step in ours if step.row == row]


@pytest.mark.usefixtures("small_buckets")
def test_log_probabilities_are_those_of_the_tokens(model: Model) -> None:
    requests = [Request(prompt, seed=i, max_tokens=5 + 4 * i) for i, prompt in enumerate(PROMPTS)]
    ours = list(generate(model, requests, Sampling(), logprobs=3))
    theirs = plainly(model, requests, Sampling(), logprobs=3)
    assert [(step.row, step.token, step.text, step.finish) for step in ours] == [
        (step.row, step.token, step.text, step.finish) for step in theirs
    ]
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip((one.chosen, *one.top), (other.chosen, *other.top), strict=True)
        for mine, wanted in pairs:
            assert mine is not None
            assert wanted is not None
            assert mine.id == wanted.id
            assert math.isclose(mine.logprob, wanted.logprob, abs_tol=1e-4)


def started(transformer: Transformer, loop: DeviceLoop, prompts: list[list[int]], capacity: int = 12) -> Tensor:
    decoder = Decoder(transformer)
    logits = decoder.prefill(prompts, capacity)
    assert decoder.cache is not None
    loop.start(decoder.cache, logits, list(range(len(prompts))), [len(prompt) for prompt in prompts], None)
    return logits


@every_config
@pytest.mark.usefixtures("small_buckets")
def test_a_loop_grows_and_serves_again(config: ModelConfig) -> None:
    """The second text is what it would be in a loop that held nothing before."""
    transformer = visible_model(config)
    loop = DeviceLoop(transformer, Sampling(temperature=0), 2, 6)
    texts = []
    for prompts in ([[1, 2, 3], [4]], [[9], [8, 7]], [[1, 2, 3], [4]]):
        started(transformer, loop, prompts)
        texts.append([loop.next() for _ in range(18)])
    assert loop.capacity == 32
    assert texts[0] == texts[2] != texts[1]
    fresh = DeviceLoop(transformer, Sampling(temperature=0), 2, 32)
    started(transformer, fresh, [[9], [8, 7]])
    assert [fresh.next() for _ in range(18)] == texts[1]


@pytest.mark.usefixtures("small_buckets")
def test_attention_reads_no_more_places_than_the_next_power_of_two(model: Model) -> None:
    list(generate(model, [Request(PROMPTS[0], 0, 40, ignore_eos=True)], Sampling()))
    assert model.stepping._loop is not None
    assert sorted(model.stepping._loop._steps) == [4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("capacity", "context", "fits"),
    [(1, 1024, 256), (257, 1024, 512), (700, 1024, 1024), (60, 64, 64), (900, 1000, 1000)],
)
def test_room_is_a_power_of_two_or_the_context(capacity: int, context: int, fits: int) -> None:
    assert fitting(capacity, context) == fits


def test_a_step_is_asked_for_before_its_forerunner_is_read_but_never_past_the_context(model: Model) -> None:
    context = model.config.context
    transformer = model.transformer
    loop = DeviceLoop(transformer, Sampling(temperature=0), 1, context)
    started(transformer, loop, [list(range(1, context - 1))], context)  # two places are left
    assert loop._cache.lengths == [context - 2]
    held = []
    for _ in range(3):
        loop.next()
        held.append((loop._cache.lengths[0], loop._flight is not None))
    assert held == [(context - 1, True), (context, True), (context, False)]


def test_a_loop_is_kept_and_never_shared(model: Model) -> None:
    def loop() -> DeviceLoop | None:
        return model.stepping._loop

    one = generate(model, [Request(PROMPTS[0], 0, 30, ignore_eos=True)], Sampling())
    first = [next(one) for _ in range(3)]
    mine = loop()
    other = list(generate(model, [Request(PROMPTS[1], 0, 30, ignore_eos=True)], Sampling()))
    assert loop() is not mine
    assert [*first, *one] == plainly(model, [Request(PROMPTS[0], 0, 30, ignore_eos=True)], Sampling())
    assert other == plainly(model, [Request(PROMPTS[1], 0, 30, ignore_eos=True)], Sampling())
    list(generate(model, [Request(PROMPTS[1], 0, 30)], Sampling()))
    kept = loop()
    gc.collect()
    list(generate(model, [Request(PROMPTS[2], 5, 20)], Sampling()))
    assert loop() is kept
    list(generate(model, [Request(PROMPTS[2], 5, 20)], Sampling(top_k=3)))
    assert loop() is not kept


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_models_run_in_a_loop(kind: str) -> None:
    config = ModelConfig(**GPT2)
    transformer = quantize_(visible_model(config), kind)
    loop = DeviceLoop(transformer, Sampling(temperature=0), 1, 20)
    logits = started(transformer, loop, [[1, 2, 3]])
    decoder = Decoder(transformer)
    decoder.prefill([[1, 2, 3]], 20)
    tokens = [logits.argmax(-1)]
    for _ in range(9):
        tokens.append(decoder.step(tokens[-1]).argmax(-1))
    assert [loop.next() for _ in range(10)] == [token.tolist() for token in tokens]


class AsksNothing(TorchDispatchMode):
    """Refuses what makes a device wait for the host or the host for a device, which no graph can hold."""

    ASKING = ("item", "_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in self.ASKING, f"{name} within a captured step"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype is torch.int64 for index in args[1])
        return function(*args, **(kwargs or {}))


@every_config
@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())
@torch.no_grad()
def test_a_step_asks_nothing_of_the_host(config: ModelConfig, sampling: Sampling) -> None:
    transformer = visible_model(config)
    loop = DeviceLoop(transformer, sampling, 2, 16)
    started(transformer, loop, [[1, 2, 3], [4]])
    static = StaticCache(loop._cache, 16, loop._lengths, 16)
    mode = AsksNothing()  # type: ignore[no-untyped-call]
    with mode:
        loop._step(static)
    with pytest.raises(AssertionError, match="within a captured step"), mode:
        loop._lengths.max().item()


def test_only_cuda_and_more_than_a_few_tokens_pay() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not graphs.pays(cpu, 1000, 1)
    assert not graphs.pays(cuda, 8, 1)
    assert graphs.pays(cuda, 128, 1)
    assert not graphs.pays(cuda, 128, 1000)


def test_there_is_nothing_to_draw_before_a_prefill(model: Model) -> None:
    with pytest.raises(ValueError, match="prefill"):
        Decoder(model.transformer).draw_on_device(torch.zeros(1, 5), Sampling(), [0], [1], None, ahead=True)
