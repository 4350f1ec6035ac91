"""On a CUDA device: the golden logits, the same noise, the same greedy text, and memory for the weights once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.core import sampling as sampling_module
from gptcli.core.build import Model, open_model, random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.sampling import filter_logits, gumbel_noise
from gptcli.core.settings import Sampling
from gptcli.spec.config import from_hf
from gptcli.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
MODELS = ["old", "plain", "sharded", "untied"]
FLOAT32_TOLERANCE = 1e-3
BFLOAT16_TOLERANCE = 0.15


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def opened(name: str, tokenizer: Tokenizer, device: str, dtype: str = "float32") -> Model:
    return open_model(GOLDEN / name, tokenizer, device=device, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)])
def test_golden_logits(name: str, tokenizer: Tokenizer, dtype: str, tolerance: float) -> None:
    model = opened(name, tokenizer, "cuda", dtype)
    golden = load_file(GOLDEN / name / "logits.safetensors")
    with torch.inference_mode():
        logits = model.transformer(golden["ids"].cuda())
    assert logits.device.type == "cuda"
    assert (logits.cpu().float() - golden["logits"]).abs().max() <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_that_of_the_cpu_and_of_transformers(name: str, tokenizer: Tokenizer) -> None:
    golden = json.loads((GOLDEN / name / "greedy.json").read_text())
    request = Request(golden["prompt"], seed=0, max_tokens=200, ignore_eos=True)
    texts = [
        [step.token for step in generate(opened(name, tokenizer, device), [request], Sampling(temperature=0))]
        for device in ("cuda", "cpu")
    ]
    assert texts == [golden["ids"], golden["ids"]]


def test_noise_is_that_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randint(2**32, (1_000_000,), generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert torch.equal(sampling_module._mix(values.cuda()).cpu(), sampling_module._mix(values))
    integers: list[torch.Tensor] = []
    mix = sampling_module._mix

    def kept(x: torch.Tensor) -> torch.Tensor:
        integers.append(mix(x))
        return integers[-1]

    monkeypatch.setattr(sampling_module, "_mix", kept)
    seeds, positions = [0, 1, 2**32 + 5, 2**63 - 1], [0, 1023, 7, 100]
    on_cpu, on_cuda = (gumbel_noise(seeds, positions, 50_257, device) for device in ("cpu", "cuda"))
    first_cpu, last_cpu, first_cuda, last_cuda = integers
    assert torch.equal(first_cuda.cpu(), first_cpu)
    assert torch.equal(last_cuda.cpu(), last_cpu)
    assert on_cuda.isfinite().all()
    assert (on_cuda.cpu() - on_cpu).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "chain", [Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, logit_bias={3: 2.0})]
)
def test_the_chain_is_that_of_the_cpu(chain: Sampling) -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    on_cuda = filter_logits(logits.cuda(), chain).cpu()
    torch.testing.assert_close(on_cuda, filter_logits(logits, chain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "chain", [Sampling(), Sampling(temperature=0.8, top_k=40, repetition_penalty=1.2, presence_penalty=0.2)]
)
@pytest.mark.parametrize("slide", [False, True])
def test_a_batch_equals_its_rows(tokenizer: Tokenizer, chain: Sampling, slide: bool) -> None:
    model = opened("plain", tokenizer, "cuda")
    requests = [
        Request([40 + i for i in range(length)], seed=length, max_tokens=limit, ignore_eos=True)
        for length, limit in ((3, 60), (1, 20), (30, 300), (11, 5))
    ]
    rows: list[list[Any]] = [[] for _ in requests]
    for step in generate(model, requests, chain, slide=slide):
        rows[step.row].append((step.token, step.text, step.finish, step.slid))
    for request, row in zip(requests, rows, strict=True):
        alone = generate(model, [request], chain, slide=slide)
        assert row == [(step.token, step.text, step.finish, step.slid) for step in alone]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_device_memory_for_the_weights_once(tmp_path: Path, tokenizer: Tokenizer, dtype: str) -> None:
    raw = {"model_type": "gpt2", "vocab_size": 8000, "n_positions": 512, "n_embd": 512, "n_layer": 8, "n_head": 8}
    source = random_model(from_hf(raw), 0)
    save_folder(source, tmp_path / "model", dtype=torch.float32)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = open_model(tmp_path / "model", tokenizer, device="cuda", dtype=dtype)
    size = 4 if dtype == "float32" else 2
    weights = sum(parameter.numel() for parameter in model.transformer.parameters()) * size
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert weights <= held <= 1.02 * weights
    # One tensor in passing, where its type is changed on the way.
    largest = max(parameter.numel() for parameter in model.transformer.parameters()) * 4
    assert peak <= 1.02 * weights + largest


def test_auto_takes_cuda(tiny_folder: Path, tokenizer: Tokenizer) -> None:
    model = open_model(tiny_folder, tokenizer)
    assert model.device.type == "cuda"
    assert all(parameter.is_cuda for parameter in model.transformer.parameters())
