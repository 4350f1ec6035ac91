"""Surprise in windows: against brute force, a plain forward pass, and itself one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.core import score as module
from gptcli.core.build import Model, open_model, random_model
from gptcli.core.score import (
    IGNORED,
    Mark,
    Scored,
    Stream,
    Totals,
    Window,
    all_batches,
    batches,
    score,
    score_slowly,
    target_nats,
    windows,
)
from gptcli.errors import CorruptError, UsageError
from gptcli.spec.config import from_hf
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.data import IGNORED as IGNORED_IN_TRAINING
from tests.conftest import ROOT

CONTEXT, VOCAB = 8, 300
START = 0


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    """One of a short context, whose predictions are far from even."""
    raw = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": START}
    transformer = random_model(from_hf({"model_type": "gpt2", **raw}), seed=3).eval()
    for parameter in transformer.parameters():
        parameter.requires_grad_(False).mul_(5)
    words = Tokenizer.from_folder(tiny_folder)
    return Model("small", transformer.config, transformer, words, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def startless(model: Model) -> Model:
    return replace(model, config=replace(model.config, bos_id=None))


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def stream(*documents: Sequence[int], pieces: int = 1000) -> Iterator[Sequence[int] | Mark]:
    for ids in documents:
        for first in range(0, len(ids), pieces):
            yield ids[first : first + pieces]
        yield Mark.END


def bits_of(scored: Iterator[Scored]) -> list[list[float | None]]:
    """The bits of each document's tokens."""
    found: list[list[float | None]] = []
    fresh = True
    for piece in scored:
        if fresh:
            found.append([])
        assert piece.document == len(found) - 1
        found[-1] += [bits for _, bits in piece.tokens()]
        fresh = piece.last
    assert fresh
    return found


def same(one: Sequence[float | None], other: Sequence[float | None], tolerance: float = 1e-5) -> bool:
    assert [bits is None for bits in one] == [bits is None for bits in other]
    return [bits for bits in one if bits is not None] == pytest.approx(
        [bits for bits in other if bits is not None], rel=tolerance, abs=tolerance
    )


# --- The bits


@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 12, 16, 17, 40])
def test_windows_with_a_stride_are_the_brute_force_twin(
    model: Model, startless: Model, length: int, stride: int
) -> None:
    ids = some_ids(length)
    for one in (model, startless):
        (bits,) = bits_of(score(one, stream(ids), stride=stride))
        assert len(bits) == length
        assert same(bits, score_slowly(one, ids, stride))


def test_total_bits_are_the_cross_entropy_of_a_plain_forward_pass(tiny_folder: Path) -> None:
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")
    ids = model.tokenizer.encode("Once upon a time there was a king who had a daughter.")
    assert len(ids) < model.config.context
    with torch.no_grad():
        logits = model.transformer(torch.tensor([[START, *ids[:-1]]]))[0]
    nats = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(ids), reduction="sum").item()
    (piece,) = score(model, stream(ids))
    assert piece.total_bits == pytest.approx(nats / math.log(2), rel=1e-6)
    assert piece.tokens_scored == len(ids)
    assert piece.ids.tolist() == ids


def test_a_model_of_rotary_positions_and_shared_keys(model: Model, tiny_folder: Path) -> None:
    config = replace(
        model.config, position="rope", rope_theta=100.0, heads=4, kv_heads=2, head_dim=4, norm="rmsnorm", bos_id=1
    )
    transformer = random_model(config, seed=1).eval()
    for parameter in transformer.parameters():
        parameter.requires_grad_(False).mul_(5)
    other = replace(model, config=transformer.config, transformer=transformer)
    ids = some_ids(30)
    (bits,) = bits_of(score(other, stream(ids), stride=3))
    assert same(bits, score_slowly(other, ids, 3))


def test_in_bfloat16_the_softmax_is_still_float32() -> None:
    """The nats are those of the bfloat16 logits, to float32's precision and not to bfloat16's."""
    vectors = torch.randn(50, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    matrix = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    targets = torch.arange(50)
    nats = target_nats(vectors, lambda part: part @ matrix.t(), VOCAB, targets)
    expected = torch.nn.functional.cross_entropy((vectors @ matrix.t()).double(), targets, reduction="none")
    assert nats.dtype is torch.float32
    assert torch.allclose(nats.double(), expected, rtol=1e-5, atol=1e-5)


def test_logits_are_made_in_chunks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(100)
    (whole,) = bits_of(score(model, stream(ids)))
    seen: list[int] = []
    real = type(model.transformer.unembedding).forward
    monkeypatch.setitem(module.LOGIT_CHUNKS, "cpu", 3 * VOCAB)
    monkeypatch.setattr(
        type(model.transformer.unembedding),
        "forward",
        lambda self, x: (seen.append(len(x)) if self is model.transformer.unembedding else None, real(self, x))[1],
    )
    (chunked,) = bits_of(score(model, stream(ids)))
    assert same(chunked, whole)
    assert max(seen) == 3
    assert sum(seen) == 100  # what is only context has no logits


# --- Several documents


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=9),
    stride=st.integers(1, CONTEXT),
    room=st.sampled_from([8, 20, 64, 1000]),
    pieces=st.sampled_from([1, 3, 1000]),
)
def test_batches_equal_one_at_a_time(model: Model, lengths: list[int], stride: int, room: int, pieces: int) -> None:
    documents = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    together = bits_of(score(model, stream(*documents, pieces=pieces), stride=stride, batch_tokens=room))
    assert [len(bits) for bits in together] == lengths
    alone = bits_of(score(model, stream(*documents), stride=stride, batch_tokens=1))
    assert all(same(*pair) for pair in zip(together, alone, strict=True))


def test_the_ids_come_back_in_their_order(startless: Model) -> None:
    documents = [some_ids(length, length) for length in (30, 0, 1, 5, 17)]
    found: dict[int, list[int]] = {}
    for piece in score(startless, stream(*documents), stride=3, batch_tokens=20):
        found.setdefault(piece.document, []).extend(piece.ids.tolist())
    assert list(found.values()) == documents


def test_a_pause_gives_all_that_is_whole(model: Model) -> None:
    """Whoever reads line by line has a line's score before the next line is there."""
    asked: list[int] = []

    def lines() -> Stream:
        for number in range(3):
            asked.append(number)
            yield some_ids(3, number)
            yield Mark.END
            yield Mark.PAUSE

    for number, piece in enumerate(score(model, lines())):
        assert asked == list(range(number + 1))
        assert (piece.document, piece.last) == (number, True)
    assert len(asked) == 3


def test_a_long_document_is_given_before_it_ends(model: Model) -> None:
    read = 0

    def endless() -> Stream:
        nonlocal read
        while True:
            read += 1
            yield some_ids(5)

    scored = score(model, endless(), batch_tokens=8)
    assert not next(scored).last
    assert read < 100


def test_windows_of_like_length_share_a_batch() -> None:
    made = [Window(torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)) for n in (2, 8, 3, 8, 2, 1)]
    made.append(Window(torch.ones(8, dtype=torch.int64), torch.full((8,), IGNORED)))  # nothing to learn in it
    shapes = [(list(numbers), tuple(ids.shape)) for numbers, ids, _ in batches(made, room=8)]
    assert shapes == [([1], (1, 8)), ([3], (1, 8)), ([2, 0], (2, 3)), ([4, 5], (2, 2))]
    for _, ids, targets in batches(made, room=8):
        assert ((targets == IGNORED) == (ids == 0)).all()
    assert sum(int((targets != IGNORED).sum()) for _, targets in all_batches(made, 8)) == 24


def test_what_is_not_learnt_is_no_target() -> None:
    ids = torch.arange(20)
    targets = ids.masked_fill(ids % 3 == 0, IGNORED)
    made = list(windows([(ids[:7], targets[:7]), (ids[7:], targets[7:])], CONTEXT, 5))
    scored = [int(target) for window in made for target in window.targets if target != IGNORED]
    assert scored == [number for number in range(1, 20) if number % 3]
    assert [window.last for window in made] == [False] * (len(made) - 1) + [True]
    assert IGNORED == IGNORED_IN_TRAINING


# --- Totals, and what is refused


def test_totals() -> None:
    totals = Totals(30.0, 10, 5, 1)
    assert (totals.bits_per_byte, totals.perplexity) == (6.0, 8.0)
    assert (Totals().bits_per_byte, Totals().perplexity) == (None, None)
    assert Totals(1e6, 1, 5).perplexity is None


@pytest.mark.parametrize("stride", [0, -1, CONTEXT + 1])
def test_a_stride_out_of_range_is_refused(model: Model, stride: int) -> None:
    with pytest.raises(UsageError, match="stride"):
        next(score(model, stream([1, 2]), stride=stride))


def test_an_id_that_the_model_lacks_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        list(score(model, stream([1, VOCAB, 2])))


def test_weights_that_give_no_numbers_are_told(model: Model) -> None:
    broken = random_model(model.config, seed=1).eval().requires_grad_(False)
    broken.norm.weight.fill_(math.nan)
    with pytest.raises(CorruptError, match="not finite"):
        list(score(replace(model, transformer=broken), stream([1, 2, 3])))


def test_the_shipped_model_finds_a_story_less_surprising_than_its_words_in_disorder() -> None:
    folder = ROOT / "weights" / "fable"
    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    texts = ("Once upon a time there was a little girl.", "girl was upon a Once little. time a there")
    story, disorder = (next(score(model, stream(model.tokenizer.encode(text)))).total_bits for text in texts)
    assert story < 0.5 * disorder
