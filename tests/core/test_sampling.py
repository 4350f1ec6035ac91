"""The filter chain against a twin of Python lists, the noise against Python integers, the draws against softmax.

All seeds are fixed, so a statistical test gives the same number on every run: its limits are wide (4 standard
deviations and more) but a wrong distribution is far outside, which ``test_the_chi_square_test_can_fail`` shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptcli.core import sampling as sampling_module
from gptcli.core.sampling import History, filter_logits, gumbel_noise, noise_keys, sample
from gptcli.core.settings import Sampling
from gptcli.errors import UsageError

INF = math.inf
CPU = torch.device("cpu")


# The chain.


def chain_twin(
    logits: Sequence[float], s: Sampling, prompt: Sequence[int], made: Sequence[int]
) -> tuple[list[float], set[int]]:
    """The chain by the book, on one row in float64; also the ids that are too close to a border to call."""
    x = list(logits)
    for token in range(len(x)):
        if token in prompt or token in made:
            x[token] = x[token] / s.repetition_penalty if x[token] > 0 else x[token] * s.repetition_penalty
        x[token] -= made.count(token) * s.frequency_penalty
        if token in made:
            x[token] -= s.presence_penalty
    for token, bias in s.logit_bias.items():
        if token < len(x):
            x[token] += bias
    unclear: set[int] = set()
    if s.temperature == 0:
        return x, unclear
    x = [v / s.temperature for v in x]
    if 0 < s.top_k < len(x):
        least = sorted(x, reverse=True)[s.top_k - 1]
        x = [v if v >= least else -INF for v in x]
    if s.top_p < 1:
        order = sorted(range(len(x)), key=lambda i: -x[i])
        total = math.fsum(math.exp(v - max(x)) for v in x)
        before = 0.0
        for token in order:
            if abs(before - s.top_p) < 1e-5:
                unclear.add(token)
            probability = math.exp(x[token] - x[order[0]]) / total
            if before >= s.top_p:
                x[token] = -INF
            before += probability
    if s.min_p > 0:
        least = max(x) + math.log(s.min_p)
        if s.min_p < 1:
            unclear |= {token for token, v in enumerate(x) if abs(v - least) < 1e-4}
        x = [v if v >= least else -INF for v in x]
    return x, unclear


# Logits and penalties are multiples of 1/8 and powers of two, so that what ties in float64 ties in float32.
eighths = st.integers(-80, 80).map(lambda n: n / 8)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[float], Sampling, list[int], list[int]]:
    size = draw(st.integers(1, 12))
    ids = st.lists(st.integers(0, size - 1), max_size=6)
    sampling = Sampling(
        temperature=draw(st.sampled_from([0, 0.3, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 3, 5, 20])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.6, 0.3, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.05, 0.4, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 2.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.25, -2.0])),
        logit_bias=draw(
            st.dictionaries(st.integers(0, size + 3), st.one_of(eighths, st.sampled_from([-INF])), max_size=3)
        ),
    )
    return draw(st.lists(eighths, min_size=size, max_size=size)), sampling, draw(ids), draw(ids)


def history_of(prompts: Sequence[Sequence[int]], made: Sequence[Sequence[int]], size: int) -> History:
    """Rows may have made different numbers of tokens; a History counts them together, so fill its table."""
    history = History(prompts, size, CPU)
    for row, ids in enumerate(made):
        for id_ in ids:
            history.made[row, id_] += 1
    return history


@settings(max_examples=400, deadline=None, derandomize=True)
@given(chains())
@example(([1.0, 1.0, 1.0, 0.0], Sampling(top_k=2), [], []))
@example(([1.0, 1.0, 1.0, 0.0], Sampling(top_p=0.5), [], []))
def test_the_chain_equals_its_twin(case: tuple[list[float], Sampling, list[int], list[int]]) -> None:
    logits, sampling, prompt, made = case
    if all(sampling.logit_bias.get(token) == -INF for token in range(len(logits))):
        return  # nothing may be drawn: not a distribution
    # Beside it, a row of another history: rows must not leak into each other.
    history = history_of([prompt, [0]], [made, []], len(logits))
    got = filter_logits(torch.tensor([logits, logits[::-1]]), sampling, history)
    assert got.dtype == torch.float32
    for row, values, past in ((0, logits, (prompt, made)), (1, logits[::-1], ([0], []))):
        wanted, unclear = chain_twin(values, sampling, *past)
        for token, value in enumerate(wanted):
            if token not in unclear:
                assert got[row, token].item() == pytest.approx(value, rel=1e-5, abs=1e-5), (row, token)
        assert got[row].max() > -INF


def kept(logits: Sequence[float], **settings: Any) -> list[int]:
    row = filter_logits(torch.tensor([logits]), Sampling(**settings))[0]
    return [token for token, value in enumerate(row.tolist()) if value > -INF]


def test_top_k_keeps_ties_with_the_kth() -> None:
    assert kept([3, 1, 2, 2, 2, 0], top_k=2) == [0, 2, 3, 4]
    assert kept([3, 1, 2, 2, 2, 0], top_k=1) == [0]
    assert kept([3, 1, 2], top_k=3) == kept([3, 1, 2], top_k=99) == kept([3, 1, 2], top_k=0) == [0, 1, 2]


def test_top_p_keeps_tokens_until_p_is_reached() -> None:
    logits = [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.41) == [1, 2]
    assert kept(logits, top_p=0.69) == [1, 2]
    assert kept(logits, top_p=0.71) == [1, 2, 3]
    assert kept(logits, top_p=0.95) == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [1e-300, 1e-9, 0.1])
def test_top_p_keeps_at_least_one(top_p: float) -> None:
    assert kept([0.0] * 50, top_p=top_p)[0] == 0
    assert kept([0.0, 0.0, 30.0], top_p=top_p) == [2]


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert kept(logits, min_p=0.11) == [0, 1, 2]
    assert kept(logits, min_p=0.55) == [0, 1]
    assert kept([1, 2, 2], min_p=1.0) == [1, 2]


def test_filters_see_the_logits_after_the_temperature_and_each_other() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert kept(logits, min_p=0.5) == [0, 1]
    assert kept(logits, min_p=0.5, temperature=0.5) == [0]  # squared: 0.25, 0.09, 0.04
    # Among the two that top-k leaves, the first has 5/8.
    assert kept(logits, top_p=0.6) == [0, 1]
    assert kept(logits, top_p=0.6, top_k=2) == [0]


def test_temperature_0_takes_the_likeliest_and_never_divides() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0], [0.0, 0.0, 0.0], [1e38, -1e38, 3e38]])
    greedy = Sampling(temperature=0, top_k=1, top_p=0.1, min_p=0.9)
    assert torch.equal(filter_logits(logits, greedy), logits)
    for seed in range(5):
        assert sample(logits, greedy, [seed] * 3, [seed] * 3).tolist() == [1, 0, 2]


@pytest.mark.parametrize("temperature", [1e-6, 1e-37, 1e-39, 1e-45, 1e-300])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    """However small: a quotient beyond the largest float must not make several tokens equal."""
    logits = torch.tensor([[1.0, 0.0, 5.0, 4.0], [-3.0, -1.0, -2.0, -9.0]])
    for seed in range(10):
        assert sample(logits, Sampling(temperature=temperature), [seed] * 2, [3] * 2).tolist() == [2, 1]


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, 2.0, -2.0, -2.0, 2.0, 0.0]])
    history = History([[0, 2, 2]], 6, CPU)
    for token in (4, 4, 3):
        history.add(torch.tensor([token]))
    assert history.prompt.tolist() == [[1, 0, 2, 0, 0, 0]]
    assert history.made.tolist() == [[0, 0, 0, 1, 2, 0]]

    def after(**settings: float) -> list[float]:
        return filter_logits(logits, Sampling(**settings), history)[0].tolist()

    # Repetition looks at prompt and text; frequency and presence at the text alone.
    assert after(repetition_penalty=2) == [1.0, 2.0, -4.0, -4.0, 1.0, 0.0]
    assert after(frequency_penalty=0.5) == [2.0, 2.0, -2.0, -2.5, 1.0, 0.0]
    assert after(presence_penalty=0.5) == [2.0, 2.0, -2.0, -2.5, 1.5, 0.0]
    assert after(repetition_penalty=2, frequency_penalty=1, presence_penalty=0.25, temperature=2) == [
        0.5, 1.0, -2.0, (-4 - 1 - 0.25) / 2, (1 - 2 - 0.25) / 2, 0.0
    ]  # fmt: skip


def test_history_select_keeps_rows() -> None:
    history = History([[0], [1], [1, 1]], 3, CPU)
    history.add(torch.tensor([2, 0, 1]))
    history.select([2, 0])
    assert history.prompt.tolist() == [[0, 2, 0], [1, 0, 0]]
    assert history.made.tolist() == [[0, 1, 0], [0, 0, 1]]
    history.add(torch.tensor([0, 2]))
    assert history.made.tolist() == [[1, 1, 0], [0, 0, 2]]


def test_looks_back() -> None:
    assert not Sampling(temperature=0.3, top_k=4, logit_bias={1: 2.0}).looks_back
    for name, value in (("repetition_penalty", 1.1), ("frequency_penalty", 0.1), ("presence_penalty", -0.1)):
        assert Sampling(**{name: value}).looks_back


def test_logit_bias_forbids_forces_and_passes_over_unknown_ids() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    for temperature in (0, 1):
        banned = Sampling(temperature=temperature, logit_bias={1: -INF, 7: 100.0, 3: -INF})
        assert 1 not in [sample(logits, banned, [seed], [0]).item() for seed in range(100)]
        for more in ({}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2}):
            forced = Sampling(temperature=temperature, logit_bias={0: INF}, **more)
            assert {sample(logits, forced, [seed], [0]).item() for seed in range(20)} == {0}
    moved = filter_logits(logits, Sampling(logit_bias={0: 0.5, 2: -3.0, 99: 1.0}))
    assert moved.tolist() == [[1.5, 5.0, -1.0]]


def test_bfloat16_logits_are_filtered_in_float32() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    got = filter_logits(logits, Sampling(temperature=0.7))
    torch.testing.assert_close(got, logits.float() / 0.7)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": INF}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": math.nan}, "top-p nan"),
        ({"min_p": -0.1}, "min-p -0.1"),
        ({"min_p": 1.1}, "min-p 1.1"),
        ({"min_p": math.nan}, "min-p nan"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0.0"),
        ({"repetition_penalty": INF}, "repetition-penalty inf"),
        ({"frequency_penalty": math.nan}, "frequency-penalty nan"),
        ({"presence_penalty": INF}, "presence-penalty inf"),
        ({"logit_bias": {-1: 1.0}}, "logit-bias -1:1.0"),
        ({"logit_bias": {1: math.nan}}, "logit-bias 1:nan"),
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Sampling(**wrong)
    assert caught.value.hint


# The noise.

BITS = 2**32 - 1


def murmur(x: int) -> int:
    """MurmurHash3's 32-bit finalizer as its author wrote it (fmix32)."""
    x ^= x >> 16
    x = x * 0x85EBCA6B & BITS
    x ^= x >> 13
    x = x * 0xC2B2AE35 & BITS
    return x ^ x >> 16


def noise_integer(seed: int, position: int, token: int) -> int:
    first, second = noise_keys(seed, position)
    return murmur(murmur((token * 0x9E3779B1 + first) & BITS) ^ second)


def gumbel_of(integer: int) -> float:
    """The noise that an integer stands for, in float64; below 1 - 2**-24 the fast one follows to rounding."""
    uniform = min((integer + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-uniform))


EDGES = [0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x243F6A88, 0xDEADBEEF]


def test_the_mixer_is_murmurs_on_tensors_and_on_integers() -> None:
    assert murmur(1) == 0x514E28B7
    values = EDGES + torch.randint(2**32, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = [murmur(value) for value in values]
    assert [sampling_module._mix_int(value) for value in values] == wanted
    assert sampling_module._mix(torch.tensor(values)).tolist() == wanted


def test_noise_equals_python_integers() -> None:
    seeds = [0, 1, 42, 2**31, 2**32, 2**63 - 1]
    positions = [0, 1, 77, 1023, 2**20, 5]
    noise = gumbel_noise(seeds, positions, 3000, "cpu")
    assert noise.dtype == torch.float32
    assert noise.shape == (6, 3000)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        wanted = torch.tensor([gumbel_of(noise_integer(seed, position, token)) for token in range(3000)])
        torch.testing.assert_close(noise[row], wanted, atol=2e-5, rtol=0)


def test_noise_reaches_large_vocabularies_without_overflow() -> None:
    noise = gumbel_noise([9], [4], 300_000, "cpu")[0]
    for token in (128_255, 262_143, 299_999):
        assert noise[token].item() == pytest.approx(gumbel_of(noise_integer(9, 4, token)), abs=2e-5)


def test_the_integers_never_change() -> None:
    """The same seed gives the same text in the next version, too: these were drawn once."""
    pinned = [noise_integer(seed, position, token) for seed, position, token in PINNED]
    assert pinned == list(PINNED.values())


PINNED = {
    (0, 0, 0): 182574961,
    (1, 0, 0): 584183028,
    (0, 1, 0): 1812631845,
    (0, 0, 1): 1664390889,
    (2**63 - 1, 1023, 50_256): 2422774823,
}


def test_a_row_depends_on_its_seed_and_position_alone() -> None:
    together = gumbel_noise([5, 6, 5, 5], [0, 3, 3, 0], 100, "cpu")
    assert torch.equal(together[1:2], gumbel_noise([6], [3], 100, "cpu"))
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[2])
    assert torch.equal(gumbel_noise([5], [0], 40, "cpu")[0], together[0, :40])


def test_every_bit_of_the_seed_and_the_position_matters() -> None:
    for seed in (0, 1234, 2**63 - 1):
        base = noise_keys(seed, 10)
        keys = [noise_keys(seed ^ 1 << bit, 10) for bit in range(64)]
        keys += [noise_keys(seed, 10 ^ 1 << bit) for bit in range(32)]
        assert len({base, *keys}) == 97
        assert all(key[0] != base[0] and key[1] != base[1] for key in keys)
        assert all(0 <= part <= BITS for key in keys for part in key)


def test_extreme_integers_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    integers = sorted({*EDGES, 2**32 - 128, 2**32 - 129, 2**32 - 256, 2**24, 2**24 + 1})
    monkeypatch.setattr(sampling_module, "_mix", lambda x: torch.tensor([integers]))
    noise = gumbel_noise([0], [0], len(integers), "cpu")[0]
    assert noise.isfinite().all()
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)
    assert noise[0].item() == pytest.approx(math.log(2**33), abs=1e-4)
    assert noise[-1].item() == pytest.approx(-math.log(24 * math.log(2)), abs=1e-4)


def test_ten_million_values_are_finite_and_have_gumbels_moments() -> None:
    count, total, squares, cubes = 0, 0.0, 0.0, 0.0
    for chunk in range(40):
        noise = gumbel_noise([chunk] * 5, range(5), 50_257, "cpu").double()
        assert noise.isfinite().all()
        count += noise.numel()
        total += noise.sum().item()
        squares += noise.square().sum().item()
        cubes += (noise - 0.5772156649).pow(3).sum().item()
    assert count >= 10**7
    mean, variance = total / count, squares / count - (total / count) ** 2
    deviation = math.pi / math.sqrt(6)
    assert mean == pytest.approx(0.5772156649, abs=5 * deviation / math.sqrt(count))
    assert variance == pytest.approx(deviation**2, abs=5 * deviation**2 * math.sqrt(4.4 / count))
    assert cubes / count == pytest.approx(2 * 1.2020569, abs=0.02)  # 2 zeta(3)


def wilson_hilferty(chi_square: float, freedom: int) -> float:
    """How many standard deviations a chi-square value lies above what is expected (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def surprise(counts: Tensor, probabilities: Tensor) -> float:
    """Of the counts under the probabilities, in standard deviations; cells expected less than 10 times are joined."""
    expected = probabilities.double() * counts.sum()
    order = expected.argsort()
    expected, counts = expected[order], counts.double()[order]
    small = int((expected.cumsum(0) < 10).sum()) + 1
    expected = torch.cat([expected[:small].sum()[None], expected[small:]])
    counts = torch.cat([counts[:small].sum()[None], counts[small:]])
    return wilson_hilferty(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)


def test_wilson_hilferty_by_the_table() -> None:
    """95% of chi-square values with 10 degrees of freedom are below 18.307, with 100 below 124.342."""
    assert wilson_hilferty(18.307, 10) == pytest.approx(1.645, abs=0.01)
    assert wilson_hilferty(124.342, 100) == pytest.approx(1.645, abs=0.01)


@pytest.mark.parametrize(
    "part", [lambda x: x >> 24, lambda x: x >> 12 & 0xFF, lambda x: x & 0xFF], ids=["high", "middle", "low"]
)
def test_hash_bytes_are_uniform(part: Callable[[int], int]) -> None:
    for near in (lambda n: (3, 0, n), lambda n: (3, n, 8), lambda n: (n, 0, 8), lambda n: (n << 32, 0, 8)):
        counts = torch.tensor([part(noise_integer(*near(n))) for n in range(1 << 14)]).bincount(minlength=256)
        assert abs(surprise(counts, torch.full((256,), 1 / 256))) < 4


def test_each_bit_is_set_half_the_time() -> None:
    integers = torch.tensor([noise_integer(n & 127, n >> 7 & 15, n >> 11) for n in range(1 << 16)])
    ones = torch.stack([(integers >> bit & 1).sum() for bit in range(32)])
    assert (ones - (1 << 15)).abs().max() < 5 * 128  # a standard deviation is 128


def correlation(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return float((x * y).mean() / (x.square().mean() * y.square().mean()).sqrt())


def test_neighbours_are_not_correlated() -> None:
    size = 50_000
    limit = 5 / math.sqrt(size)
    base = gumbel_noise([100], [10], size, "cpu")[0]
    for seed, position in ((100, 11), (101, 10), (101, 11), (101, 9), (100 + 2**32, 10), (0, 10), (100, 0)):
        other = gumbel_noise([seed], [position], size, "cpu")[0]
        for shift in (0, 1, 2):
            assert abs(correlation(base[: size - shift], other[shift:])) < limit, (seed, position, shift)
    for shift in (1, 2, 3, 256):
        assert abs(correlation(base[:-shift], base[shift:])) < limit
    # Down one token's column, too: what one token sees at neighbouring positions and seeds.
    for seeds, positions in (([7] * 20_001, range(20_001)), (range(20_001), [7] * 20_001)):
        column = gumbel_noise(list(seeds), positions, 2, "cpu")
        assert abs(correlation(column[1:, 0], column[:-1, 0])) < 5 / math.sqrt(20_000)
        assert abs(correlation(column[1:, 0], column[:-1, 1])) < 5 / math.sqrt(20_000)


LOGITS_OF_8 = {
    "equal": [0.0] * 8,
    "a ladder": [0.5 * n for n in range(8)],
    "one likely": [6.0, 0.0, -1.0, 0.5, 0.0, 1.0, -2.0, 0.0],
    "one rare": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0],
}


@pytest.fixture(scope="module")
def draws_of_8() -> dict[str, Tensor]:
    """How often each of 8 tokens was drawn in a million draws: 1,000 seeds at 1,000 positions."""
    rows = {name: torch.tensor(logits) for name, logits in LOGITS_OF_8.items()}
    counts = {name: torch.zeros(8, dtype=torch.int64) for name in rows}
    positions = list(range(1000)) * 10
    for first in range(0, 1000, 10):
        noise = gumbel_noise([seed for seed in range(first, first + 10) for _ in range(1000)], positions, 8, "cpu")
        for name, logits in rows.items():
            counts[name] += (logits + noise).argmax(-1).bincount(minlength=8)
    return counts


@pytest.mark.parametrize("name", LOGITS_OF_8)
def test_a_million_draws_follow_softmax(name: str, draws_of_8: dict[str, Tensor]) -> None:
    assert draws_of_8[name].sum() == 10**6
    assert abs(surprise(draws_of_8[name], torch.tensor(LOGITS_OF_8[name]).softmax(-1))) < 4


def test_the_chi_square_test_can_fail(draws_of_8: dict[str, Tensor]) -> None:
    """A logit wrong by 0.02, two hundredths of a nat, is seen."""
    wrong = torch.tensor([0.02, *LOGITS_OF_8["a ladder"][1:-1], LOGITS_OF_8["a ladder"][-1] + 0.02])
    assert surprise(draws_of_8["a ladder"], wrong.softmax(-1)) > 6


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 200}])
def test_sample_over_a_thousand_tokens_follows_the_filtered_softmax(settings: dict[str, Any]) -> None:
    logits = 2 * torch.randn(1000, generator=torch.Generator().manual_seed(5))
    chain = Sampling(**settings)
    counts = torch.zeros(1000, dtype=torch.int64)
    for position in range(40):
        drawn = sample(logits.expand(1000, -1), chain, range(1000), [position] * 1000)
        counts += drawn.bincount(minlength=1000)
    wanted = filter_logits(logits[None], chain)[0].softmax(-1)
    assert counts[wanted == 0].sum() == 0
    assert abs(surprise(counts[wanted > 0], wanted[wanted > 0])) < 4


def test_sample_is_the_argmax_of_logits_and_noise() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(6))
    seeds, positions = [1, 1, 2, 3], [0, 1, 0, 9]
    drawn = sample(logits, Sampling(temperature=0.8), seeds, positions)
    assert drawn.dtype == torch.int64
    for row in range(4):
        scores = [
            logits[row, token].item() / 0.8 + gumbel_of(noise_integer(seeds[row], positions[row], token))
            for token in range(50)
        ]
        assert drawn[row] == scores.index(max(scores))
