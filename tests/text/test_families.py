"""Every family's tokenizer, token for token what Hugging Face's library makes of the same file."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import gptcli.text.tokenizer as module
from gptcli.text.tokenizer import Tokenizer
from tests.text.families import ALL_TEXTS, FAMILIES, folder_of

SPACED = ("llama2", "mistral", "mistral always", "phi3", "old metaspace")
SENTENCEPIECE = (*SPACED, "gemma")
# Steps and patterns of which it is not known where a text may be cut.
NEVER_CUT = ("letters", "deepseek", "digits in runs", "space before", "merged with previous")
# Text of characters that Unicode had before either library's tables were made.
settled = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'’a1é中👍<|>\u200d\u00a0\u0301▁"), st.characters(exclude_categories=["Cs", "Cn"])
    ),
    max_size=50,
)


class Family:
    """One tokenizer.json, read by both."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.ours = Tokenizer.from_folder(folder)
        self.theirs = {special: tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")) for special in (0, 1)}
        self.theirs[0].encode_special_tokens = True

    def expected(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self.theirs[special].encode(text, add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    root = tmp_path_factory.mktemp("families")
    return {name: Family(name, folder_of(name, root)) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def test_what_does_the_work(family: Family) -> None:
    """tiktoken wherever it makes the same tokens."""
    assert family.ours.kind == FAMILIES[family.name][1]


@pytest.mark.parametrize("special", [False, True])
def test_ids_equal(family: Family, special: bool) -> None:
    for name, text in ALL_TEXTS.items():
        assert family.ours.encode(text, special=special) == family.expected(text, special=special), name


@settings(max_examples=100, deadline=None)
@given(text=settled)
def test_ids_of_any_text_equal(families: dict[str, Family], text: str) -> None:
    for family in families.values():
        assert family.ours.encode(text) == family.expected(text), family.name


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab \n1'▁.", max_size=40))
def test_ids_of_repetitive_text_equal(families: dict[str, Family], text: str) -> None:
    """Where pairs overlap, and merges of the same rank meet."""
    for family in families.values():
        assert family.ours.encode(text) == family.expected(text), family.name


def test_text_equals(family: Family) -> None:
    """What they decode, and the text itself as far as the tokenizer keeps it."""
    for name, text in ALL_TEXTS.items():
        ids = family.ours.encode(text)
        decoded = family.ours.decode(ids)
        if family.name != "old metaspace" or not text.startswith((" ", "▁")):  # of which their decoder drops them all
            assert decoded == family.theirs[0].decode(ids, skip_special_tokens=False), name
        assert b"".join(piece.data for piece in family.ours.pieces(ids)).decode("utf-8", "replace") == decoded


def test_text_comes_back(family: Family) -> None:
    """But for what a normalizer changes, and a space that some would put there themselves."""
    composes = "NFC" in str(family.theirs[0].normalizer)
    puts_space_unless_there_is_one = ("mistral", "mistral always", "space before", "old metaspace")
    takes_space_along = ("phi4", "phi3")
    for name, text in ALL_TEXTS.items():
        for special in (False, True):
            decoded = family.ours.decode(family.ours.encode(text, special=special))
            if special and family.name in (*takes_space_along, *puts_space_unless_there_is_one):
                continue  # what stands beside a special token is not kept
            if family.name in SENTENCEPIECE:
                text, decoded = text.replace("▁", " "), decoded.replace("▁", " ")
            if family.name in puts_space_unless_there_is_one:
                text, decoded = text.lstrip(" "), decoded.lstrip(" ")
            if composes:
                # Part by part, where added tokens stand between: so not all of what the whole would.
                text, decoded = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", decoded)
            assert decoded == text, name


def test_every_id_has_its_bytes(family: Family) -> None:
    ours = family.ours
    vocab = family.theirs[0].get_vocab(with_added_tokens=True)
    assert ours.vocab_size == 1 + max(vocab.values())
    single = {ours.token_bytes(id_) for id_ in range(ours.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert ours.token_bytes(ours.vocab_size) == b"" == ours.token_bytes(-1)
    for data, id_ in list(zip(ours.spelling.data, ours.spelling.ids, strict=True)):
        assert ours.token_bytes(id_) == data


def _cut(text: str, sizes: Iterator[int]) -> Iterator[str]:
    place = 0
    while place < len(text):
        size = next(sizes)
        yield text[place : place + size]
        place += size


@pytest.mark.parametrize("special", [False, True])
def test_streams_equal_the_whole(family: Family, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 24)
    dice = random.Random(1)
    sizes = iter(lambda: dice.randint(1, 30), 0)
    cuts = 0
    for name, text in {**ALL_TEXTS, "prose": "the quick brown fox 12 isn't here\n" * 100}.items():
        whole = family.ours.encode(text, special=special)
        groups = list(family.ours.encode_stream(_cut(text, sizes), special=special))
        cuts += len(groups) - 1
        assert [id_ for group in groups for id_ in group] == whole, name
    streamed = [[]]
    for ids, last in family.ours.encode_streams(
        (_cut(text, sizes) for text in ALL_TEXTS.values()), special=special, threads=2
    ):
        streamed[-1] += ids
        streamed += [[]] * last
    assert [list(ids) for ids in streamed[:-1]] == [
        family.ours.encode(text, special=special) for text in ALL_TEXTS.values()
    ]
    assert cuts > 50 or family.name in NEVER_CUT


def test_batches_equal_one_by_one(family: Family) -> None:
    texts = list(ALL_TEXTS.values())
    for special in (False, True):
        expected = [family.ours.encode(text, special=special) for text in texts]
        assert family.ours.encode_batch(texts, special=special, threads=3) == expected
        assert [family.ours.encode_array(text, special=special).tolist() for text in texts] == expected


def test_ranks_are_ids_by_another_name(family: Family) -> None:
    table = family.ours.ids_of_ranks
    for text in ALL_TEXTS.values():
        ranks = [int(rank) for rank in family.ours.encode_ranks(text)]
        assert ([table[rank] for rank in ranks] if table else ranks) == family.ours.encode(text)


def test_lone_surrogates_become_the_replacement_character(family: Family) -> None:
    for text, meant in (("a\ud800b", "a\ufffdb"), ("x \ud83d", "x \ufffd"), ("pair \ud83d\ude00.", "pair 😀.")):
        for special in (False, True):
            assert family.ours.encode(text, special=special) == family.ours.encode(meant, special=special)
