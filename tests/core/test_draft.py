"""Drafting: that the text stays what it is, that guesses are cheap to be wrong, and the distribution of a draft's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.core.build import Model, open_model, random_model
from gptcli.core.draft import COST, COST_BY_TILES, Allowance, Lookup, accept_or_draw
from gptcli.core.draft_model import check_pair
from gptcli.core.generate import generate
from gptcli.core.requests import Request, Step, Timing
from gptcli.core.sampling import filter_logits
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping
from gptcli.errors import UsageError
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.core.test_generate import CHAINS, run, text, tokens

REPEATING = [40, 41, 42, 43, 44, 45] * 4
CONTEXT = 64


def enlarged(model: Model) -> Model:
    """So that choices differ by more than rounding."""
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    return model


def opened(folder: Path, native: Path | None = None, quantize: str = "none") -> Model:
    tokenizer = Tokenizer.from_folder(folder)
    return open_model(folder, tokenizer, device="cpu", dtype="float32", native=native, quantize=quantize)


@pytest.fixture
def model(tiny_folder: Path, built: Path) -> Model:
    """The tiny model, natively."""
    return enlarged(opened(tiny_folder, built))


# --- Looking up


def brute_force(ids: Sequence[int], count: int) -> list[int]:
    """The slow twin: scan the text for its end, the last place first."""
    for size in (3, 2):
        for place in range(len(ids) - 1, size - 1, -1):
            if list(ids[place - size : place]) == list(ids[-size:]):
                period = len(ids) - place
                return [ids[place + ahead % period] for ahead in range(count)]
    return []


@pytest.mark.parametrize("start", [1, 2, 3, 20])
def test_a_lookup_is_a_scan_of_the_text(start: int) -> None:
    ids = torch.randint(5, (200,), generator=torch.Generator().manual_seed(start)).tolist()
    lookup = Lookup()
    lookup.start(ids[:start], 200)
    found = 0
    for place in range(start, len(ids)):
        lookup.add(ids[place])
        lookup._allowance = Allowance()
        made = lookup.propose(100).tokens
        if place > 3:
            assert list(made) == brute_force(ids[: place + 1], len(made))
            assert bool(made) == bool(brute_force(ids[: place + 1], 1))
        found += bool(made)
    assert 100 < found < len(ids)


@pytest.mark.parametrize("cost", [COST, COST_BY_TILES])
def test_what_is_looked_up_in_vain_has_a_bound(cost: float) -> None:
    """And what it costs in the long run is a hundredth of the steps."""
    allowance, spent = Allowance(cost), []
    for _ in range(5000):
        asked = allowance.step()
        spent.append(asked)
        if asked:
            allowance.tell(asked, 0)
    assert sum(spent[:50]) * cost <= 3
    assert sum(spent[50:]) * cost / 4950 < 0.0125


@pytest.mark.parametrize("cost", [COST, COST_BY_TILES])
def test_what_is_looked_up_rightly_grows(cost: float) -> None:
    allowance, asked = Allowance(cost), []
    for _ in range(6):
        asked.append(allowance.step())
        allowance.tell(asked[-1], asked[-1])
    assert asked == [3, 6, 9, 12, 15, 15]  # and credit enough for it


# --- The text stays


def drafts_of(model: Model, request: Request, sampling: Sampling, **more: Any) -> tuple[list[Step], Timing]:
    timing = Timing()
    return run(model, [request], sampling, timing=timing, **more)[0], timing


@pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("prompt", [REPEATING, REPEATING[:2], [7]], ids=["repeats", "two", "one"])
@pytest.mark.parametrize("slide", [False, True])
def test_a_text_with_lookups_is_the_text_without(
    model: Model, sampling: Sampling, prompt: list[int], slide: bool
) -> None:
    """Every step of it, with all log-probabilities, to the bit."""
    for seed in range(3):
        request = Request(prompt, seed, 100, ignore_eos=seed > 0)
        plain = drafts_of(model, request, sampling, slide=slide, logprobs=3, lookup=False)[0]
        assert drafts_of(model, request, sampling, slide=slide, logprobs=3)[0] == plain


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_text_that_repeats_is_made_in_fewer_steps(
    tiny_folder: Path, built: Path, quantize: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tiny_folder, built, quantize)
    request, greedy = Request(REPEATING, 0, 36, ignore_eos=True), Sampling(temperature=0)
    plain, timing = drafts_of(model, request, greedy, lookup=False)
    assert (timing.drafted_tokens, timing.accepted_tokens) == (0, 0)
    steps, timing = drafts_of(model, request, greedy)
    assert steps == plain
    assert model.stepping.told.startswith("native step")
    assert timing.decoded_tokens == 36
    assert 18 < timing.accepted_tokens <= timing.drafted_tokens


# With a penalty of 3000 each of them is the likeliest in its turn, whatever the model says.
CIRCLE = {50: 60_000.0, 51: 59_000.0, 52: 58_000.0}


def test_lookups_follow_a_bias(model: Model) -> None:
    """Tokens that are forced to go round are guessed, and the end comes where it should."""
    chain = Sampling(temperature=0, frequency_penalty=3000, logit_bias=CIRCLE)
    steps, timing = drafts_of(model, Request(REPEATING, 0, 35), chain)
    assert steps == drafts_of(model, Request(REPEATING, 0, 35), chain, lookup=False)[0]
    assert tokens(steps) == [50, 51, 52] * 11 + [50, 51]
    assert timing.accepted_tokens > 10


def test_stops_and_ends_within_a_guess(model: Model) -> None:
    chain = Sampling(temperature=0, frequency_penalty=3000, logit_bias=CIRCLE)
    whole = text(drafts_of(model, Request(REPEATING, 0, 35), chain)[0])
    for length in range(1, 9):
        stop = whole[-length:] * 2
        request = Request(REPEATING, 0, 35, stop=[stop, whole[:20]])
        steps, timing = drafts_of(model, request, chain)
        assert steps == drafts_of(model, request, chain, lookup=False)[0]
        assert steps[-1].finish == "stop"
    for count in range(1, 40, 3):
        request = Request(REPEATING, 0, count)
        assert drafts_of(model, request, chain)[0] == drafts_of(model, request, chain, lookup=False)[0]
    # The end-of-text token, where the text so far had another: it was guessed wrongly.
    chain = Sampling(temperature=0, frequency_penalty=3000, logit_bias={**CIRCLE, 0: 38500})
    steps, timing = drafts_of(model, Request(REPEATING, 0, 35), chain)
    assert steps[-1].finish == "eos"
    assert steps == drafts_of(model, Request(REPEATING, 0, 35), chain, lookup=False)[0]
    assert timing.accepted_tokens > 5


def test_where_bits_would_differ_nothing_is_looked_up(tiny_folder: Path) -> None:
    for lean in (False, True):
        model = opened(tiny_folder)
        model.stepping = Stepping(model.transformer, lean=lean)
        timing = drafts_of(model, Request(REPEATING, 0, 36, ignore_eos=True), Sampling(temperature=0))[1]
        assert timing.drafted_tokens == 0


def test_several_rows_are_not_drafted(model: Model) -> None:
    requests = [Request(REPEATING, seed, 20, ignore_eos=True) for seed in range(2)]
    timing = Timing()
    rows = run(model, requests, Sampling(temperature=0), timing=timing)
    assert timing.drafted_tokens == 0
    assert tokens(rows[1]) == tokens(drafts_of(model, requests[1], Sampling(temperature=0))[0])


# --- A draft model


WAYS = ["native", "lean", "transformer"]


def by_way(model: Model, way: str) -> Model:
    if way != "native":
        model.stepping = Stepping(model.transformer, lean=way == "lean")
    return model


def other(model: Model, seed: int, layers: int = 1) -> Model:
    """Another model with the same tokens."""
    config = ModelConfig(**{**model.config.__dict__, "layers": layers})
    transformer = random_model(config, seed).eval().requires_grad_(False)
    return enlarged(Model("other", config, transformer, model.tokenizer, model.device, model.dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chain", ["greedy", "greedy with penalties"])
@pytest.mark.parametrize("slide", [False, True])
def test_a_greedy_text_is_the_same_whoever_drafts(
    model: Model, tiny_folder: Path, way: str, chain: str, slide: bool
) -> None:
    greedy = CHAINS[chain]
    by_way(model, way)
    itself = enlarged(opened(tiny_folder))
    for prompt, count in ((REPEATING, 80), ([9], 50), ([9, 8], 3)):
        request = Request(prompt, 0, count, ignore_eos=True)
        plain = drafts_of(model, request, greedy, slide=slide, lookup=False)[0]
        for draft in (other(model, 1), other(model, 2, layers=3), itself):
            steps, timing = drafts_of(model, request, greedy, slide=slide, draft=draft)
            assert steps == plain
            assert timing.drafted_tokens > 0
            if draft is itself and not slide:  # else guesses are lost where the text loses its beginning
                assert timing.accepted_tokens >= timing.drafted_tokens - 16
        assert drafts_of(model, request, greedy, draft=itself, logprobs=2)[0][0].chosen is not None


def test_a_drafted_text_is_the_same_every_time(model: Model) -> None:
    draft = other(model, 1)
    request = Request(REPEATING, 5, 30, ignore_eos=True)
    first, again = (tokens(drafts_of(model, request, Sampling(), draft=draft)[0]) for _ in range(2))
    assert first == again
    assert first != tokens(drafts_of(model, Request(REPEATING, 6, 30), Sampling(), draft=draft)[0])


def test_a_draft_with_a_shorter_context_stops_guessing(model: Model) -> None:
    draft = other(model, 1)
    object.__setattr__(draft.config, "context", 30)
    steps, timing = drafts_of(model, Request(REPEATING, 1, 38), Sampling(temperature=0), draft=draft)
    assert steps == drafts_of(model, Request(REPEATING, 1, 38), Sampling(temperature=0))[0]
    assert 0 < timing.drafted_tokens < 30


def test_a_draft_model_has_to_have_the_same_tokens(model: Model) -> None:
    check_pair(model, other(model, 1))
    fewer = other(model, 1)
    object.__setattr__(fewer.config, "vocab_size", 299)
    with pytest.raises(UsageError, match=r"tiny has 300 tokens and other 299"):
        check_pair(model, fewer)
    swapped = other(model, 1)
    swapped.tokenizer = Bytes()  # type: ignore[assignment]
    with pytest.raises(UsageError, match="tokenizers differ"):
        check_pair(model, swapped)
    with pytest.raises(UsageError, match="one text at a time"):
        list(generate(model, [Request([5], 0), Request([5], 1)], Sampling(), draft=other(model, 1)))


# --- Distributions


def fits(counts: Tensor, probabilities: Tensor) -> bool:
    """Pearson's chi-square test at a level of one in 10,000; the seeds are fixed, so it fails always or never.

    Cells too rare for it are one. The bound is Wilson and Hilferty's (1931).
    """
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    if observed[wanted == 0].sum() > 0:
        return False
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    return statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        (Sampling(), Sampling()),
        (Sampling(temperature=0.5, top_k=4), Sampling(temperature=0.5, top_k=4)),
        (Sampling(top_p=0.8), Sampling(top_p=0.8, min_p=0.3)),
    ],
)
def test_what_is_accepted_or_drawn_anew_has_the_targets_distribution(target: Sampling, draft: Sampling) -> None:
    """Whatever the draft's is: its draws from a generator of the test's own."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        p, q = (filter_logits(torch.randn(1, 9, generator=generator), chain)[0] for chain in (target, draft))
        guesses = torch.multinomial(q.softmax(-1), 3000, True, generator=generator).tolist()
        made = [accept_or_draw(p, q, token, seed, 17) for seed, token in enumerate(guesses)]
        assert fits(torch.bincount(torch.tensor(made), minlength=9), p.softmax(-1))
        kept = sum(one == other for one, other in zip(made, guesses, strict=True)) / len(made)
        overlap = float(torch.minimum(p.softmax(-1), q.softmax(-1)).sum())
        assert kept == pytest.approx(overlap, abs=0.03)
        assert not fits(torch.bincount(torch.tensor(guesses), minlength=9), p.softmax(-1))


def test_equal_distributions_keep_every_guess() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, -math.inf])
    for seed in range(200):
        assert accept_or_draw(logits, logits, seed % 3, seed, seed) == seed % 3
        assert accept_or_draw(logits, torch.tensor([-math.inf, 5.0, 5.0, 5.0]), 3, seed, 1) in (0, 1, 2)


class Bytes:
    """A tokenizer of eight tokens."""

    start_id = None

    def token_bytes(self, id_: int) -> bytes:
        return b"abcdefgh"[id_ : id_ + 1]


def test_drafted_texts_have_the_targets_distribution() -> None:
    """Three tokens behind a prompt, by two models that differ much; penalties and filters included."""
    axes = {"family": "gpt2", "vocab_size": 8, "context": 8, "layers": 1, "width": 8, "heads": 1, "kv_heads": 1}
    config = ModelConfig(**axes, head_dim=8, mlp_width=8)  # type: ignore[arg-type]
    cpu, tokenizer = torch.device("cpu"), Bytes()
    models = []
    for seed in (1, 2):
        transformer = random_model(config, seed).eval().requires_grad_(False)
        for parameter in transformer.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        models.append(Model("m", config, transformer, tokenizer, cpu, torch.float32))  # type: ignore[arg-type]
    target, draft = models
    chain = Sampling(temperature=1.3, top_k=5, presence_penalty=0.5)
    plain = Sampling(temperature=1.3, top_k=5)
    first = filter_logits(target.transformer(torch.tensor([[3]]))[:, -1], plain).softmax(-1)[0]
    wanted = torch.zeros(8, 8, 8)
    for one, two in itertools.product(range(8), range(8)):
        logits = target.transformer(torch.tensor([[3, one]]))[:, -1]
        logits[0, one] -= 0.5
        second = filter_logits(logits, plain).softmax(-1)[0]
        logits = target.transformer(torch.tensor([[3, one, two]]))[:, -1]
        logits[0, [one, two]] -= 0.5
        wanted[one, two] = first[one] * second[two] * filter_logits(logits, plain).softmax(-1)[0]
    counts, timing = torch.zeros(8, 8, 8), Timing()
    for seed in range(1500):
        steps = generate(target, [Request([3], seed, 3)], chain, draft=draft, timing=timing)
        counts[tuple(tokens(list(steps)))] += 1
    assert 0.1 < timing.accepted_tokens / timing.drafted_tokens < 0.9
    for axes_ in ((0, 1), (1, 2), (0, 2)):
        other = 3 - sum(axes_)
        assert fits(counts.sum(other).flatten(), wanted.sum(other).flatten())
    assert not fits(counts.sum(0).flatten(), wanted.sum(0).T.flatten())
