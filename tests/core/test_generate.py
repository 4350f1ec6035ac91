"""generate() against a twin that recomputes everything for each token, and every way in which a text can end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.core.build import Model, open_model
from gptcli.core.generate import check_prompt, generate, start_ids
from gptcli.core.requests import Request, Step, Timing
from gptcli.core.sampling import History, sample
from gptcli.core.settings import Sampling
from gptcli.errors import LimitError, UsageError
from gptcli.text.tokenizer import Tokenizer

CONTEXT = 64
PROMPTS = [[40, 41, 42], [50], [60 + i for i in range(20)], [270, 280, 290, 5, 6, 7, 8]]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    """The tiny model with weights enlarged, so that its choices differ by more than rounding."""
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            parameter.data = 8 * parameter.data
    return model


def naive(model: Model, request: Request, sampling: Sampling, *, slide: bool = False) -> tuple[list[int], str]:
    """The ids and the reason of their end: one row, a full forward for each token, no cache; stops left out."""
    window, made = list(request.prompt), []
    history = History([request.prompt], model.config.vocab_size, model.device)
    while len(made) != request.max_tokens:
        logits = model.transformer(torch.tensor([window]))[:, -1]
        drawn = sample(logits, sampling, [request.seed], [len(request.prompt) + len(made)], history)
        history.add(drawn)
        token = int(drawn)
        if token in model.config.eos_ids and not request.ignore_eos:
            return made, "eos"
        made.append(token)
        window.append(token)
        if len(window) > CONTEXT and len(made) != request.max_tokens:
            if not slide:
                return made, "context"
            window = window[-(CONTEXT // 2) :]
    return made, "length"


def run(model: Model, requests: Sequence[Request], sampling: Sampling, **more: Any) -> list[list[Step]]:
    """The steps of each row."""
    rows: list[list[Step]] = [[] for _ in requests]
    for step in generate(model, requests, sampling, **more):
        assert not rows[step.row] or rows[step.row][-1].finish is None
        rows[step.row].append(step)
    assert all(row[-1].finish for row in rows)
    return rows


def tokens(steps: Sequence[Step]) -> list[int]:
    return [step.token for step in steps if step.token is not None]


def text(steps: Sequence[Step]) -> str:
    return "".join(step.text for step in steps)


def readable(model: Model, **settings: Any) -> Sampling:
    """Draws only tokens of ASCII letters and spaces, so that text is easy to cut."""
    ids = range(model.config.vocab_size)
    good = {id_ for id_ in ids if model.tokenizer.token_bytes(id_).replace(b" ", b"a").isalpha()}
    return Sampling(logit_bias={id_: -math.inf for id_ in ids if id_ not in good}, **settings)


CHAINS = {
    "plain": Sampling(),
    "greedy": Sampling(temperature=0),
    "filtered": Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
    "penalties": Sampling(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.3),
    "greedy with penalties": Sampling(temperature=0, repetition_penalty=1.5, frequency_penalty=0.4),
    "bias": Sampling(logit_bias={0: 1.0, 33: 4.0, 34: -math.inf, 999: 5.0}),
}
every_chain = pytest.mark.parametrize("sampling", CHAINS.values(), ids=CHAINS.keys())


@every_chain
@pytest.mark.parametrize("slide", [False, True])
def test_a_batch_equals_its_rows_and_the_twin(model: Model, sampling: Sampling, slide: bool) -> None:
    """Prompts of different length, seeds and ends of their own; rows leave the batch at different times."""
    limits = [90, 25, -1 if not slide else 70, 3]
    requests = [
        Request(prompt, seed=11 * i, max_tokens=limit, ignore_eos=i == 0)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    together = run(model, requests, sampling, slide=slide)
    assert len({len(row) for row in together}) > 1
    for request, row in zip(requests, together, strict=True):
        alone = run(model, [request], sampling, slide=slide)[0]
        assert tokens(row) == tokens(alone)
        assert [(step.text, step.finish, step.slid) for step in row] == [
            (step.text, step.finish, step.slid) for step in alone
        ]
        assert (tokens(row), row[-1].finish) == naive(model, request, sampling, slide=slide)


def test_samples_equal_single_runs_with_their_seeds(model: Model) -> None:
    requests = [Request(PROMPTS[0], seed=100 + i, max_tokens=20) for i in range(6)]
    samples = [tokens(row) for row in run(model, requests, Sampling())]
    for i, made in enumerate(samples):
        assert made == tokens(run(model, [Request(PROMPTS[0], seed=100 + i, max_tokens=20)], Sampling())[0])
    assert len({tuple(made) for made in samples}) == 6


def test_steps_come_in_order_of_time_and_rows(model: Model) -> None:
    requests = [Request(prompt, seed=0, max_tokens=count) for prompt, count in zip(PROMPTS, (2, 4, 1, 3), strict=True)]
    order = [step.row for step in generate(model, requests, Sampling(logit_bias={0: -math.inf}))]
    assert order == [0, 1, 2, 3, 0, 1, 3, 1, 3, 1]


@pytest.mark.parametrize(("limit", "made"), [(0, 0), (1, 1), (7, 7), (-1, CONTEXT + 1 - 3), (1000, CONTEXT + 1 - 3)])
def test_max_tokens(model: Model, limit: int, made: int) -> None:
    steps = run(model, [Request(PROMPTS[0], seed=5, max_tokens=limit, ignore_eos=True)], Sampling())[0]
    assert len(tokens(steps)) == made
    assert steps[-1].finish == ("length" if limit == made else "context")


def test_max_tokens_0_makes_nothing_beside_others_that_make_some(model: Model) -> None:
    rows = run(
        model, [Request(p, seed=1, max_tokens=n) for p, n in zip(PROMPTS, (0, 4, 0, 4), strict=True)], Sampling()
    )
    assert rows[0] == [Step(0, None, "", finish="length")]
    assert rows[2] == [Step(2, None, "", finish="length")]
    assert tokens(rows[1]) == naive(model, Request(PROMPTS[1], seed=1, max_tokens=4), Sampling())[0]
    assert list(generate(model, [], Sampling())) == []


def test_eos_ends_a_text_and_does_not_show(model: Model) -> None:
    likely = Sampling(logit_bias={0: 4.0})
    request = Request(PROMPTS[0], seed=3, max_tokens=60)
    steps = run(model, [request], likely)[0]
    made, reason = naive(model, request, likely)
    assert reason == "eos"
    assert len(made) > 2
    assert (tokens(steps), steps[-1].token, steps[-1].finish) == (made, None, "eos")
    assert "<|endoftext|>" not in text(steps)
    onwards = run(model, [Request(PROMPTS[0], seed=3, max_tokens=60, ignore_eos=True)], likely)[0]
    assert tokens(onwards)[: len(made) + 1] == [*made, 0]
    assert len(tokens(onwards)) == 60
    assert onwards[-1].finish == "length"


def test_eos_hands_over_what_was_held_back(model: Model) -> None:
    """Text kept for a stop that never came, and half a character, when the end-of-text token comes."""
    e_acute = first_of(model, b"\xc3")
    model_ids = {first_of(model, b"a"): 60.0, 0: 60.0}
    steps = run(model, [Request([5], seed=0, max_tokens=50, stop=["a" * 60])], Sampling(logit_bias=model_ids))[0]
    assert steps[-1].finish == "eos"
    assert text(steps) == model.tokenizer.decode(tokens(steps)) != ""
    steps = run(model, [Request([5], seed=1, max_tokens=50)], Sampling(logit_bias={e_acute: 60.0, 0: 60.0}))[0]
    assert steps[-1].finish == "eos"
    assert text(steps) == "�" * len(tokens(steps)) != ""


def first_of(model: Model, data: bytes) -> int:
    return next(id_ for id_ in range(model.config.vocab_size) if model.tokenizer.token_bytes(id_) == data)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_prompt_as_long_as_the_context_gives_one_token(model: Model, logprobs: int | None) -> None:
    request = Request([9] * CONTEXT, seed=2, max_tokens=-1, ignore_eos=True)
    steps = run(model, [request], Sampling(), logprobs=logprobs)[0]
    assert (tokens(steps), steps[0].finish, len(steps)) == (naive(model, request, Sampling())[0], "context", 1)


def test_a_longer_prompt_is_over_the_limit(model: Model) -> None:
    for slide in (False, True):
        with pytest.raises(LimitError, match=r"65 tokens.*is 64"):
            list(generate(model, [Request([9], 0), Request([9] * (CONTEXT + 1), 0)], Sampling(), slide=slide))
    with pytest.raises(LimitError):
        check_prompt(model, [9] * (CONTEXT + 1))
    check_prompt(model, [9] * CONTEXT)


@pytest.mark.parametrize("id_", [300, 10**6, -1])
def test_ids_that_the_model_does_not_have_are_wrong_use(model: Model, id_: int) -> None:
    with pytest.raises(UsageError, match=str(id_)):
        list(generate(model, [Request([5, id_, 6], 0)], Sampling()))


def test_slide_goes_past_the_context_and_says_so(model: Model) -> None:
    request = Request(PROMPTS[2], seed=8, max_tokens=150, ignore_eos=True)
    steps = run(model, [request], Sampling(), slide=True)[0]
    assert (tokens(steps), steps[-1].finish) == naive(model, request, Sampling(), slide=True)
    assert len(tokens(steps)) == 150
    # The 45th token is the 65th of the text; of 65 the last 32 stay, which are 65 again 33 tokens later.
    assert {place: step.slid for place, step in enumerate(steps, 1) if step.slid} == {45: 33, 78: 33, 111: 33, 144: 33}


@pytest.mark.parametrize(("slide", "limit"), [(False, -1), (False, 62), (True, 62)])
def test_nothing_is_let_go_when_the_text_ends(model: Model, slide: bool, limit: int) -> None:
    """At the last token of the context no room is made, and none is reported."""
    steps = run(model, [Request(PROMPTS[0], 4, limit, ignore_eos=True)], Sampling(), slide=slide)[0]
    assert len(tokens(steps)) == 62
    assert steps[-1].finish == ("context" if limit == -1 else "length")
    assert [step.slid for step in steps] == [0] * 62


@every_chain
def test_pieces_joined_are_the_decoding(model: Model, sampling: Sampling) -> None:
    for seed in range(4):
        steps = run(model, [Request(PROMPTS[0], seed, -1)], sampling)[0]
        assert text(steps) == model.tokenizer.decode(tokens(steps))


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_of_several_bytes_is_never_split(model: Model, character: str) -> None:
    """Only the bytes of one character are drawn: pieces are whole, and what is no character is U+FFFD as ever."""
    ids = {first_of(model, bytes([byte])): 500.0 for byte in character.encode()}
    held = whole = 0
    requests = [Request([5], seed, 60) for seed in range(60)]
    for steps in run(model, requests, Sampling(temperature=5, logit_bias=ids)):
        assert text(steps) == model.tokenizer.decode(tokens(steps))
        held += sum(step.text == "" for step in steps)
        whole += text(steps).count(character)
    assert held > 0
    assert whole > 0


def test_a_stop_is_found_wherever_tokens_part_and_never_shows(model: Model) -> None:
    chain = readable(model)
    request = Request(PROMPTS[0], seed=21, max_tokens=40)
    full = run(model, [request], chain)[0]
    whole = text(full)
    borders = {len(text(full[:n])) for n in range(len(full))}
    split = 0
    for start in range(0, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        at = whole.index(stop)
        steps = run(model, [Request(PROMPTS[0], 21, 40, stop=["never this", stop])], chain)[0]
        assert steps[-1].finish == "stop"
        assert text(steps) == whole[:at]
        assert tokens(steps) == tokens(full)[: len(steps)]
        assert len(text(full[: len(steps) - 1])) < at + 4 <= len(text(full[: len(steps)]))  # no token too many
        split += bool(borders & set(range(at + 1, at + 4)))
        shown = ""
        for step in steps:
            shown += step.text
            assert whole[:at].startswith(shown)
    assert split > 5


def test_a_stop_that_never_comes_changes_nothing(model: Model) -> None:
    chain = readable(model)
    whole = text(run(model, [Request(PROMPTS[0], 21, 40)], chain)[0])
    for stop in (whole[-3:] + "#", whole[10:14] + "#", "#"):
        steps = run(model, [Request(PROMPTS[0], 21, 40, stop=[stop])], chain)[0]
        assert (text(steps), steps[-1].finish, len(steps)) == (whole, "length", 40)


def test_a_stop_on_the_last_token_is_a_stop(model: Model) -> None:
    chain = readable(model)
    whole = text(run(model, [Request(PROMPTS[0], 21, 12)], chain)[0])
    steps = run(model, [Request(PROMPTS[0], 21, 12, stop=[whole[-2:]])], chain)[0]
    assert steps[-1].finish == "stop"
    assert text(steps) == whole[: whole.index(whole[-2:])]


def test_one_row_stops_and_the_others_go_on(model: Model) -> None:
    chain = readable(model)
    plain = [Request(prompt, 30 + i, 25) for i, prompt in enumerate(PROMPTS)]
    wanted = run(model, plain, chain)
    stop = text(wanted[1])[4:7]
    rows = run(model, [*plain[:1], Request(PROMPTS[1], 31, 25, stop=[stop]), *plain[2:]], chain)
    assert rows[1][-1].finish == "stop"
    for place in (0, 2, 3):
        assert tokens(rows[place]) == tokens(wanted[place])


def test_logprobs_are_those_of_a_full_forward(model: Model) -> None:
    """At temperature 1 and before any filter, whatever the chain is."""
    chain = Sampling(temperature=0.5, top_k=5, frequency_penalty=0.5)
    requests = [Request(prompt, seed=i, max_tokens=9, ignore_eos=True) for i, prompt in enumerate(PROMPTS)]
    for request, steps in zip(requests, run(model, requests, chain, logprobs=4), strict=True):
        ids = [*request.prompt, *tokens(steps)]
        logprobs = model.transformer(torch.tensor([ids]))[0].log_softmax(-1)
        for step, row in zip(steps, logprobs[len(request.prompt) - 1 :], strict=False):
            assert step.chosen is not None
            assert step.chosen.id == step.token
            assert step.chosen.logprob == pytest.approx(row[step.token].item(), abs=1e-5)
            best = row.topk(4)
            assert [choice.id for choice in step.top] == best.indices.tolist()
            assert [choice.logprob for choice in step.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 1), (300, 300), (1000, 300)])
def test_as_many_logprobs_as_asked_for(model: Model, asked: int, given: int) -> None:
    for step in run(model, [Request([5], 0, 3, ignore_eos=True)], Sampling(), logprobs=asked)[0]:
        assert step.chosen is not None
        assert len(step.top) == given
        if given == 300:
            assert math.fsum(math.exp(choice.logprob) for choice in step.top) == pytest.approx(1, abs=1e-5)


def test_without_logprobs_nothing_is_reported(model: Model) -> None:
    assert all(s.chosen is None and s.top == () for s in run(model, [Request([5], 0, 3)], Sampling())[0])


def test_penalties_look_at_the_whole_history(model: Model) -> None:
    once = Sampling(temperature=0, presence_penalty=1e4)
    made = tokens(run(model, [Request(PROMPTS[0], 0, 50, ignore_eos=True)], once)[0])
    assert len(set(made)) == 50
    repeating = tokens(run(model, [Request(PROMPTS[0], 0, 50, ignore_eos=True)], Sampling(temperature=0))[0])
    assert len(set(repeating)) < 50
    # Repetition looks at the prompt as well: with the likeliest token in it, another is taken.
    first = repeating[0]
    prompt = [first, *PROMPTS[0]]
    free, held = (
        tokens(run(model, [Request(prompt, 0, 1)], Sampling(temperature=0, repetition_penalty=penalty))[0])
        for penalty in (1.0, 1e6)
    )
    assert held[0] not in prompt
    assert free != held or free[0] not in prompt


def test_seed_and_position_decide_not_the_company(model: Model) -> None:
    """A row's text is the same whichever row it is, and another seed gives another."""
    requests = [Request(PROMPTS[0], seed, 15) for seed in (1, 2, 1)]
    first, second, third = (tokens(row) for row in run(model, requests, Sampling()))
    assert first == third != second


def test_an_iterator_left_half_way_leaves_nothing_behind(model: Model) -> None:
    requests = [Request(prompt, 1, 30) for prompt in PROMPTS]
    wanted = run(model, requests, Sampling())
    iterator = generate(model, requests, Sampling())
    begun = [next(iterator) for _ in range(7)]
    iterator.close()
    assert begun == [row[0] for row in wanted] + [row[1] for row in wanted[:3]]
    assert run(model, requests, Sampling()) == wanted


def test_two_iterators_take_turns(model: Model) -> None:
    requests = [Request(PROMPTS[0], 1, 12), Request(PROMPTS[2], 2, 12)]
    wanted = [tokens(run(model, [request], Sampling())[0]) for request in requests]
    iterators = [generate(model, [request], Sampling()) for request in requests]
    pairs = list(zip(*iterators, strict=True))
    assert [tokens([pair[i] for pair in pairs]) for i in range(2)] == wanted


def test_timing_is_filled_in(model: Model) -> None:
    timing = Timing()
    assert timing.tokens_per_second == 0
    requests = [Request(prompt, 1, 5, ignore_eos=True) for prompt in PROMPTS]
    list(generate(model, requests, Sampling(), timing=timing))
    assert timing.decoded_tokens == 20
    assert timing.prefill_seconds > 0
    assert timing.tokens_per_second == 20 / timing.decode_seconds


def test_start_ids(model: Model, tiny_folder: Path) -> None:
    assert start_ids(model) == [0]
    other = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu")
    other.tokenizer.start_id = None
    object.__setattr__(other.config, "bos_id", 7)
    assert start_ids(other) == [7]
    object.__setattr__(other.config, "bos_id", None)
    with pytest.raises(UsageError, match="no start token"):
        start_ids(other)


@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_rows_of_different_length_never_see_unwritten_memory(model: Model) -> None:
    requests = [Request(prompt, 3, 40, ignore_eos=True) for prompt in PROMPTS]
    for request, row in zip(requests, run(model, requests, Sampling()), strict=True):
        assert tokens(row) == naive(model, request, Sampling())[0]


@pytest.fixture
def nan_in_fresh_memory() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
