"""The next token's distribution against softmax by hand, and continuations against a plain forward of the whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.core import predict
from gptcli.core.build import Model, open_model
from gptcli.core.distribution import normalized
from gptcli.core.predict import (
    check_continuations,
    distribution,
    next_logits,
    next_logits_batch,
    probabilities,
    score_continuations,
)
from gptcli.errors import CorruptError, LimitError, UsageError
from gptcli.text.tokenizer import Tokenizer

CONTEXT, VOCABULARY = 64, 300
PROMPTS = [[40, 41, 42], [50], [60 + i for i in range(50)], [270, 280, 290, 5, 6, 7, 8], [51]]
CHOICES = [[3, 4], [299], [9, 8, 7, 6, 5, 4, 3], [3], [3, 5], [100, 101, 102]]
TEMPERATURES = [0.05, 0.2, 1.0, 1.7, 50.0]
# Of log-probabilities in float32, in nats; measured: 1.2e-6.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    """The tiny model with weights enlarged, so that its probabilities differ by more than rounding."""
    return enlarged(tiny_folder)


def enlarged(folder: Path) -> Model:
    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    return model


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def last_logits(model: Model, ids: Sequence[int]) -> np.ndarray:
    """From a plain forward of all positions, in float64."""
    return model.transformer(torch.tensor([ids]))[0, -1].double().numpy()


def slow_logprobs(model: Model, prompt: Sequence[int], choice: Sequence[int]) -> list[float]:
    """A choice's log-probabilities token by token: a full forward of all before it, no cache, no batch."""
    before, found = list(prompt), []
    for id_ in choice:
        found.append(float(np.log(softmax(last_logits(model, before))[id_])))
        before.append(id_)
    return found


# --- The next token


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_probabilities_are_a_float64_softmax_of_the_models_logits(
    model: Model, prompt: list[int], temperature: float
) -> None:
    logits = next_logits(model, prompt)
    assert logits.shape == (VOCABULARY,)
    np.testing.assert_allclose(logits.double().numpy(), last_logits(model, prompt), atol=TOLERANCE)
    found = probabilities(logits, temperature)
    assert found.dtype == torch.float64
    assert abs(found.sum().item() - 1) < 1e-12
    np.testing.assert_allclose(found.numpy(), softmax(logits.double().numpy() / temperature), rtol=1e-12, atol=0)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=50),
    st.floats(0.05, 20),
)
def test_a_temperature_raises_probabilities_to_its_inverse(logits: list[float], temperature: float) -> None:
    once = probabilities(torch.tensor(logits), 1.0).numpy()
    theory = once ** (1 / temperature)
    found = probabilities(torch.tensor(logits), temperature).numpy()
    np.testing.assert_allclose(found, theory / theory.sum(), rtol=1e-6, atol=1e-280)


def test_temperature_0_is_the_limit(model: Model) -> None:
    logits = next_logits(model, PROMPTS[0])
    at_zero = probabilities(logits, 0)
    assert at_zero.tolist() == [float(place == int(logits.argmax())) for place in range(VOCABULARY)]
    np.testing.assert_allclose(probabilities(logits, 1e-3).numpy(), at_zero.numpy(), atol=1e-6)
    assert torch.equal(probabilities(logits, 5e-324), at_zero)
    assert probabilities(torch.tensor([1.0, 3.0, 3.0]), 0).tolist() == [0, 1, 0]  # the first of two
    assert probabilities(torch.tensor([1.0, 3.0, 3.0]), 1e-6).tolist() == [0, 0.5, 0.5]
    np.testing.assert_allclose(probabilities(logits, 1e300).numpy(), 1 / VOCABULARY)


@pytest.mark.parametrize("temperature", [0.0, *TEMPERATURES])
@pytest.mark.parametrize("top", [1, 7, VOCABULARY, 1000])
def test_a_distribution_has_all_the_probability(model: Model, temperature: float, top: int) -> None:
    logits = next_logits(model, PROMPTS[3])
    found = distribution(logits, temperature, top)
    assert len(found.top) == min(top, VOCABULARY)
    chances = [each.probability for each in found.top]
    assert abs(math.fsum(chances) + found.others - 1) < 1e-12
    assert chances == sorted(chances, reverse=True)
    if top >= VOCABULARY:
        assert found.others == 0
        assert sorted(each.id for each in found.top) == list(range(VOCABULARY))
    assert [each.logit for each in found.top] == logits[[each.id for each in found.top]].tolist()
    assert [each.id for each in found.top] == [each.id for each in distribution(logits, 1.0, top).top]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_entropy_is_of_the_whole_vocabulary_in_bits(model: Model, temperature: float) -> None:
    logits = next_logits(model, PROMPTS[3])
    chances = softmax(logits.double().numpy() / temperature)
    theory = -sum(p * math.log2(p) for p in chances if p > 0)
    assert distribution(logits, temperature, 3).entropy_bits == pytest.approx(theory, rel=1e-9, abs=1e-12)


def test_entropies_that_are_known() -> None:
    assert distribution(torch.zeros(256)).entropy_bits == pytest.approx(8)
    assert distribution(torch.tensor([0.0, 0.0, -math.inf])).entropy_bits == pytest.approx(1)
    assert distribution(torch.arange(5.0), 0.0).entropy_bits == 0


def test_bfloat16_is_widened_before_the_softmax() -> None:
    logits = torch.linspace(-3, 9, 40).to(torch.bfloat16)
    np.testing.assert_allclose(probabilities(logits, 0.7).numpy(), softmax(logits.double().numpy() / 0.7), rtol=1e-12)


@pytest.mark.parametrize("room", [1, 1 << 20, 1 << 30])
def test_prompts_together_are_as_alone(model: Model, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(predict, "_ROOM_BYTES", room)
    together = next_logits_batch(model, PROMPTS)
    assert together.shape == (len(PROMPTS), VOCABULARY)
    for prompt, logits in zip(PROMPTS, together, strict=True):
        np.testing.assert_allclose(logits.double().numpy(), last_logits(model, prompt), atol=TOLERANCE)


# --- Continuations


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_choice_is_the_sum_over_a_plain_forward_of_the_whole(model: Model, prompt: list[int]) -> None:
    (found,) = score_continuations(model, [prompt], CHOICES)
    assert [list(each.ids) for each in found] == CHOICES
    for choice, each in zip(CHOICES, found, strict=True):
        logits = model.transformer(torch.tensor([[*prompt, *choice]]))[0].double()
        whole = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(choice)[:, None])
        assert each.logprob == pytest.approx(whole.sum().item(), abs=TOLERANCE)
        assert each.logprobs == pytest.approx(slow_logprobs(model, prompt, choice), abs=TOLERANCE)
        assert each.logprob_per_token == pytest.approx(whole.mean().item(), abs=TOLERANCE)


@pytest.mark.parametrize("room", [1, 1 << 18, 1 << 21, 1 << 30])
def test_choices_together_are_as_alone_whatever_the_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(predict, "_ROOM_BYTES", room)
    together = score_continuations(model, PROMPTS, CHOICES)
    for prompt, found in zip(PROMPTS, together, strict=True):
        for choice, each in zip(CHOICES, found, strict=True):
            ((alone,),) = score_continuations(model, [prompt], [choice])
            assert each.ids == alone.ids == tuple(choice)
            assert each.logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)


def test_memory_sets_how_many_go_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = model.transformer.forward

    def counted(ids: torch.Tensor, *args: object, **more: object) -> torch.Tensor:
        sizes.append(len(ids))
        return forward(ids, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model.transformer, "forward", counted)
    score_continuations(model, [PROMPTS[0]], CHOICES)
    assert sizes == [1, 4]  # the prompt once, then the choices of more than one token
    sizes.clear()
    monkeypatch.setattr(predict, "_ROOM_BYTES", 1)
    score_continuations(model, [PROMPTS[0]], CHOICES)
    assert sizes == [1, 1, 1, 1, 1]
    sizes.clear()
    score_continuations(model, [PROMPTS[0]], [[1], [2]])
    assert sizes == [1]


def test_a_choice_of_one_token_is_the_next_tokens_probability(model: Model) -> None:
    (found,) = score_continuations(model, [PROMPTS[3]], [[id_] for id_ in range(VOCABULARY)])
    np.testing.assert_allclose(
        [math.exp(each.logprob) for each in found],
        probabilities(next_logits(model, PROMPTS[3]), 1.0).numpy(),
        rtol=1e-9,
    )


def test_all_continuations_of_two_tokens_make_up_their_first(model: Model) -> None:
    (found,) = score_continuations(model, [[40, 41]], [[7, id_] for id_ in range(VOCABULARY)])
    ((first,),) = score_continuations(model, [[40, 41]], [[7]])
    assert math.fsum(math.exp(each.logprob) for each in found) == pytest.approx(math.exp(first.logprob), rel=1e-5)


def test_probabilities_of_choices_are_a_softmax_and_sum_to_1() -> None:
    assert normalized([math.log(0.1), math.log(0.3)]) == pytest.approx([0.25, 0.75])
    assert normalized([-5000.0, -5000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])
    assert normalized([-7.0]) == [1]
    assert abs(math.fsum(normalized([-float(i) for i in range(100)])) - 1) < 1e-12


def test_a_choice_may_end_one_past_the_context_and_no_further(model: Model) -> None:
    prompt = [40] * (CONTEXT - 2)
    (found,) = score_continuations(model, [prompt], [[1, 2, 3], [4]])
    assert found[0].logprobs == pytest.approx(slow_logprobs(model, prompt, [1, 2, 3]), abs=TOLERANCE)
    with pytest.raises(LimitError, match=r"62 tokens, the longest choice 4, and the context of tiny is 64"):
        score_continuations(model, [[1], prompt], [[4], [1, 2, 3, 4]])
    with pytest.raises(LimitError):
        check_continuations(model, [1], [[1] * (CONTEXT + 1)])
    with pytest.raises(LimitError):
        next_logits_batch(model, [[1], [40] * (CONTEXT + 1)])


def test_an_id_that_is_not_there_is_told(model: Model) -> None:
    for prompt, choice in (([1], [VOCABULARY]), ([VOCABULARY], [1]), ([1], [-1, 1])):
        with pytest.raises(UsageError, match="outside the vocabulary"):
            score_continuations(model, [prompt], [choice])


def test_logits_that_are_not_finite_are_told(tiny_folder: Path) -> None:
    broken = enlarged(tiny_folder)
    broken.transformer.embedding.weight.data[9, 0] = math.nan  # tied: one logit is none, whatever the prompt
    with pytest.raises(CorruptError, match="not finite"):
        next_logits(broken, [1])
    with pytest.raises(CorruptError, match="not finite"):
        score_continuations(broken, [[1]], [[2, 3]])
