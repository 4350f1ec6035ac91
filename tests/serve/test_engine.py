"""The engine: many requests at once get what each would get alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcli.core.build import Model, open_model
from gptcli.core.generate import generate
from gptcli.core.pool import Pool
from gptcli.core.requests import Request, Step
from gptcli.core.settings import Sampling
from gptcli.errors import BusyError, CorruptError, LimitError
from gptcli.serve.engine import Delivery, Engine, Ticket
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import PATIENCE


@pytest.fixture(params=["natively", "by PyTorch"])
def model(request: pytest.FixtureRequest, tiny_folder: Path) -> Model:
    native = request.getfixturevalue("built") if request.param == "natively" else None
    return open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32", native=native)


class Callers:
    """Collects what an engine hands over, and waits for tickets to end."""

    def __init__(self) -> None:
        self.steps: dict[Ticket, list[Step]] = {}
        self._changed = threading.Condition()

    def __call__(self, made: Delivery) -> None:
        with self._changed:
            for ticket, steps in made:
                self.steps.setdefault(ticket, []).extend(steps)
            self._changed.notify_all()

    def wait(self, tickets: Sequence[Ticket]) -> None:
        with self._changed:
            done = lambda: all(ticket.ended and self._told(ticket) for ticket in tickets)
            assert self._changed.wait_for(done, timeout=PATIENCE)

    def wait_for_tokens(self, ticket: Ticket, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.steps.get(ticket, [])) >= count, timeout=PATIENCE)

    def _told(self, ticket: Ticket) -> bool:
        steps = self.steps.get(ticket, [])
        return ticket.error is not None or bool(steps and steps[-1].finish)


@pytest.fixture
def callers() -> Callers:
    return Callers()


@pytest.fixture
def engine(model: Model, callers: Callers) -> Iterator[Engine]:
    engine = Engine(model, callers, rows=5)
    yield engine
    engine.close()


def alone(model: Model, ticket: Ticket) -> list[Step]:
    return list(generate(model, [ticket.request], ticket.sampling, logprobs=ticket.logprobs, slide=ticket.slide))


def prompt(model: Model, number: int) -> list[int]:
    length = 1 + number * 5 % 23
    return [(number * 31 + place * 7) % model.config.vocab_size for place in range(length)]


def differing(model: Model) -> list[Ticket]:
    """Requests that differ in all that they can."""
    samplings = [
        Sampling(0.8),
        Sampling(0),
        Sampling(1.3, top_k=5),
        Sampling(1, top_p=0.7, min_p=0.01),
        Sampling(0.9, repetition_penalty=1.3, frequency_penalty=0.2, logit_bias={3: 2.0}),
    ]
    return [
        Ticket(
            Request(prompt(model, number), seed=number, max_tokens=1 + number * 3 % 17, stop=["a"] * (number % 4 == 3)),
            samplings[number % 5],
            logprobs=number % 3 or None,
            whole=number % 2 == 0,
        )
        for number in range(24)
    ]


def test_every_answer_equals_the_same_request_alone(model: Model, engine: Engine, callers: Callers) -> None:
    tickets = differing(model)
    engine.submit_all(tickets)
    callers.wait(tickets)
    for ticket in tickets:
        wanted = alone(model, ticket)
        made = callers.steps[ticket]
        assert [(step.token, step.text, step.finish) for step in made] == [
            (step.token, step.text, step.finish) for step in wanted
        ]
        for step, same in zip(made, wanted, strict=True):
            assert [choice.id for choice in step.top] == [choice.id for choice in same.top]
            if same.chosen is not None:
                assert step.chosen is not None
                assert step.chosen.logprob == pytest.approx(same.chosen.logprob, abs=1e-4)
    assert engine.idle
    assert engine.counts.made_tokens == sum(
        step.token is not None for steps in callers.steps.values() for step in steps
    )


def test_a_text_that_outgrows_the_context_slides_as_it_does_alone(
    model: Model, engine: Engine, callers: Callers
) -> None:
    length = model.config.context
    tickets = [
        Ticket(Request(prompt(model, number), number, length + 9 * number, ignore_eos=True), Sampling(0.8), slide=True)
        for number in range(4)
    ]
    engine.submit_all(tickets)
    callers.wait(tickets)
    for ticket in tickets:
        assert [(step.token, step.slid) for step in callers.steps[ticket]] == [
            (step.token, step.slid) for step in alone(model, ticket)
        ]


def test_texts_that_slide_at_once_wait_for_their_turn(model: Model, callers: Callers) -> None:
    """They leave their places to be read anew, and others come in meanwhile: never more than there are places for."""
    ids = [number * 13 % model.config.vocab_size for number in range(model.config.context)]
    tickets = [Ticket(Request(ids, number, 9, ignore_eos=True), Sampling(0.8), slide=True) for number in range(4)]
    engine = Engine(model, callers, rows=1)
    try:
        engine.submit_all(tickets)
        callers.wait(tickets)
        for ticket in tickets:
            assert [step.token for step in callers.steps[ticket]] == [step.token for step in alone(model, ticket)]
    finally:
        engine.close()


def test_whatever_ends_the_engine_nobody_waits_for_ever(
    model: Model, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(self: Engine) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr(Engine, "_settle", fault)
    monkeypatch.setattr(threading, "excepthook", lambda told: None)  # which would be the test's warning
    engine = Engine(model, callers)
    ticket = engine.submit(Ticket(Request([1, 2], 1, 8), Sampling(0.8)))
    callers.wait([ticket])
    assert isinstance(ticket.error, BusyError)
    with pytest.raises(BusyError):
        engine.submit(Ticket(Request([1, 2], 1, 8), Sampling(0.8)))
    engine.close()


def test_a_group_that_does_not_fit_is_read_one_by_one(
    model: Model, callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = Pool.enter_first

    def small(self: Pool, prompts: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, int]]:
        if len(prompts) > 1 or len(prompts[0]) > 20:
            raise MemoryError
        return enter(self, prompts)

    monkeypatch.setattr(Pool, "enter_first", small)
    engine = Engine(model, callers)
    tickets = [Ticket(Request(prompt(model, number), 1, 4), Sampling(0.8)) for number in range(9)]
    engine.submit_all(tickets)
    callers.wait(tickets)
    assert [ticket.error is not None for ticket in tickets] == [len(each.request.prompt) > 20 for each in tickets]
    assert any(ticket.error for ticket in tickets)
    engine.close()


def test_a_prompt_that_was_read_before_is_not_computed_again(model: Model, engine: Engine, callers: Callers) -> None:
    ids = [number * 13 % model.config.vocab_size for number in range(30)]
    first = engine.submit(Ticket(Request(ids, 1, 8, ignore_eos=True), Sampling(0.8)))
    callers.wait([first])
    same = engine.submit(Ticket(Request(ids, 1, 8, ignore_eos=True), Sampling(0.8)))
    longer = engine.submit(Ticket(Request([*ids, 5, 6, 7], 1, 8, ignore_eos=True), Sampling(0.8)))
    callers.wait([same, longer])
    assert (first.known, same.known, longer.known) == (0, 30, 30)
    assert callers.steps[same] == callers.steps[first]
    assert [step.token for step in callers.steps[longer]] == [step.token for step in alone(model, longer)]
    after = [*ids, *(step.token for step in callers.steps[first] if step.token is not None), 9]
    chat = engine.submit(Ticket(Request(after, 1, 4), Sampling(0)))
    callers.wait([chat])
    assert chat.known == len(after) - 2  # all but the last token made, which nothing has read, and the new one
    assert [step.token for step in callers.steps[chat]] == [step.token for step in alone(model, chat)]


def test_who_hangs_up_stops_at_the_next_token(model: Model, engine: Engine, callers: Callers) -> None:
    gone = engine.submit(Ticket(Request([1], 1, 10**9, ignore_eos=True), Sampling(1), slide=True))
    callers.wait_for_tokens(gone, 3)
    gone.cancel()
    other = engine.submit(Ticket(Request([2], 2, 5, ignore_eos=True), Sampling(1)))
    callers.wait([other])
    assert engine.call(lambda: engine.load).result(PATIENCE)[0] == 0
    assert engine.counts.cancelled == 1
    assert [step.token for step in callers.steps[other]] == [step.token for step in alone(model, other)]


def test_too_many_are_told_at_once(model: Model, callers: Callers) -> None:
    engine = Engine(model, callers, rows=1, waiting=2)
    try:
        endless = engine.submit(Ticket(Request([1], 1, 10**9, ignore_eos=True), Sampling(1), slide=True))
        callers.wait_for_tokens(endless, 1)
        for _ in range(2):
            engine.submit(Ticket(Request([1], 1, 1), Sampling(1)))
        with pytest.raises(BusyError, match="2 requests are waiting"):
            engine.submit(Ticket(Request([1], 1, 1), Sampling(1)))
    finally:
        engine.close()
    assert isinstance(endless.error, BusyError)


def test_a_wrong_prompt_is_told_to_its_caller_alone(model: Model, engine: Engine, callers: Callers) -> None:
    good = Ticket(Request([1, 2], 1, 3), Sampling(1))
    with pytest.raises(LimitError):
        engine.submit(replace(good, request=Request([1] * (model.config.context + 1), 1)))
    callers.wait([engine.submit(good)])


def test_a_damaged_model_fails_the_request_and_not_the_engine(model: Model, engine: Engine, callers: Callers) -> None:
    assert model.transformer.positions is not None
    model.transformer.positions.weight[20] = float("nan")
    bad = engine.submit(Ticket(Request([3] * 21, 1, 3), Sampling(1)))
    callers.wait([bad])
    assert isinstance(bad.error, CorruptError)
    good = engine.submit(Ticket(Request([4], 1, 3), Sampling(1)))
    callers.wait([good])
    assert good.error is None


def test_other_work_waits_for_its_turn_and_brings_its_errors_back(engine: Engine) -> None:
    assert engine.call(lambda: 6 * 7).result(PATIENCE) == 42
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0).result(PATIENCE)


def test_memory_for_remembered_texts_is_bounded(model: Model, callers: Callers) -> None:
    config = model.config
    token = 2 * config.layers * config.kv_heads * config.head_dim * 4
    engine = Engine(model, callers, prefix_bytes=100 * token + 4 * config.vocab_size)
    try:
        for number in range(30):
            callers.wait([engine.submit(Ticket(Request(prompt(model, number), number, 9), Sampling(1)))])
        assert 0 < engine.cache_bytes <= 100 * token + 4 * config.vocab_size
    finally:
        engine.close()
