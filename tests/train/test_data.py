"""Training data: files to documents, documents to tokens, tokens to batches; nothing lost and nothing twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train import data
from gptcli.train.data import (
    IGNORED,
    Batches,
    Corpus,
    encode_documents,
    hold_out_end,
    train_tokenizer,
)
from gptcli.train.documents import SEPARATOR
from gptcli.train.shards import ShardedTokens, Tokens

TEXT = "aé東🙂"


# --- Tokens


def test_documents_become_one_stream_with_the_start_token_between(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    corpus = encode_documents("some", ["Once upon", TEXT, f"a{SEPARATOR}b"], tokenizer, 0)
    expected = [
        0,
        *tokenizer.encode("Once upon"),
        0,
        *tokenizer.encode(TEXT),
        0,
        *tokenizer.encode(f"a{SEPARATOR}b"),
        0,
    ]
    assert corpus.tokens.tolist() == expected
    assert corpus.tokens.dtype == np.uint16
    assert (corpus.name, corpus.documents) == ("some", 3)
    assert corpus.text_bytes == len(f"Once upon{TEXT}a{SEPARATOR}b".encode())
    with pytest.raises(UsageError, match="some"):
        encode_documents("some", [], tokenizer, 0)


def test_groups_of_documents_join_to_the_same_stream(tiny_folder: Path) -> None:
    documents = [f"document {i} " * (i % 5 + 1) for i in range(50)]
    assert [document for group in data._groups(documents, 30) for document in group] == documents
    assert len(list(data._groups(documents, 30))) > 10


def test_a_large_vocabulary_takes_wider_tokens(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    for size, kind in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        monkeypatch.setattr(Tokenizer, "vocab_size", size)
        assert encode_documents("x", ["abc"], tokenizer, size - 1).tokens.dtype == kind
        assert encode_documents("x", ["abc"], tokenizer, size - 1).tokens[0] == size - 1


def test_the_end_of_a_stream_is_held_out(tiny_folder: Path) -> None:
    """Every token is trained on or evaluated, the one at the cut seen by both; the bytes add up."""
    tokenizer = Tokenizer.from_folder(tiny_folder)
    whole = encode_documents("book", ["Once upon a time there was a king. " * 200], tokenizer, 0)
    first, last = hold_out_end(whole, tokenizer, least=100)
    assert len(last.tokens) == 100
    assert [*first.tokens, *last.tokens[1:]] == list(whole.tokens)
    assert first.text_bytes + last.text_bytes == whole.text_bytes
    assert last.text_bytes == len(tokenizer.decode_bytes(last.tokens[1:-1].tolist()))
    assert len(hold_out_end(whole, tokenizer, fraction=0.09, least=1)[1].tokens) == round(0.09 * len(whole.tokens))
    assert hold_out_end(whole, tokenizer, least=len(whole.tokens) // 9) == [whole]


def test_the_end_of_a_stream_in_parts_is_held_out_without_a_copy(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    documents = [f"There was a king, number {i}. " * 20 for i in range(20)]
    whole = encode_documents("book", documents, tokenizer, 0)
    tokens = ShardedTokens(np.split(whole.tokens[:], [5, 100, 1000]))
    learnt = np.arange(len(tokens)) % 2 > 0
    first, last = hold_out_end(replace(whole, tokens=tokens, learnt=learnt), tokenizer, fraction=0.099, least=10)
    assert first.text_bytes + last.text_bytes == whole.text_bytes
    assert (first.documents, last.documents) == (19, 2)
    assert last.text_bytes == len(b"".join(tokenizer.token_bytes(int(id_)) for id_ in last.tokens[1:-1] if id_))
    assert [*first.tokens[:], *last.tokens[1:]] == whole.tokens[:].tolist()
    assert isinstance(first.tokens, ShardedTokens)
    assert np.shares_memory(first.tokens.parts[0], whole.tokens[:])
    assert first.learnt is not None
    assert last.learnt is not None
    assert [*first.learnt[:], *last.learnt[1:]] == learnt.tolist()


# --- Batches


def batches(length: int = 103, rows: int = 2, context: int = 5, seed: int = 1) -> Batches:
    """Batches over the stream 0, 1, 2, ...: a token is its own place."""
    return Batches(stream(np.arange(length, dtype=np.uint16)), rows, context, seed)


def stream(tokens: Tokens, learnt: Tokens | None = None) -> Corpus:
    return Corpus("numbers", tokens, 1, len(tokens), learnt=learnt)


def starts(one: Batches, first: int, last: int) -> list[int]:
    return [int(row[0]) for step in range(first, last) for row in one.at(step).ids]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = batches(), batches()
    later = one.at(37)
    for step in (3, 0, 90, 37):
        assert np.array_equal(one.at(step).ids, other.at(step).ids)
        assert np.array_equal(one.at(step).targets, other.at(step).targets)
    assert np.array_equal(later.ids, batches().at(37).ids)
    assert not np.array_equal(batches(seed=2).at(0).ids, one.at(0).ids)


def test_the_order_of_windows_is_frozen() -> None:
    """Another order would make a resumed run see some windows twice and others never."""
    assert [[int(row[0]) for row in batches().at(step).ids] for step in (0, 1, 9, 10, 37)] == [
        [8, 53],
        [93, 83],
        [33, 71],
        [31, 81],
        [46, 86],
    ]
    many = Batches(stream((np.arange(40_000) * 7919 % 65521).astype(np.uint16)), 4, 16, 2026)
    seen = hashlib.sha256()
    for step in range(1500):
        seen.update(many.at(step).ids.astype("<i8").tobytes())
        seen.update(many.at(step).targets.astype("<i8").tobytes())
    assert seen.hexdigest() == "1dcc70ba065a1bbd576235053e0abdf445f6ea2ba0bf0fe1bc90fc9b13de2cc4"


def test_targets_are_what_follows() -> None:
    batch = batches().at(4)
    ids, targets = batch.ids, batch.targets
    assert batch.documents is None
    assert ids.shape == targets.shape == (2, 5)
    assert ids.dtype == targets.dtype == np.int64
    assert np.array_equal(ids + 1, targets)
    assert np.array_equal(ids[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("length", [100, 101, 102, 103, 104, 105, 106])
def test_a_pass_takes_each_window_once(length: int) -> None:
    windows = (length - 1) // 5 - 1
    one = batches(length, rows=1)
    seen = []
    for number in range(4):
        order = starts(one, number * windows, (number + 1) * windows)
        phase = min(order)
        assert 0 <= phase < 5
        assert sorted(order) == [phase + 5 * i for i in range(windows)]
        assert max(one.at(step).targets.max() for step in range(number * windows, (number + 1) * windows)) < length
        seen.append(tuple(order))
    assert len(set(seen)) == 4


def test_phases_differ_so_that_no_place_is_always_a_border() -> None:
    one = batches(rows=1)
    windows = (103 - 1) // 5 - 1
    assert {min(starts(one, i * windows, (i + 1) * windows)) for i in range(40)} == set(range(5))


def test_the_batch_size_does_not_change_the_order() -> None:
    assert starts(batches(rows=1), 0, 60) == starts(batches(rows=3), 0, 20) == starts(batches(rows=4), 0, 15)


def test_a_stream_without_a_whole_window_is_refused() -> None:
    assert starts(batches(11, rows=1), 0, 3)
    with pytest.raises(UsageError, match="too few"):
        batches(10)


@given(rows=st.integers(1, 12), ranks=st.integers(1, 5), step=st.integers(0, 99), seed=st.integers(0, 9))
def test_the_rows_of_the_ranks_are_the_whole_batch_in_order(rows: int, ranks: int, step: int, seed: int) -> None:
    learnt = np.arange(103) % 3 > 0
    one = Batches(stream(np.arange(103, dtype=np.uint16), learnt), rows * ranks, 5, seed, mask_documents=True)
    whole = one.at(step)
    parts = [one.at(step, rank, ranks) for rank in range(ranks)]
    assert all(part.ids.shape == (rows, 5) for part in parts)
    assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
    assert np.array_equal(np.concatenate([part.targets for part in parts]), whole.targets)
    assert np.array_equal(
        np.concatenate([part.documents for part in parts if part.documents is not None]), whole.documents
    )


def test_only_what_is_learnt_is_a_target() -> None:
    learnt = np.arange(103) % 3 > 0
    batch = Batches(stream(np.arange(103, dtype=np.uint16), learnt), 2, 5, 1).at(4)
    following = batch.ids + 1
    assert np.array_equal(batch.targets, np.where(following % 3 > 0, following, IGNORED))
    assert (batch.targets == IGNORED).sum() >= 2


def test_documents_are_numbered_within_a_row_each_opened_by_its_start_token() -> None:
    tokens = np.array([7, 5, 6, 7, 7, 8, 9, 7, 5, 5, 5, 7] * 9, np.uint16)
    one = Batches(replace(stream(tokens), start_id=7), 3, 5, 1, mask_documents=True)
    for step in range(20):
        batch = one.at(step)
        assert batch.documents is not None
        assert batch.documents.dtype == np.int32
        for ids, documents in zip(batch.ids.tolist(), batch.documents.tolist(), strict=True):
            assert documents == [ids[1 : place + 1].count(7) for place in range(5)]


def test_an_order_without_a_table_takes_each_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_TABLE", 1)
    for length in (11, 16, 21, 103, 1003):
        windows = (length - 1) // 5 - 1
        one = batches(length, rows=1)
        passes = [starts(one, number * windows, (number + 1) * windows) for number in range(3)]
        for order in passes:
            assert sorted(order) == [min(order) + 5 * i for i in range(windows)]
        assert windows < 5 or len({tuple(start // 5 for start in order) for order in passes}) == 3
    assert starts(batches(1003, seed=1), 0, 20) != starts(batches(1003, seed=2), 0, 20)


def test_an_order_without_a_table_is_no_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours in the order are as far apart as chance has them: a third of the whole on average."""
    monkeypatch.setattr(data, "_TABLE", 1)
    order = np.array(starts(batches(5 * 4001, rows=1), 0, 3000)) / (5 * 4000)
    assert abs(np.abs(np.diff(order)).mean() - 1 / 3) < 0.02
    assert abs(np.corrcoef(order, np.arange(3000))[0, 1]) < 0.06
    assert abs(order.mean() - 0.5) < 0.03


# --- Streams in parts


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(-25, 25), st.integers(-25, 25))
def test_a_stream_in_parts_slices_as_one(sizes: list[int], first: int, last: int) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    tokens = ShardedTokens(np.split(whole, np.cumsum(sizes)[:-1]))
    assert len(tokens) == len(whole)
    for part in (slice(first, last), slice(first, None), slice(None, last), slice(None)):
        assert tokens[part].dtype == np.uint16
        assert tokens[part].tolist() == whole[part].tolist()
    assert tokens.between(abs(first), abs(last))[:].tolist() == whole[abs(first) : abs(last)].tolist()


def test_a_slice_within_a_part_is_no_copy() -> None:
    part = np.arange(10, dtype=np.uint32)
    tokens = ShardedTokens([part, part])
    assert tokens.dtype == np.uint32
    assert np.shares_memory(tokens[12:15], part)
    assert all(np.shares_memory(one, part) for one in tokens.between(3, 17).parts)
    with pytest.raises(ValueError, match="one type"):
        ShardedTokens([part, part.astype(np.uint16)])
    with pytest.raises(ValueError, match="step"):
        tokens[::2]


def test_batches_over_parts_are_those_over_the_whole() -> None:
    whole = np.arange(103, dtype=np.uint16)
    parted = Batches(stream(ShardedTokens(np.split(whole, [1, 17, 17, 60]))), 2, 5, 1)
    for step in range(30):
        assert np.array_equal(parted.at(step).ids, batches().at(step).ids)
        assert np.array_equal(parted.at(step).targets, batches().at(step).targets)


# --- The tokenizer


def test_a_trained_tokenizer_opens_here_and_in_tokenizers_alike(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    documents = ["Once upon a time there was a king.", "The king's daughter — naïve 東京 🙂 — said: 'No!'\n\n\t  x"] * 5
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(documents, 320))
    ours = Tokenizer.from_folder(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.special_tokens == {SEPARATOR: 0}
    assert ours.vocab_size == theirs.get_vocab_size() == 320
    for text in [*documents, "", " ", "unseen: ğ 12345 \x00\x7f", "  two  spaces ", "a\r\nb"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text
    assert ours.encode(f"a{SEPARATOR}b", special=True) == theirs.encode(f"a{SEPARATOR}b").ids
    assert len(ours.encode(documents[0])) < len(documents[0]) / 2


def test_a_trained_tokenizer_is_the_same_again() -> None:
    documents = ["Once upon a time", "there was a king"]
    assert train_tokenizer(documents, 270) == train_tokenizer(iter(documents), 270)


def test_the_vocabulary_holds_all_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_tokenizer(["a"], 257))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert {tokenizer.token_bytes(id_) for id_ in range(1, 257)} == {bytes([byte]) for byte in range(256)}
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][0]["id"] == 0
    with pytest.raises(UsageError, match="256"):
        train_tokenizer(["a"], 256)
