"""On a CUDA device: steps captured in graphs are the eager ones, and are captured in an instant."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gptcli.core import graphs
from gptcli.core.attention import _last_queries, attention_pattern, gather
from gptcli.core.build import Model, new_transformer, open_model, random_model
from gptcli.core.decode import Decoder
from gptcli.core.generate import generate
from gptcli.core.graphs import DeviceLoop
from gptcli.core.model import Transformer
from gptcli.core.quantize import KINDS, quantize_
from gptcli.core.requests import Request, Step
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping
from gptcli.spec.config import from_hf
from gptcli.spec.presets import read_preset
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_generate import CHAINS, PROMPTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RAW = {"model_type": "gpt2", "vocab_size": 1000, "n_positions": 512, "n_embd": 128, "n_layer": 3, "n_head": 4}


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_LEAST_SEEN", 4)
    monkeypatch.setattr(graphs, "_LEAST_CAPACITY", 8)


@pytest.fixture
def model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The tiny model with weights enlarged, so that its choices differ by more than rounding."""
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cuda", dtype="float32")
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    model.stepping = Stepping(model.transformer)
    monkeypatch.setattr(graphs, "pays", lambda *counts: True)
    return model


def eagerly(model: Model, requests: Sequence[Request], sampling: Sampling, **more: object) -> list[Step]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "pays", lambda *counts: False)
        return list(generate(model, requests, sampling, **more))  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("slide", [False, True])
def test_text_is_that_of_eager_steps(model: Model, sampling: Sampling, slide: bool) -> None:
    """Rows of different length that end at different times, through several graphs and a cache that grows."""
    requests = [
        Request(prompt, seed=2**40 + 11 * i, max_tokens=limit, ignore_eos=i == 0)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, [90, 25, 70, 3], strict=True))
    ]
    wanted = eagerly(model, requests, sampling, slide=slide)
    for _ in range(2):  # captured, then replayed
        assert list(generate(model, requests, sampling, slide=slide)) == wanted
    loop = model.stepping._loop
    assert loop is not None
    assert loop.failed is None
    assert loop.graphs >= 1


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", *KINDS])
def test_logits_are_those_of_eager_steps(kind: str) -> None:
    transformer = random_model(from_hf(RAW), 0).requires_grad_(False).cuda()
    transformer = transformer.to(torch.float32 if kind == "float32" else torch.bfloat16)
    transformer.tie()
    if kind in KINDS:
        quantize_(transformer, kind)
    prompts = [[1, 2, 3, 4, 5], [7], [8, 9]]
    loop = DeviceLoop(transformer, Sampling(temperature=0), 3, 8)
    decoder, twin = Decoder(transformer), Decoder(transformer)
    logits = decoder.prefill(prompts, 8)
    assert decoder.cache is not None
    twin.prefill(prompts, 64)
    loop.start(decoder.cache, logits, [0, 1, 2], [5, 1, 2], None, ahead=False)
    tokens = loop.next()
    for _ in range(30):
        wanted = twin.step(torch.tensor(tokens, device="cuda"))
        tokens = loop.next()
        found, _ = loop.drawn()
        # The cuts of a sum differ with the number of places that are read.
        bound = 1e-4 if kind == "float32" else 0.05 * float(wanted.float().std())
        assert (found.float() - wanted.float()).abs().max() <= bound
    assert loop.failed is None
    assert loop.graphs >= 3
    assert loop.capacity > 8


def test_log_probabilities_come_with_their_tokens(model: Model) -> None:
    requests = [Request(prompt, seed=i, max_tokens=8 + 4 * i) for i, prompt in enumerate(PROMPTS)]
    ours = list(generate(model, requests, Sampling(), logprobs=2))
    theirs = eagerly(model, requests, Sampling(), logprobs=2)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.row, one.token, one.finish) == (other.row, other.token, other.finish)
        assert one.chosen is not None
        assert other.chosen is not None
        assert one.chosen.id == other.chosen.id
        assert abs(one.chosen.logprob - other.chosen.logprob) < 1e-3


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_capturing_takes_less_than_two_seconds(name: str) -> None:
    transformer = random_weights(name)
    start = time.perf_counter()
    loop = DeviceLoop(transformer, Sampling(), 1, 160)
    decoder = Decoder(transformer)
    logits = decoder.prefill([[1, 2, 3]], 160)
    assert decoder.cache is not None
    loop.start(decoder.cache, logits, [0], [3], None)
    for _ in range(150):
        loop.next()
    torch.cuda.synchronize()
    assert loop.failed is None
    assert loop.graphs == 2
    assert loop.capture_seconds < 2
    assert time.perf_counter() - start < 10


def random_weights(name: str) -> Transformer:
    with torch.device("meta"):
        transformer = new_transformer(read_preset(name)).bfloat16()
    transformer = transformer.to_empty(device="cuda").requires_grad_(False)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    transformer.tie()
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("dim", [64, 12])
def test_a_chunk_sees_what_the_slow_reference_sees(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """By the flash kernel, which has its own idea of causal, and without it."""
    query = torch.randn(2, heads, 300, dim, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, kv_heads, 700, dim, device="cuda", dtype=dtype) for _ in range(2))
    wanted = gather(attention_pattern(query, key, "causal"), value).float()
    bound = 1e-4 if dtype is torch.float32 else 0.03
    assert (_last_queries(query, key, value).float() - wanted).abs().max() < bound


def test_long_prompts_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = random_model(from_hf(RAW), 0).requires_grad_(False).cuda()
    prompts = [[i % 1000 for i in range(500)], [3] * 60]
    found = []
    for size in (1000, 130):
        monkeypatch.setattr("gptcli.core.decode.chunk_size", lambda *counts, size=size: size)
        found.append(Decoder(transformer).prefill(prompts, 512))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_compiled_steps_have_the_same_text(model: Model) -> None:
    requests = [Request(PROMPTS[0], seed=1, max_tokens=40, ignore_eos=True)]
    wanted = eagerly(model, requests, Sampling(temperature=0))
    model.stepping = Stepping(model.transformer, compile=True)
    assert list(generate(model, requests, Sampling(temperature=0))) == wanted
    assert not model.stepping.fell_back, model.stepping.tell()
    assert model.stepping._loop is not None
    assert model.stepping._loop.failed is None
