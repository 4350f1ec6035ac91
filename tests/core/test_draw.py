"""The fast draws against ``sample``, their slow twin: not a token may differ, however near two of them are."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptcli.core import draw as draw_module
from gptcli.core.build import open_model
from gptcli.core.draw import Draw
from gptcli.core.generate import generate
from gptcli.core.native_build import Library, load
from gptcli.core.requests import Request
from gptcli.core.sampling import History, gumbel_noise, sample
from gptcli.core.settings import Sampling
from gptcli.core.stepping import Stepping
from gptcli.text.tokenizer import Tokenizer

INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module", params=["PyTorch", "this CPU's", "plain"])
def library(request: pytest.FixtureRequest) -> Library | None:
    if request.param == "PyTorch":
        return None
    if request.param == "plain":
        plain: Library = request.getfixturevalue("plain")
        return plain
    return load(request.getfixturevalue("built"))


def check(
    library: Library | None, logits: Tensor, sampling: Sampling, seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The tokens of one draw, which are the slow twin's."""
    wanted = sample(logits, sampling, seeds, positions)
    got = Draw(sampling, library)(logits, seeds, positions)
    assert got.dtype == torch.int64
    assert torch.equal(got, wanted), (sampling, seeds, positions)
    return wanted


def some_logits(size: int, rows: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, size, generator=generator)
    place = seed % size
    match kind:
        case "ties":
            return logits.round()
        case "all the same":
            return torch.full_like(logits, 1.5)
        case "most forbidden":
            logits[torch.rand(rows, size, generator=generator) < 0.8] = -INF
        case "all forbidden":
            logits[-1] = -INF
        case "NaN":
            logits[0, place] = NAN
        case "infinite":
            logits[0, place] = INF
        case "huge":
            return logits * 1e37
        case "nearly the same":
            return logits * 1e-3
        case "ordered":
            return logits.sort(-1).values
        case "bfloat16":
            return logits.bfloat16()
    return logits


KINDS = (
    "plain", "ties", "all the same", "most forbidden", "all forbidden", "NaN", "infinite", "huge", "nearly the same",
    "ordered", "bfloat16",
)  # fmt: skip
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127, 300, 1000, 4096, 4099)


def chain_settings() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        temperature=st.sampled_from([0, 1e-45, 1e-30, 1e-6, 0.2, 0.8, 1, 5]),
        top_k=st.sampled_from([0, 0, 1, 2, 40, 500, 10**12]),
        top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1, 1e-6, 1e-300]),
        min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.sampled_from(SIZES),
    rows=st.sampled_from([1, 1, 2, 8]),
    kind=st.sampled_from(KINDS),
    sampling=chain_settings(),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
)
@example(size=4099, rows=1, kind="plain", sampling=Sampling(1, 500, 0.9, 0.001), seed=1, position=0)
@example(size=300, rows=2, kind="most forbidden", sampling=Sampling(1, 200), seed=1, position=0)
def test_every_draw_is_the_slow_twins(
    library: Library | None, size: int, rows: int, kind: str, sampling: Sampling, seed: int, position: int
) -> None:
    logits = some_logits(size, rows, kind, seed % 1000)
    check(library, logits, sampling, [seed ^ row for row in range(rows)], [position + row for row in range(rows)])


@pytest.mark.parametrize("size", [50_257, 60_001])
@pytest.mark.parametrize(
    "chain", [(0.8,), (5,), (0.8, 40), (1, 3000), (0.8, 0, 0.95), (5, 0, 0.5), (1, 1000, 0.9, 0.01)]
)
def test_large_vocabularies(library: Library | None, size: int, chain: tuple[Any, ...]) -> None:
    for seed, kind in enumerate(("plain", "ties", "nearly the same")):
        check(library, some_logits(size, 2, kind, seed), Sampling(*chain), [seed, 2**63 + seed], [7, 1000])


@pytest.mark.parametrize("chain", [(1,), (1, 100), (1, 0, 0.9), (1, 0, 1, 0.1)])
def test_a_tie_to_the_last_bit_is_decided_as_ever(library: Library | None, chain: tuple[Any, ...]) -> None:
    """Logits that take the noise away leave scores that differ by rounding alone."""
    for seed in range(40):
        logits = 0.5 - gumbel_noise([seed], [3], 1003, "cpu")
        scores = (logits + gumbel_noise([seed], [3], 1003, "cpu"))[0]
        assert scores.max() - scores.min() < 1e-5
        check(library, logits, Sampling(*chain), [seed], [3])
        for above in (1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3):
            logits[0, 500] += above
            check(library, logits, Sampling(*chain), [seed], [3])


def test_top_p_where_the_sum_is_just_p(library: Library | None) -> None:
    """Tenths in any order, and p at or beside a border: what rounding makes of it is what counts."""
    for top_p in (0.1, 0.2, 0.30000001, 0.7, 0.9, 0.99999):
        for position in range(30):
            check(library, torch.zeros(1, 10), Sampling(top_p=top_p), [0], [position])
    steps = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]
    for top_p in (0.4, 0.7, 0.9):
        for position in range(30):
            check(library, steps, Sampling(top_p=top_p), [0], [position])


@pytest.mark.parametrize("kind", ["plain", "ties", "most forbidden"])
def test_top_p_keeps_the_set_of_the_stable_sort(library: Library | None, kind: str) -> None:
    """As many draws as it takes to see all that may be drawn, at a temperature that makes all about as likely."""
    logits = some_logits(50, 1, kind, 5)
    sampling = Sampling(temperature=20, top_p=0.7)
    drawn = {check(library, logits, sampling, [seed], [0]).item() for seed in range(600)}
    ordered, index = (logits / 20).sort(descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    assert drawn == set(index[before < 0.7].tolist())


def test_a_thousand_positions_in_a_row(library: Library | None) -> None:
    """One draw for all of them, as in a text; other rows from the middle on, and a jump."""
    logits = some_logits(1001, 3, "plain", 1)
    sampling = Sampling(temperature=1.3)
    draw = Draw(sampling, library)
    for seeds, starts, count in (([1, 2, 3], [0, 5, 9], 400), ([1, 3], [400, 409], 200), ([3], [7], 400)):
        for step in range(count):
            positions = [start + step for start in starts]
            got = draw(logits[: len(seeds)], seeds, positions)
            assert torch.equal(got, sample(logits[: len(seeds)], sampling, seeds, positions))


def test_noise_ahead_is_the_noise() -> None:
    noise = draw_module._Noise()
    for seeds, positions in (([7], [0]), ([7], [1]), ([7], [40]), ([7], [39]), ([7, 8], [39, 2]), ([7, 8], [40, 2])):
        for size in (1, 301, 40_000):
            assert torch.equal(noise(seeds, positions, size), gumbel_noise(seeds, positions, size, "cpu"))


def test_penalties_and_bias_come_first(library: Library | None) -> None:
    logits = some_logits(200, 2, "ties", 3)
    history = History([[1, 2, 3], [4, 4, 4]], 200, torch.device("cpu"))
    history.add(logits.argmax(-1))
    sampling = Sampling(0.7, 0, 0.9, 0.01, 1.3, 0.4, 0.2, {5: 4.0, 6: -INF, 7: 1.0, 999: 1.0})
    draw = Draw(sampling, library)
    for position in range(100):
        wanted = sample(logits, sampling, [1, 2], [position] * 2, history)
        assert torch.equal(draw(logits, [1, 2], [position] * 2, history), wanted)
    banned = Sampling(temperature=0, logit_bias={int(logits[0].argmax()): -INF})
    assert torch.equal(Draw(banned, library)(logits, [1, 2], [0, 0]), sample(logits, banned, [1, 2], [0, 0]))


def test_rows_that_lie_apart_in_memory(library: Library | None) -> None:
    logits = some_logits(100, 4, "plain", 2)
    for chosen in (logits[::2], logits[:1].expand(3, -1), logits.t().contiguous().t(), logits[:, 3:50]):
        for sampling in (Sampling(0), Sampling(0.9)):
            rows = len(chosen)
            assert chosen.shape[0] == rows
            check(library, chosen, sampling, list(range(rows)), [5] * rows)


def test_as_many_seeds_and_positions_as_rows(library: Library | None) -> None:
    draw = Draw(Sampling(), library)
    for seeds, positions in (([1], [2, 3]), ([1, 2], [3]), ([1], [3])):
        with pytest.raises(ValueError, match="for 2 rows"):
            draw(torch.zeros(2, 10), seeds, positions)


@pytest.mark.parametrize("chain", [(0,), (0.8,), (0.8, 40), (0.8, 0, 0.9), (1, 50, 0.9, 0.02)])
def test_hardly_a_draw_is_left_to_the_slow_twin(built: Path, chain: tuple[Any, ...]) -> None:
    """Else the native draw would be right for nothing."""
    native = draw_module._NativeDraw(Sampling(*chain), load(built))
    logits = some_logits(4099, 4, "plain", 4)
    left = 0
    for position in range(250):
        _, decided = native(logits, range(4), [position] * 4)
        left += 0 if decided is None else int((~decided).sum())
    assert left <= 10  # of 1,000


def test_a_text_is_drawn_natively(tiny_folder: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32", native=built)

    def tokens() -> list[int | None]:
        request = Request([1, 2], seed=5, max_tokens=40, ignore_eos=True)
        return [step.token for step in generate(model, [request], Sampling(temperature=0.9))]

    monkeypatch.setattr(Draw, "_in_torch", lambda *_: pytest.fail("it was drawn by PyTorch"))
    natively = tokens()
    monkeypatch.undo()
    model.stepping = Stepping(model.transformer)
    assert natively == tokens()


def test_a_native_draw_is_many_times_as_fast(built: Path) -> None:
    """In time of the processor, which other processes don't take from this one."""
    logits, sampling = some_logits(50_257, 1, "plain", 6), Sampling(temperature=0.8)
    draw = Draw(sampling, load(built))

    def fastest(function: Any) -> float:
        seconds = []
        for position in range(15):
            start = time.process_time()
            function(logits, [1], [position])
            seconds.append(time.process_time() - start)
        return min(seconds)

    fast = fastest(draw)
    assert fastest(lambda logits, seeds, positions: sample(logits, sampling, seeds, positions)) > 3 * fast
