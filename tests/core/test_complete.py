"""complete(): its probabilities and its token healing against a look at all tokens, and all that a cursor may meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gptcli.core.beams import Beams, Text, rearrange, token_kinds
from gptcli.core.build import Model
from gptcli.core.cache import KVCache
from gptcli.core.complete import Completions, complete, heal
from gptcli.core.predict import next_logits, score_continuations
from gptcli.core.prefixes import Prefixes
from gptcli.errors import LimitError, UsageError
from gptcli.text.ends import UNTIL, Kind, end_of, ending_kinds, kind_of, parting_kinds
from tests.core.test_predict import enlarged

START, END = 0, 0
# Of probabilities that float32 gives in another order of computing; measured: 2e-6.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return enlarged(tiny_folder)


def token(model: Model, id_: int) -> bytes:
    return b"" if id_ == END else model.tokenizer.token_bytes(id_)


def ways(model: Model, data: bytes) -> Iterator[tuple[int, ...]]:
    """All sequences of tokens that are these bytes."""
    if not data:
        yield ()
    for id_ in range(model.config.vocab_size):
        piece = token(model, id_)
        if piece and data.startswith(piece):
            yield from ((id_, *rest) for rest in ways(model, data[len(piece) :]))


def logprobs(model: Model, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
    return [each.logprob for each in score_continuations(model, [prompt], choices)[0]]


def ends_before(piece: bytes, text: str, until: str) -> bool:
    """Whether a text ends before a token, as told by the text that they make; the end of text is an empty one."""
    if until == "cut":  # behind a whole word
        return not piece or kind_of(piece) in parting_kinds(text)
    try:
        return not piece or end_of(text + piece.decode(), until) == len(text)
    except UnicodeDecodeError:  # the beginning of a character, which has a kind nevertheless
        return kind_of(piece) in ending_kinds(text, until)


def ended(model: Model, prompt: Sequence[int], given: bytes, text: str, until: str) -> float:
    """The probability that the tokens after a prompt make ``given`` and the text, which ends there, by all ways."""
    ends = [id_ for id_ in range(model.config.vocab_size) if ends_before(token(model, id_), text, until)]
    total = 0.0
    for way in ways(model, given + text.encode()):
        chances = next_logits(model, [*prompt, *way]).double().softmax(-1)[ends].sum().item()
        total += chances * math.exp(logprobs(model, prompt, [way])[0])
    return total


def reached(model: Model, prompt: Sequence[int], given: bytes) -> float:
    """The probability that the tokens after a prompt begin with bytes, by a look at all tokens at each step."""
    if not given:
        return 1.0
    chances = next_logits(model, prompt).double().softmax(-1).tolist()
    total = 0.0
    for id_, chance in enumerate(chances):
        piece = token(model, id_)
        if piece.startswith(given):
            total += chance
        elif piece and given.startswith(piece):
            total += chance * reached(model, [*prompt, id_], given[len(piece) :])
    return total


def texts(found: Completions) -> list[str]:
    return [each.text for each in found.completions]


# --- Probabilities


@pytest.mark.parametrize("until", ["word", "line"])
def test_probabilities_are_those_of_a_look_at_all_tokens(model: Model, until: str) -> None:
    """Equal where a text is only made by one sequence of tokens, else between its likeliest and all."""
    exact = 0
    for each in complete(model, "", num=12, max_tokens=3, until=until).completions:
        oracles = [ended(model, [START], b"", each.text, until)]
        if until == "line":  # many are only cut
            oracles.append(ended(model, [START], b"", each.text, "cut"))
        if len(list(ways(model, each.text.encode()))) == 1:
            exact += 1
            assert any(each.probability == pytest.approx(oracle, rel=1e-4) for oracle in oracles)
        assert each.probability <= max(oracles) * (1 + 1e-4)
    assert exact >= 2


def test_words_are_different_events(model: Model) -> None:
    found = complete(model, "Once upon", num=40, until="word")
    assert len(set(texts(found))) == len(found.completions) > 10
    chances = [each.probability for each in found.completions]
    assert chances == sorted(chances, reverse=True)
    assert 0 < math.fsum(chances) <= 1 + TOLERANCE


@pytest.mark.parametrize("prefix", ["the kin", "Once upon a ti", "there was a ", "x"])
def test_what_was_given_back_has_the_probability_of_a_look_at_all_tokens(model: Model, prefix: str) -> None:
    ids = model.tokenizer.encode(prefix)
    count = heal(model.tokenizer, ids)
    kept, given = ids[: len(ids) - count] or [START], model.tokenizer.decode_bytes(ids[len(ids) - count :])
    beams = Beams(model, given, wanted=60, rows=60, max_tokens=3, until="word")
    logits = next_logits(model, kept)[None]
    while beams.grow(logits):
        logits = torch.stack([next_logits(model, [*kept, *row.ids]) for row in beams.rows])
    total = reached(model, kept, given)
    assert math.fsum(map(math.exp, beams._reached)) == pytest.approx(total, rel=1e-4)
    single = [each for each in beams.texts() if len(list(ways(model, given + each.text.encode()))) == 1]
    for each in single[:5]:
        oracle = ended(model, kept, given, each.text, "word") / total
        assert math.exp(each.logprob) == pytest.approx(oracle, rel=1e-4)


def test_texts_go_on_from_the_prefix_in_the_tokens_of_one_piece(model: Model) -> None:
    """The tiny tokenizer knows " the": from " t" it has to be found as one token."""
    kept = model.tokenizer.encode("Once upon a time")
    merged = model.tokenizer.encode(" the")
    assert len(merged) == 1
    chance = next_logits(model, kept).softmax(-1)[merged[0]].item()
    total = reached(model, kept, b" t")
    found = complete(model, "Once upon a time t", num=40, until="word", max_tokens=1)
    he = next(each for each in found.completions if each.text == "he")
    assert he.probability <= chance / total * (1 + 1e-4)


def test_the_last_tokens_are_given_back_as_far_as_one_could_begin_with_them(model: Model) -> None:
    tokenizer = model.tokenizer
    for text in ("Once upon a ti", "the kin", "a ", "happy", "x\u4e2d", "\U0001f600", "end.\n"):
        ids = tokenizer.encode(text)
        count = heal(tokenizer, ids)
        assert count >= 1
        tokenizer.decode_bytes(ids[len(ids) - count :]).decode()  # whole characters
        longer = [
            number
            for number in range(1, len(ids) + 1)
            for data in [tokenizer.decode_bytes(ids[-number:])]
            if any(token(model, id_).startswith(data) and token(model, id_) != data for id_ in range(1, 300))
        ]
        assert count >= max(longer, default=1)
    assert heal(tokenizer, []) == 0
    assert heal(tokenizer, [*tokenizer.encode("a"), END]) == 0


# --- Texts


@pytest.mark.parametrize("until", UNTIL)
@pytest.mark.parametrize("prefix", ["", "Once upon a ti", "\u4e2d\u6587", "so \U0001f600", "e\u0301", "a\n", "\ud800x"])
def test_texts_are_whole_characters_and_end_where_they_should(model: Model, prefix: str, until: str) -> None:
    found = complete(model, prefix, num=6, until=until, max_tokens=6)
    assert found == complete(model, prefix, num=6, until=until, max_tokens=6)
    assert len(set(texts(found))) == len(found.completions)
    for each in found.completions:
        assert 0 < each.probability <= 1
        each.text.encode()
        assert "\ufffd" not in each.text
        assert each.text == each.text.rstrip() != ""
        assert end_of(each.text, until) is None
        assert until == "sentence" or "\n" not in each.text


def test_texts_are_no_more_and_no_longer_than_asked_for(model: Model) -> None:
    found = complete(model, "Once", num=2, max_tokens=2)
    assert 1 <= len(found.completions) <= 2
    assert all(len(each.text.encode()) <= 2 * model.tokenizer.spelling.longest for each in found.completions)


def test_what_is_too_unlikely_is_cut_or_left_out(model: Model) -> None:
    everything = complete(model, "Once upon a", until="word", num=10)
    least = everything.completions[2].probability
    some = complete(model, "Once upon a", until="word", num=10, min_prob=least * 0.999)
    assert [each.text for each in some.completions] == texts(everything)[: len(some.completions)]
    assert all(each.probability >= least * 0.999 for each in some.completions)
    assert complete(model, "Once upon a", until="word", min_prob=1.0).completions == ()
    lines = complete(model, "Once upon a", min_prob=least * 0.999)
    assert all(each.probability >= least * 0.999 for each in lines.completions)


def test_a_text_that_was_only_cut_is_not_shown_beside_a_longer_one(model: Model) -> None:
    for least in (0.0, 1e-4, 1e-3, 1e-2):
        found = texts(complete(model, "Once upon", num=8, min_prob=least, max_tokens=4))
        assert len(found) == len(set(found))


def test_a_way_through_others_does_not_count_twice(model: Model) -> None:
    beams = Beams(model, b"", wanted=3, rows=3, max_tokens=3, until="line")
    beams._add((5,), Text("a", math.log(0.5), 0.0, False))
    beams._add((5, 6), Text("a", math.log(0.1), 0.0, False))
    beams._add((7,), Text("a", math.log(0.2), 0.0, False))
    (text,) = beams.texts()
    assert math.exp(text.logprob) == pytest.approx(0.7)


# --- Suffix


def test_with_a_suffix_the_text_that_it_follows_best_wins(model: Model) -> None:
    changed = 0
    for prefix in ("Once upon", "the kin", "a ", "One day"):
        alone = complete(model, prefix, num=6, until="word")
        ids = model.tokenizer.encode(prefix)
        count = heal(model.tokenizer, ids)
        kept = ids[: len(ids) - count] or [START]
        given = model.tokenizer.decode_bytes(ids[len(ids) - count :]).decode()

        def joint(words: Sequence[str], suffix: str, kept: Sequence[int] = kept, given: str = given) -> list[float]:
            return logprobs(model, kept, [model.tokenizer.encode(given + text + suffix) for text in words])

        for suffix in (
            " the",
            ", and",
            "happy.",
            "\n",
            "q",
            " x",
            "?!",
            " king went to the forest with all the animals",
        ):
            found = complete(model, prefix, suffix=suffix, num=6, until="word")
            scores = joint(texts(found), suffix)
            assert scores == sorted(scores, reverse=True)
            assert max(joint(texts(alone), suffix)) <= scores[0] + 1e-4
            changed += texts(found)[0] != texts(alone)[0]
            known = {each.text: each.probability for each in alone.completions}
            for each in found.completions:  # still of the text alone
                assert each.probability == pytest.approx(known.get(each.text, each.probability), rel=1e-4)
    assert changed


# --- Time


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_a_deadline_is_kept_whatever_it_is(model: Model) -> None:
    whole = complete(model, "Once upon a time", num=3, max_tokens=8, clock=Clock(), deadline_seconds=1e9)
    assert not whole.late
    seen = []
    for seconds in range(1, 20):
        clock = Clock()
        found = complete(model, "Once upon a time", max_tokens=8, deadline_seconds=float(seconds), clock=clock)
        assert clock.now <= 1 + seconds + 1  # one look may find that it is over
        seen.append(len(found.completions))
        assert found.late == (found != whole) or found.completions == whole.completions
    assert seen[0] == 0
    assert seen[-1] == len(whole.completions)


def test_a_long_prefix_is_read_in_pieces_and_goes_on_the_next_time(tiny_folder: Path) -> None:
    model = enlarged(tiny_folder)
    remembered = Prefixes(1 << 24)
    text = "the king " * 6
    from gptcli.core import complete as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 4)
        late = complete(model, text, max_tokens=8, prefixes=remembered, deadline_seconds=3.0, clock=Clock())
        assert late.late
        assert late.completions == ()
        again = complete(model, text, max_tokens=8, prefixes=remembered)
    assert again.known > 0
    assert texts(again) == texts(complete(model, text, max_tokens=8))


# --- Prefixes


def test_typing_computes_only_what_is_new_and_gives_the_same(model: Model) -> None:
    remembered = Prefixes(1 << 24)
    text = "Once upon a time there was a king who had a daughter"
    known = 0
    for end in range(30, len(text) + 1):
        warm = complete(model, text[:end], prefixes=remembered, max_tokens=4)
        cold = complete(model, text[:end], max_tokens=4)
        assert texts(warm) == texts(cold)
        for one, other in zip(warm.completions, cold.completions, strict=True):
            assert one.probability == pytest.approx(other.probability, rel=1e-4)
        assert warm.tokens - warm.known <= 3 or end == 30
        known += warm.known
    assert known > 100


def test_of_a_long_prefix_the_end_is_read_from_the_same_place_for_many_keys(model: Model) -> None:
    remembered = Prefixes(1 << 24)
    text = "the king had a daughter. " * 40
    short = complete(model, text[-60:], max_tokens=8)
    assert not short.truncated
    computed = []
    for end in range(len(text) - 40, len(text)):
        found = complete(model, text[:end], max_tokens=8, prefixes=remembered)
        assert found.truncated
        assert found.tokens + 8 <= model.config.context
        assert found.tokens >= (model.config.context - 8) // 2
        computed.append(found.tokens - found.known)
    assert sum(count > 8 for count in computed) < 12


# --- The rest


def test_rows_hold_what_the_hypotheses_have_read(model: Model) -> None:
    shape = {"device": model.device, "dtype": torch.float32}
    cache = KVCache(model.config, 5, 8, **shape)
    cache.set_lengths([2, 2, 2])
    for row in range(3):
        for tensor in (*cache.keys, *cache.values):
            tensor[row] = row
    for parents in ([0, 0, 2, 2], [1, 1, 1, 3, 0], [2], [0, 0, 0]):
        before = [cache.keys[0][row, 0, 0, 0].item() for row in range(len(cache.lengths))]
        order = rearrange(cache, parents)
        assert sorted(order) == list(range(len(parents)))
        assert cache.lengths == [2] * len(parents)
        for row, number in enumerate(order):
            for tensor in (*cache.keys, *cache.values):
                assert bool((tensor[row, :, :2] == before[parents[number]]).all())


def test_every_token_has_a_kind(model: Model) -> None:
    kinds = token_kinds(model).tolist()
    assert len(kinds) == model.config.vocab_size
    assert kinds[END] == Kind.END
    assert Kind.NOTHING not in kinds[1:]


def test_a_model_without_a_start_token_goes_on_from_its_only_token(tiny_folder: Path) -> None:
    import dataclasses

    model = enlarged(tiny_folder)
    model.config = dataclasses.replace(model.config, bos_id=None)
    assert complete(model, "a").tokens == 1
    with pytest.raises(UsageError, match="empty"):
        complete(model, "")


@pytest.mark.parametrize(
    "wrong",
    [{"num": 0}, {"max_tokens": 0}, {"until": "page"}, {"min_prob": 1.5}, {"min_prob": -1}, {"deadline_seconds": 0}],
)
def test_values_out_of_range_are_refused(model: Model, wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        complete(model, "a", **wrong)  # type: ignore[arg-type]


def test_more_tokens_than_the_context_has_are_refused(model: Model) -> None:
    with pytest.raises(LimitError, match="no room"):
        complete(model, "a", max_tokens=64)


def test_the_native_step_gives_the_same(tiny_folder: Path, built: Path, model: Model) -> None:
    from gptcli.core.build import open_model
    from gptcli.text.tokenizer import Tokenizer

    exact = {"device": "cpu", "dtype": "float32"}
    native, plain = (
        open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), native=folder, **exact) for folder in (built, None)
    )
    prefixes = Prefixes(1 << 24)
    first = complete(native, "Once upon a ti", max_tokens=20, prefixes=prefixes)
    second = complete(plain, "Once upon a ti", max_tokens=20)
    assert texts(first) == texts(second)
    assert "native step" in native.stepping.told
