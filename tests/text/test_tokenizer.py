"""Tokenizer: token for token what Hugging Face's tokenizers and tiktoken make of the same vocabulary."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from gptcli.errors import CorruptError, ExitCode, GptcliError, NotFoundError, UnsupportedError
from gptcli.text.tokenizer import Tokenizer, encoding_names

EOT = "<|endoftext|>"
ENCODINGS = ("r50k_base", "gpt2", "cl100k_base", "o200k_base")
needs_encodings = pytest.mark.skipif(
    not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs tiktoken's vocabularies in TIKTOKEN_CACHE_DIR"
)
# Text of assigned characters: of the others two libraries may think differently, by the age of their Unicode tables.
assigned = st.text(
    st.one_of(st.sampled_from(" \n\r\t'’a1é中👍<|>\u200d\u00a0"), st.characters(exclude_categories=["Cs", "Cn"])),
    max_size=60,
)


# --- against Hugging Face -------------------------------------------------------------------------------------------


def test_equals_hugging_face(pair: Any, nasty: str) -> None:
    assert pair.ours.encode(nasty) == pair.theirs.encode(nasty)


def test_special_tokens_equal_hugging_face(pair: Any, nasty: str) -> None:
    assert pair.ours.encode(nasty, special=True) == pair.theirs.encode(nasty, special=True)


def test_decode_of_encode_is_the_text(pair: Any, nasty: str) -> None:
    for special in (False, True):
        ids = pair.ours.encode(nasty, special=special)
        assert pair.ours.decode(ids) == nasty
        assert max(ids, default=0) < pair.ours.vocab_size


@settings(max_examples=60, deadline=None)
@given(text=assigned)
def test_any_text_equals_hugging_face(pairs: dict[str, Any], text: str) -> None:
    for pair in pairs.values():
        ids = pair.ours.encode(text)
        assert ids == pair.theirs.encode(text)
        assert pair.ours.decode(ids) == text


def test_end_of_text_is_plain_unless_special(pairs: dict[str, Any]) -> None:
    ours = pairs["trained"].ours
    assert ours.special_tokens == {EOT: 0}
    assert 0 not in ours.encode(f"a{EOT}b")
    assert ours.encode(f"a{EOT}b", special=True) == [*ours.encode("a"), 0, *ours.encode("b")]
    assert ours.decode([0]) == EOT


def test_permuted_ids_are_really_permuted(pairs: dict[str, Any]) -> None:
    """Guards the fixture: were the ids in order, nothing would test the map from rank to id."""
    plain, permuted = pairs["trained"].ours, pairs["permuted"].ours
    assert plain.encode("the quick fox") != permuted.encode("the quick fox")
    assert plain.vocab_size == permuted.vocab_size == 700
    assert permuted.special_tokens != {EOT: 0}
    assert [permuted.token_bytes(id_) for id_ in permuted.encode("the fox")] == [
        plain.token_bytes(id_) for id_ in plain.encode("the fox")
    ]


def test_added_token_that_is_not_special_is_matched_in_any_text(pairs: dict[str, Any]) -> None:
    pair = pairs["added"]
    size = pair.ours.vocab_size
    assert pair.ours.encode("<two")[0] == size - 2 == pair.theirs.encode("<two")[0]
    assert 0 not in pair.ours.encode(EOT)


def test_of_added_tokens_that_begin_alike_the_longest_counts(tmp_path: Path, trained: Any, write_json: Any) -> None:
    """Runs of spaces as tokens of their own, as CodeGen's and Phi's GPT-2 tokenizers have them."""
    raw = copy.deepcopy(trained)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    size = len(raw["model"]["vocab"])
    runs = ["##", "###", "####", "#####", "########"]
    raw["added_tokens"] += [{"id": size + i, "content": run, **plain} for i, run in enumerate(runs)]
    folder = write_json(tmp_path, raw)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    ours = Tokenizer.from_folder(folder)
    for count in range(1, 20):
        text = f"a{'#' * count}b"
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_flags_of_added_tokens_are_honoured_or_refused(
    tmp_path: Path, trained: Any, flag: str, write_json: Any
) -> None:
    raw = copy.deepcopy(trained)
    raw["added_tokens"][0][flag] = True
    folder = write_json(tmp_path, raw)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        ours = Tokenizer.from_folder(folder)
    except UnsupportedError:
        return
    for text in (f"a  {EOT}  b", f"a{EOT}b", f" {EOT} "):
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids


def test_whole_words_without_a_merge_under_ignore_merges(tmp_path: Path, trained: Any, write_json: Any) -> None:
    """``ignore_merges`` (Llama 3) takes a word that is a token whole, even one that no merge makes."""
    raw = copy.deepcopy(trained)
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"]["xyzzy"] = len(raw["model"]["vocab"])
    folder = write_json(tmp_path, raw)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        ours = Tokenizer.from_folder(folder)
    except UnsupportedError:
        return
    for text in ("xyzzy", "a xyzzy", "xyzzyxyzzy"):
        assert ours.encode(text) == theirs.encode(text).ids


def test_token_that_no_merge_makes_is_decoded_and_never_encoded(tmp_path: Path, trained: Any, write_json: Any) -> None:
    raw = copy.deepcopy(trained)
    size = len(raw["model"]["vocab"])
    raw["model"]["vocab"]["Ġxyzzy"] = size
    folder = write_json(tmp_path, raw)
    ours = Tokenizer.from_folder(folder)
    assert ours.vocab_size == size + 1
    assert ours.decode([size]) == " xyzzy"
    assert ours.encode(" xyzzy") == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(" xyzzy").ids


def test_older_merges_as_strings(tmp_path: Path, trained: Any, pairs: dict[str, Any], write_json: Any) -> None:
    raw = copy.deepcopy(trained)
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    text = "the quick brown fox isn't"
    assert Tokenizer.from_folder(write_json(tmp_path, raw)).encode(text) == pairs["trained"].ours.encode(text)


def test_start_token_of_a_template(tmp_path: Path, trained: Any, write_json: Any) -> None:
    raw = copy.deepcopy(trained)
    assert Tokenizer.from_folder(write_json(tmp_path / "without", raw)).start_id is None
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOT: {"id": EOT, "ids": [0], "tokens": [EOT]}},
    }
    assert Tokenizer.from_folder(write_json(tmp_path / "with", raw)).start_id == 0


@needs_encodings
def test_gpt2_as_a_folder_equals_tiktoken_and_hugging_face(tmp_path: Path, texts: dict[str, str]) -> None:
    """The real vocabulary in the Hugging Face form, merges recovered from the ranks."""
    encoding = tiktoken.get_encoding("r50k_base")
    ranks = encoding._mergeable_ranks
    alphabet = _alphabet()
    shown = {data: "".join(alphabet[byte] for byte in data) for data in ranks}
    vocab = {shown[data]: rank for data, rank in ranks.items()} | {EOT: 50256}
    merges = [tuple(shown[part] for part in _last_pair(data, ranks)) for data in ranks if len(data) > 1]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours = Tokenizer.from_folder(tmp_path)
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.vocab_size == 50257
    for text in texts.values():
        assert ours.encode(text) == encoding.encode_ordinary(text) == theirs.encode(text).ids
        assert ours.encode(text, special=True) == encoding.encode(text, allowed_special="all")


def _alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet as its released encoder.py makes it."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = {byte: chr(byte) for byte in prints}
    for byte in range(256):
        if byte not in shown:
            shown[byte] = chr(256 + len(shown) - len(prints))
    return shown


def _last_pair(data: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that merging a token's bytes leaves before the last step."""
    parts = [data[i : i + 1] for i in range(len(data))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, 1 << 30) for left, right in pairwise(parts)]
        best = joined.index(min(joined))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


# --- against tiktoken -----------------------------------------------------------------------------------------------


@needs_encodings
@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_equal_tiktoken(name: str, texts: dict[str, str]) -> None:
    ours, theirs = Tokenizer.from_encoding(name), tiktoken.get_encoding("gpt2" if name == "gpt2" else name)
    assert ours.name == name
    assert ours.vocab_size == theirs.n_vocab
    assert ours.special_tokens == theirs._special_tokens
    for text in texts.values():
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text)
        assert ours.encode(text, special=True) == theirs.encode(text, allowed_special="all")
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("\udfff", "\ufffd"),
        ("x \ud83d", "x \ufffd"),
        ("\udc80\udc81 bytes", "\ufffd\ufffd bytes"),
        ("pair \ud83d\ude00.", "pair 😀."),
    ],
)
def test_lone_surrogates_become_the_replacement_character(pairs: dict[str, Any], text: str, meant: str) -> None:
    for name in ("trained", "permuted", "added"):
        ours = pairs[name].ours
        assert ours.encode(text) == ours.encode(text, special=True) == ours.encode(meant)


def test_batch_equals_one_by_one_in_order(pair: Any, texts: dict[str, str]) -> None:
    several = [text[:500] + EOT for text in texts.values()]
    for special in (False, True):
        expected = [pair.ours.encode(text, special=special) for text in several]
        assert pair.ours.encode_batch(several, special=special, threads=2) == expected
    assert pair.ours.encode_batch([]) == []


# --- bytes and pieces -----------------------------------------------------------------------------------------------


def test_pieces_tile_the_text(pair: Any, nasty: str) -> None:
    data, position = nasty.encode(), 0
    for piece in pair.ours.pieces(pair.ours.encode(nasty[:2_000])):
        assert piece.start == position
        assert data[piece.start : piece.end] == piece.data != b""
        position = piece.end
    assert position == len(nasty[:2_000].encode())


def test_every_id_has_its_bytes(pair: Any) -> None:
    ours = pair.ours
    singles = {ours.token_bytes(id_) for id_ in range(ours.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles
    assert len(singles) == ours.vocab_size


@pytest.mark.parametrize("id_", [700, 702, 50_000, 2**31, 2**32, 2**64, -1])
def test_id_outside_the_vocabulary_is_nothing(pair: Any, id_: int) -> None:
    if 0 <= id_ < pair.ours.vocab_size:
        id_ = pair.ours.vocab_size
    assert pair.ours.token_bytes(id_) == b""
    assert pair.ours.decode([id_]) == ""


@needs_encodings
def test_gap_in_an_encoding_is_nothing() -> None:
    """cl100k_base has no token 100256, between the merged tokens and the special ones."""
    ours = Tokenizer.from_encoding("cl100k_base")
    assert ours.token_bytes(100_256) == b""
    assert ours.token_bytes(100_257) == EOT.encode()


def test_half_characters_decode_to_the_replacement_character(pairs: dict[str, Any]) -> None:
    ours = pairs["trained"].ours
    by_byte = {ours.token_bytes(id_): id_ for id_ in range(ours.vocab_size)}
    ids = [by_byte[b"\xf0"], by_byte[b"\x9f"], by_byte[b"a"]]
    assert ours.decode_bytes(ids) == b"\xf0\x9fa"
    assert ours.decode(ids) == "\ufffda"


# --- nothing from the network ---------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to connect, which also fails; and no encoding in memory from a test before."""
    import tiktoken.load
    import tiktoken.registry

    attempts: list[str] = []

    def refuse(*args: Any, **_: Any) -> None:
        attempts.append(repr(args))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", tiktoken.load.read_file)
    return attempts


@pytest.mark.parametrize("name", ENCODINGS)
def test_missing_vocabulary(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(NotFoundError, match=name) as caught:
        Tokenizer.from_encoding(name)
    assert "TIKTOKEN_CACHE_DIR" in caught.value.hint
    assert caught.value.exit_code == ExitCode.NOT_FOUND == 3
    assert no_network == []
    assert list(tmp_path.iterdir()) == []


def test_missing_vocabulary_without_a_cache(monkeypatch: pytest.MonkeyPatch, no_network: list[str]) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(NotFoundError):
        Tokenizer.from_encoding("r50k_base")
    assert no_network == []


def test_download_is_tried_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str]
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(NotFoundError, match="could not be downloaded") as caught:
        Tokenizer.from_encoding("r50k_base", download=True)
    assert "TIKTOKEN_CACHE_DIR" in caught.value.hint
    assert no_network


def test_unknown_encoding(no_network: list[str]) -> None:
    with pytest.raises(NotFoundError, match="r51k") as caught:
        Tokenizer.from_encoding("r51k")
    assert "cl100k_base" in caught.value.hint
    assert caught.value.exit_code == 3
    assert no_network == []
    assert set(ENCODINGS) <= set(encoding_names())


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def write_json() -> Callable[[Path, Any], Path]:
    def write(folder: Path, raw: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
        return folder

    return write


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(pattern: Any, **changes: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False, **changes}


def _sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "Unigram": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}},
    "WordPiece": {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}},
    "WordLevel": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    "end_of_word_suffix": {"model.end_of_word_suffix": "</w>"},
    "continuing_subword_prefix": {"model.continuing_subword_prefix": "##"},
    "dropout": {"model.dropout": 0.1},
    "decoded (CTC)": {"normalizer": {"type": "NFKC"}, "decoder": {"type": "CTC", "pad_token": "a"}},
    "decoded (none)": {"normalizer": {"type": "NFKC"}, "decoder": None},
}
# What tiktoken can't be exact with, and the library does as it does for everyone.
LISTED: dict[str, dict[str, Any]] = {
    "byte fall-back": {"model.byte_fallback": True},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "space before": {"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}},
    "2 patterns": {"pre_tokenizer": _sequence(_split({"Regex": "\\d+"}), _split({"Regex": "x"}), BYTES)},
    "a pattern and GPT-2's": {"pre_tokenizer": _sequence(_split({"Regex": "\\d+"}), {**BYTES, "use_regex": True})},
    "0 patterns": {"pre_tokenizer": BYTES},
    "removed": {"pre_tokenizer": _sequence(_split({"Regex": "x"}, behavior="Removed"), BYTES)},
    "a plain string": {"pre_tokenizer": _sequence(_split({"String": " "}), BYTES)},
    "outside the alphabet": {"model.vocab.中": 700, "normalizer": {"type": "NFKC"}},
}


def _changed(raw: Any, changes: dict[str, Any]) -> Any:
    raw = copy.deepcopy(raw)
    for path, value in changes.items():
        *parents, last = path.split(".")
        target = raw
        for parent in parents:
            target = target[parent]
        target[last] = value
    return raw


@pytest.mark.parametrize("word", UNSUPPORTED)
def test_unsupported_tokenizers(word: str, tmp_path: Path, trained: Any, write_json: Any) -> None:
    folder = write_json(tmp_path, _changed(trained, UNSUPPORTED[word]))
    with pytest.raises(UnsupportedError, match="(?i)" + word.split()[0]) as caught:
        Tokenizer.from_folder(folder)
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("case", LISTED)
def test_what_takes_the_library(
    case: str, tmp_path: Path, trained: Any, write_json: Any, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_json(tmp_path, _changed(trained, LISTED[case]))
    ours = Tokenizer.from_folder(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert ours.kind == "tokenizers"
    for text in texts.values():
        ids = ours.encode(text[:3_000])
        assert ids == theirs.encode(text[:3_000], add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnsupportedError, match="tokenizers library") as caught:
        Tokenizer.from_folder(folder)
    assert "pip install 'gptcli[families]'" in caught.value.hint
    assert caught.value.exit_code == 3


def test_truncation_and_padding_in_the_file_are_not_a_texts_affair(
    tmp_path: Path, trained: Any, write_json: Any
) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 40},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOT,
    }
    text = "the quick brown fox isn't lazy"
    plain = Tokenizer.from_folder(write_json(tmp_path / "plain", trained)).encode(text)
    for normalizer in (None, {"type": "NFKC"}):
        raw = _changed(trained, {"truncation": truncation, "padding": padding, "normalizer": normalizer})
        assert Tokenizer.from_folder(write_json(tmp_path / "told", raw)).encode(text) == plain


def test_inverted_split_is_the_same_where_all_is_kept(tmp_path: Path, trained: Any, write_json: Any) -> None:
    raw = _changed(trained, {"pre_tokenizer": _sequence(_split({"Regex": "x+"}, invert=True), BYTES)})
    folder = write_json(tmp_path, raw)
    ours, theirs = Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("axxb", "x", "the xx fox", " xx  x\n"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.kind == "tiktoken"


def test_merges_of_one_token_apart_from_each_other(tmp_path: Path, trained: Any, write_json: Any) -> None:
    """Ranks can't say it: the token has two places in the order."""
    raw = copy.deepcopy(trained)
    raw["model"]["merges"].append(raw["model"]["merges"][0])
    folder = write_json(tmp_path, raw)
    ours, theirs = Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours.kind == "tokenizers"
    assert ours.encode("the quick brown fox") == theirs.encode("the quick brown fox").ids


def test_missing_bytes_are_dropped_as_they_drop_them(tmp_path: Path, trained: Any, write_json: Any) -> None:
    raw = copy.deepcopy(trained)
    del raw["model"]["vocab"]["Ā"]
    raw["model"]["merges"] = [merge for merge in raw["model"]["merges"] if not any("Ā" in part for part in merge)]
    folder = write_json(tmp_path, raw)
    ours, theirs = Tokenizer.from_folder(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert ours.encode("a\0b") == theirs.encode("a\0b").ids


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_sentencepieces_own_file_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x0a\x0e")
    with pytest.raises(UnsupportedError, match=name) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "tokenizer.json" in caught.value.hint
    assert caught.value.exit_code == 3


CORRUPT: dict[str, Callable[[Any], Any]] = {
    "a list": lambda raw: [],
    "a string": lambda raw: "tokenizer",
    "null": lambda raw: None,
    "no model": lambda raw: {key: value for key, value in raw.items() if key != "model"},
    "model is a list": lambda raw: _changed(raw, {"model": []}),
    "no vocab": lambda raw: _changed(raw, {"model": {"type": "BPE", "merges": []}}),
    "no merges": lambda raw: _changed(raw, {"model": {"type": "BPE", "vocab": raw["model"]["vocab"]}}),
    "vocab is a list": lambda raw: _changed(raw, {"model.vocab": ["a"]}),
    "merges is a number": lambda raw: _changed(raw, {"model.merges": 3}),
    "merge of one": lambda raw: _changed(raw, {"model.merges": [["a"]]}),
    "merge of three": lambda raw: _changed(raw, {"model.merges": ["a b c"]}),
    "merge of numbers": lambda raw: _changed(raw, {"model.merges": [[1, 2]]}),
    "merge to nowhere": lambda raw: _changed(raw, {"model.merges": [*raw["model"]["merges"], ["Q", "Q"]]}),
    "id is a string": lambda raw: _changed(raw, {"model.vocab.a": "1"}),
    "id is a bool": lambda raw: _changed(raw, {"model.vocab.a": True}),
    "id is a float": lambda raw: _changed(raw, {"model.vocab.a": 66.0}),
    "id is negative": lambda raw: _changed(raw, {"model.vocab.a": -1}),
    "id is huge": lambda raw: _changed(raw, {"model.vocab.a": 2**40}),
    "one id for two bytes": lambda raw: _changed(raw, {"model.vocab.a": raw["model"]["vocab"]["b"]}),
    "one id for two words": lambda raw: _changed(
        raw, {f"model.vocab.{''.join(raw['model']['merges'][-1])}": raw["model"]["vocab"]["b"]}
    ),
    "added without content": lambda raw: _changed(raw, {"added_tokens": [{"id": 0}]}),
    "added is a number": lambda raw: _changed(raw, {"added_tokens": 7}),
    "added with nothing in it": lambda raw: _changed(
        raw, {"added_tokens": [*raw["added_tokens"], {"id": 700, "content": "", "special": True}]}
    ),
    "pre-tokenizer without type": lambda raw: _changed(raw, {"pre_tokenizer": {"use_regex": True}}),
    "pattern that is none": lambda raw: _changed(raw, {"pre_tokenizer": _sequence(_split({"Regex": "("}), BYTES)}),
    "empty template": lambda raw: _changed(
        raw, {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}}
    ),
    "template without its token": lambda raw: _changed(
        raw,
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": EOT, "type_id": 0}}],
                "special_tokens": {},
            }
        },
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_tokenizers(case: str, tmp_path: Path, trained: Any, write_json: Any) -> None:
    error = _failure(write_json(tmp_path, CORRUPT[case](trained)))
    assert type(error) is CorruptError, repr(error)
    assert error.exit_code == 3
    assert error.hint


def _failure(folder: Path) -> BaseException | None:
    """What reading the folder raises; a panic in tiktoken is no Exception."""
    try:
        Tokenizer.from_folder(folder)
    except BaseException as error:
        return error
    return None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"model": 1e', b"\0" * 100])
def test_broken_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptError, match="JSON") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.exit_code == 3


def test_tokenizer_json_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CorruptError):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("present", [(), ("vocab.json",), ("merges.txt",)])
def test_missing_files(present: tuple[str, ...], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(NotFoundError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        (b"{", b"a b\n"),
        (b"[]", b"a b\n"),
        (b"{}", b"\xff\xff\n"),
        (b"{}", b"a b c\n"),
        (b"{}", b"ab\n"),
        (b"{}", b"a b\n"),
        (b'{"a": 0, "b": 1}', b"#version: 0.2\na b\n"),
    ],
)
def test_broken_vocab_and_merges(vocab: bytes, merges: bytes, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes(vocab)
    (tmp_path / "merges.txt").write_bytes(merges)
    with pytest.raises(GptcliError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert type(caught.value) is CorruptError
