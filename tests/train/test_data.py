"""Training data: files to documents, documents to tokens, tokens to batches; nothing lost and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gptcli.errors import UsageError
from gptcli.text.tokenizer import Tokenizer
from gptcli.train import data
from gptcli.train.data import (
    Batches,
    encode_documents,
    hold_out_end,
    train_tokenizer,
)
from gptcli.train.documents import SEPARATOR

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


# --- Batches


def batches(length: int = 103, rows: int = 2, context: int = 5, seed: int = 1) -> Batches:
    """Batches over the stream 0, 1, 2, ...: a token is its own place."""
    return Batches(np.arange(length, dtype=np.uint16), rows, context, seed)


def starts(one: Batches, first: int, last: int) -> list[int]:
    return [int(row[0]) for step in range(first, last) for row in one.at(step)[0]]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = batches(), batches()
    later = one.at(37)
    for step in (3, 0, 90, 37):
        for mine, theirs in zip(one.at(step), other.at(step), strict=True):
            assert np.array_equal(mine, theirs)
    for mine, theirs in zip(later, batches().at(37), strict=True):
        assert np.array_equal(mine, theirs)
    assert not np.array_equal(batches(seed=2).at(0)[0], one.at(0)[0])


def test_targets_are_what_follows() -> None:
    ids, targets = batches().at(4)
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
        assert max(one.at(step)[1].max() for step in range(number * windows, (number + 1) * windows)) < length
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
