"""Evaluation while training: each document's tokens once, and the numbers that ``gptcli score`` gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptcli.core.model import Transformer
from gptcli.train.data import IGNORED, Corpus, hold_out_end
from gptcli.train.evaluate import bits_per_byte, corpus_nats
from gptcli.train.loss import Objective
from gptcli.train.ranks import Ranks
from tests.train.small import CONTEXT, VOCAB, corpus, model

CPU = torch.device("cpu")


def loss_of(one: Transformer) -> Any:
    return lambda ids, targets: F.cross_entropy(one(ids).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.fixture
def uneven() -> Transformer:
    """Far from even, so that a token left out or counted twice shows."""
    one = model().requires_grad_(False)
    for parameter in one.parameters():
        parameter.mul_(5)
    return one


def by_hand(one: Transformer, text: Corpus) -> tuple[float, int]:
    """A forward pass for each target."""
    total, count = 0.0, 0
    tokens = text.tokens[:].tolist()
    starts = {n for n, id_ in enumerate(tokens) if id_ == 0} if text.starts is None else set(text.starts.tolist())
    first = 0
    for place in range(1, len(tokens)):
        if place in starts:
            first = place
        elif text.learnt is None or text.learnt[place]:
            window = first + (place - first - 1) // CONTEXT * CONTEXT
            logits = one(torch.tensor([tokens[window:place]]))[0, -1]
            total -= logits.log_softmax(-1)[tokens[place]].item()
            count += 1
    return total, count


def of_documents(*lengths: int, learnt: bool = False) -> Corpus:
    random = np.random.default_rng(1)
    parts = [np.array([0, *random.integers(1, VOCAB, length)], np.uint16) for length in lengths]
    tokens = np.concatenate([*parts, np.zeros(1, np.uint16)])
    mask = (random.random(len(tokens)) > 0.6).astype(np.uint8) if learnt else None
    return Corpus("text", tokens, len(lengths), 3 * len(tokens), learnt=mask)


@pytest.mark.parametrize("length", [2, 3, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT, 3 * CONTEXT + 1, 50])
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_each_documents_tokens_are_scored_once(uneven: Transformer, length: int, rows: int) -> None:
    text = corpus(length)
    assert corpus_nats(loss_of(uneven), text, CONTEXT, rows, CPU) == pytest.approx(by_hand(uneven, text), rel=1e-5)


@pytest.mark.parametrize("learnt", [False, True])
def test_documents_of_all_lengths(uneven: Transformer, learnt: bool) -> None:
    text = of_documents(1, 30, 0, 7, 8, 9, 2, 2, 16, learnt=learnt)
    nats, count = corpus_nats(loss_of(uneven), text, CONTEXT, 2, CPU)
    assert (nats, count) == pytest.approx(by_hand(uneven, text), rel=1e-5)
    assert learnt or count == 75


def test_examples_are_parted_where_they_say_and_not_at_a_token(uneven: Transformer) -> None:
    """The token that starts an example may also end an answer within one."""
    tokens = np.array([0, 5, 6, 0, 7, 8, 0, 0, 9, 3, 0], np.uint16)
    learnt = np.array([0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0], np.uint8)
    text = Corpus("chats", tokens, 2, 30, learnt=learnt, starts=np.array([0, 7, 10]))
    nats, count = corpus_nats(loss_of(uneven), text, CONTEXT, 3, CPU)
    assert (nats, count) == pytest.approx(by_hand(uneven, text), rel=1e-5)
    assert count == 5


def test_the_end_held_out_of_a_document_begins_with_its_own_first_token(uneven: Transformer, tiny_folder: Path) -> None:
    from gptcli.text.tokenizer import Tokenizer

    whole = replace(of_documents(1000), starts=np.array([0, 1001]))
    train, end = hold_out_end(whole, Tokenizer.from_folder(tiny_folder), least=20)
    assert train.starts is not None
    assert end.starts is not None
    assert (train.starts.tolist(), end.starts.tolist()) == ([0], [19])
    nats, count = corpus_nats(loss_of(uneven), end, CONTEXT, 3, CPU)
    assert (nats, count) == pytest.approx(by_hand(uneven, end), rel=1e-5)
    assert count == 18


class Turn(Ranks):
    """One of several ranks; adds up nothing."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__("cpu")
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [2, 3, 40])
def test_ranks_make_as_many_passes_and_score_all_together(uneven: Transformer, count: int) -> None:
    text = of_documents(1, 30, 0, 7, 8, 9, 2, 2, 16)
    told, passes = [], []
    for rank in range(count):
        calls: list[int] = []

        def objective(ids: Any, targets: Any, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            return loss_of(uneven)(ids, targets) if (targets != IGNORED).any() else torch.zeros(())

        told.append(corpus_nats(objective, text, CONTEXT, 1, CPU, Turn(rank, count)))
        passes.append(len(calls))
    assert len(set(passes)) == 1
    together = sum(nats for nats, _ in told), sum(tokens for _, tokens in told)
    assert together == pytest.approx(by_hand(uneven, text), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_objective_gives_the_same_with_and_without_a_gradient(uneven: Transformer, dtype: torch.dtype) -> None:
    objective = Objective(uneven, dtype)
    ids, targets = (torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    targets[0, :5] = IGNORED
    with torch.no_grad():
        told = objective(ids, targets)
        idle = objective(ids[:1, :1], torch.full((1, 1), IGNORED))
    assert told.dtype is torch.float32
    assert told.item() == pytest.approx(objective(ids, targets).item(), rel=1e-6)
    assert idle.item() == 0


def test_the_event_adds_up_texts(uneven: Transformer) -> None:
    texts = [replace(of_documents(30, 4), name="a", text_bytes=90), replace(of_documents(5), name="b", text_bytes=20)]
    told = bits_per_byte(Objective(uneven, torch.float32), texts, CONTEXT, 2, Ranks())
    nats = {text.name: by_hand(uneven, text) for text in texts}
    assert told["valid"] == pytest.approx(
        {"a": nats["a"][0] / math.log(2) / 90, "b": nats["b"][0] / math.log(2) / 20}, rel=1e-5
    )
    total = nats["a"][0] + nats["b"][0]
    assert told["bits_per_byte"] == pytest.approx(total / math.log(2) / 110, rel=1e-5)
    assert told["loss"] == pytest.approx(total / 39, rel=1e-5)
