"""How steps are taken: the choice from counts, and that the text is the slow twin's whichever is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.core import native, native_build
from gptcli.core.build import Model, open_model
from gptcli.core.decode import Decoder
from gptcli.core.generate import generate
from gptcli.core.native import NativeStep
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping, pick_threads, ways
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_model import CONFIGS, GPT2, visible_model


def test_ways_from_counts() -> None:
    assert ways(tokens=1, rows=1, packed=()) == ("transformer",)
    assert ways(tokens=15, rows=16, packed=()) == ("transformer",)
    assert ways(tokens=128, rows=1, packed=()) == ("native", "lean", "transformer")
    assert ways(tokens=1, rows=1, packed=("native",)) == ("native", "transformer")
    assert ways(tokens=1, rows=1, packed=("lean",)) == ("lean", "transformer")
    assert ways(tokens=128, rows=1000, packed=("native",)) == ("lean", "transformer")


def test_a_thread_has_to_be_worth_its_waits() -> None:
    tiny = visible_model(CONFIGS["gpt2"])
    assert pick_threads(tiny, 8) == 1
    axes = {**GPT2, "width": 256, "heads": 4, "head_dim": 64, "kv_heads": 4, "mlp_width": 1024}
    larger = visible_model(ModelConfig(**axes))
    assert pick_threads(larger, 1) == 1
    assert pick_threads(larger, 2) == 2
    assert 2 < pick_threads(larger, 64) < 64
    assert pick_threads(larger.bfloat16(), 64) < pick_threads(larger.float(), 64)


@pytest.fixture
def model(tiny_folder: Path, built: Path) -> Model:
    """The tiny model with weights enlarged, so that its choices differ by more than rounding; and a native step."""
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32", native=built)
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    return model


PROMPTS = [[40, 41, 42], [50], [60 + i for i in range(20)], [270, 280, 290, 5, 6, 7, 8]]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(), Sampling(top_k=20, frequency_penalty=0.3)])
@pytest.mark.parametrize("slide", [False, True])
def test_generated_text_is_the_slow_twins(model: Model, sampling: Sampling, slide: bool) -> None:
    """Alone and in a batch whose rows end at different times; past the context, too."""
    limits = [90, 25, 70, 3]
    requests = [
        Request(prompt, seed=11 * i, max_tokens=limit, ignore_eos=i == 0)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    ours = list(generate(model, requests, sampling, slide=slide))
    assert model.stepping.told.startswith("native step")
    alone = [list(generate(model, [request], sampling, slide=slide)) for request in requests]
    model.stepping = Stepping(model.transformer)
    wanted = list(generate(model, requests, sampling, slide=slide))
    assert model.stepping.told.startswith("PyTorch step")
    assert ours == wanted
    for row, steps in enumerate(alone):
        assert [step.token for step in steps] == [step.token for step in wanted if step.row == row]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling()])
def test_the_lean_text_is_the_slow_twins(model: Model, sampling: Sampling) -> None:
    requests = [Request(prompt, seed=11 * i, max_tokens=40, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    model.stepping = Stepping(model.transformer, lean=True)
    ours = list(generate(model, requests, sampling))
    assert model.stepping.told.startswith("lean PyTorch step")
    model.stepping = Stepping(model.transformer)
    assert ours == list(generate(model, requests, sampling))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_models_keep_a_short_cache_where_steps_are_native(tiny_folder: Path, built: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    model = open_model(tiny_folder, tokenizer, device="cpu", dtype="float32", quantize=kind, native=built)
    kept = []
    for folder in (built, None):
        decoder = Decoder(model.transformer, Stepping(model.transformer, folder, lean=True))
        logits = [decoder.prefill([PROMPTS[2], PROMPTS[1]], 60)]
        logits += [decoder.step(torch.tensor([token, token])) for token in (7, 90)]
        assert decoder.cache is not None
        kept.append((decoder.cache.keys[0].dtype, torch.stack(logits).float()))
    assert [dtype for dtype, _ in kept] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(kept[0][1], kept[1][1], atol=0.1 * kept[1][1].std().item(), rtol=0)


def test_a_short_answer_pays_for_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build, "load", lambda folder: pytest.fail("the library was looked for"))
    list(generate(model, [Request(PROMPTS[0], 1, 3)], Sampling()))
    assert "PyTorch step: for 3 tokens" in model.stepping.told


def test_weights_are_packed_once_and_then_serve_short_answers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    original = NativeStep.__init__

    def counting(self: NativeStep, *args: object) -> None:
        packed.append(self)
        original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(NativeStep, "__init__", counting)
    for count in (40, 2, 40):
        list(generate(model, [Request(PROMPTS[0], 1, count)], Sampling()))
        assert model.stepping.told.startswith("native step")
    assert len(packed) == 1


@pytest.mark.parametrize("reason", ["not built", "damaged", "float16", "not asked for"])
def test_without_a_native_step_it_is_pytorchs(
    model: Model, tmp_path: Path, built: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder: Path | None = tmp_path
    if reason == "damaged":
        (tmp_path / f"step-{native_build.key()}-0000000000000000.so").write_bytes(b"damaged")
    elif reason == "not asked for":
        folder = None
    elif reason == "float16":
        monkeypatch.setattr(native, "DTYPES", {})
    model.stepping = Stepping(model.transformer, folder)
    steps = list(generate(model, [Request(PROMPTS[0], 1, 40)], Sampling()))
    assert len(steps) >= 2
    said = {"not built": "models prepare", "damaged": "damaged", "float16": "float32", "not asked for": "no folder"}
    assert model.stepping.told.startswith("PyTorch step: ")
    assert said[reason] in model.stepping.told


def test_a_step_comes_after_a_prefill() -> None:
    with pytest.raises(ValueError, match="prefill"):
        Decoder(visible_model(CONFIGS["gpt2"])).step(torch.tensor([1]))
