"""Vocabularies for llama.cpp: tokens, kinds, merges, scores, how text is split, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import CheckError, CorruptError, GptcliError, NotFoundError, UnsupportedError
from gptcli.text.gguf_words import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, GgufWords, read_gguf_words
from gptcli.text.vocabulary import BYTE_ALPHABET

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = GPT4O.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")


def byte_level(**more: Any) -> dict[str, Any]:
    """A tokenizer.json of the 256 bytes, two merges, a special token and one that is matched in any text."""
    vocab = {"<s>": 0, **{char: 1 + i for i, char in enumerate(BYTE_ALPHABET)}, "he": 257, "hel": 258}
    return {
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": True},
            {"id": 259, "content": "<think>", "special": False},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["h", "e"], "he l"]},
        **more,
    }


def split(*regexes: str) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated"} for each in regexes
    ]
    return {
        "type": "Sequence",
        "pretokenizers": [*steps, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}],
    }


def pieces(**more: Any) -> dict[str, Any]:
    """A tokenizer.json as SentencePiece's become: byte tokens, a space written as ▁."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    return {
        "added_tokens": [{"id": i, "content": texts[i], "special": True} for i in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": ["▁ a", "▁a b"],
            "byte_fallback": True,
            "unk_token": "<unk>",
        },
        **more,
    }


def read(folder: Path, raw: dict[str, Any], size: int = 300, **more: Any) -> GgufWords:
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    return read_gguf_words(folder, size, **{"start_id": None, "end_ids": (), **more})


def test_byte_level_tokens_keep_their_spelling_and_order(tmp_path: Path) -> None:
    words = read(tmp_path, byte_level(), size=264, start_id=0, end_ids=(0,))
    assert (words.model, words.pattern) == ("gpt2", "gpt-2")
    assert words.tokens[:3] == ("<s>", "!", '"')
    assert words.tokens[257:] == ("he", "hel", "<think>", "[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]")
    assert words.kinds[0] == CONTROL
    assert words.kinds[1] == words.kinds[258] == NORMAL
    assert words.kinds[259:] == (USER_DEFINED, UNUSED, UNUSED, UNUSED, UNUSED)
    assert words.merges == ("h e", "he l")
    assert words.ids == {"bos": 0, "eos": 0}
    assert not words.add_start
    assert words.scores == words.notes == ()


def test_two_files_are_read_as_one(tmp_path: Path) -> None:
    vocab = byte_level()["model"]["vocab"] | {"<|endoftext|>": 259}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n", encoding="utf-8")
    words = read_gguf_words(tmp_path, 260, start_id=259, end_ids=(259,))
    assert words.merges == ("h e", "he l")
    assert words.kinds[259] == CONTROL
    assert words.pattern == "gpt-2"


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (split(LLAMA3), "dbrx"),
        (split(QWEN2), "qwen2"),
        (split(GPT4O), "gpt-4o"),
        (split(TEKKEN), "tekken"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            },
            "smollm",
        ),
    ],
)
def test_how_text_is_split_has_a_name(tmp_path: Path, how: dict[str, Any], name: str) -> None:
    words = read(tmp_path, byte_level(pre_tokenizer=how))
    assert words.pattern == name
    assert bool(words.notes) == (name in ("gpt-4o", "tekken"))


def test_whole_words_before_merges_are_llama_3s(tmp_path: Path) -> None:
    raw = byte_level(pre_tokenizer=split(LLAMA3))
    raw["model"]["ignore_merges"] = True
    assert read(tmp_path, raw).pattern == "llama-bpe"


def test_composed_accents_are_told(tmp_path: Path) -> None:
    words = read(tmp_path, byte_level(normalizer={"type": "NFC"}))
    assert "does not compose accents" in words.notes[0]


def test_a_start_token_that_the_file_places_is_placed(tmp_path: Path) -> None:
    raw = byte_level(post_processor=pieces()["post_processor"])
    raw["post_processor"]["special_tokens"]["<s>"]["ids"] = [0]
    words = read(tmp_path, raw)
    assert words.add_start
    assert words.ids["bos"] == 0
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not read(tmp_path, raw).add_start


def test_flags_of_added_tokens_are_told(tmp_path: Path) -> None:
    raw = byte_level()
    raw["added_tokens"][1]["rstrip"] = True
    assert "1 added tokens take the space beside them along" in read(tmp_path, raw).notes[0]


def test_words_that_no_merge_makes_are_told_where_llama_cpp_never_makes_them(tmp_path: Path) -> None:
    raw = byte_level(pre_tokenizer=split(QWEN2))
    raw["model"]["vocab"]["llo"] = 260
    raw["model"]["ignore_merges"] = True
    assert "1 tokens that no merge makes" in read(tmp_path, raw).notes[0]
    raw["pre_tokenizer"] = split(LLAMA3)
    assert read(tmp_path, raw).notes == ()


def test_several_ends_and_those_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "hel"}, "pad_token": "he"}')
    assert read(tmp_path, byte_level(), end_ids=(0,)).ids == {"eos": 0, "eot": 258, "padding": 257}
    assert read(tmp_path, byte_level()).ids == {"eos": 258, "padding": 257}


def test_pieces_have_scores_by_their_merges(tmp_path: Path) -> None:
    words = read(tmp_path, pieces(), size=266, start_id=1, end_ids=(2,))
    assert (words.model, words.pattern, words.merges) == ("llama", "default", ())
    by_text = {text: (words.kinds[i], words.scores[i]) for i, text in enumerate(words.tokens)}
    assert by_text["<unk>"][0] == UNKNOWN
    assert by_text["<s>"][0] == by_text["</s>"][0] == CONTROL
    assert by_text["<0x0A>"][0] == BYTE
    assert by_text["[PAD264]"][0] == UNUSED
    assert by_text["▁a"] == (NORMAL, 0.0)
    assert by_text["▁ab"] == (NORMAL, -1.0)
    assert words.ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert words.add_start
    assert words.add_space
    assert words.notes == ()


def test_a_space_before_a_text_by_either_spelling(tmp_path: Path) -> None:
    def spaced(scheme: str) -> dict[str, Any]:
        step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        return pieces(normalizer=None, pre_tokenizer=step)

    words = read(tmp_path, spaced("first"))
    assert words.add_space
    assert "begins with one" in words.notes[0]
    assert not read(tmp_path, spaced("never")).add_space
    assert not read(tmp_path, pieces(normalizer=pieces()["normalizer"]["normalizers"][1])).add_space


def test_no_text_stands_twice_or_holds_a_nul(tmp_path: Path) -> None:
    """llama.cpp reads a text up to its NUL, and ends where two tokens have one text."""
    raw = byte_level()
    raw["model"]["vocab"] |= {"[PAD262]": 260, "a\0": 261}
    words = read(tmp_path, raw, size=263)
    assert words.tokens[260:] == ("[PAD262]", "[PAD261]", "[PAD262]]")
    assert words.kinds[260:] == (NORMAL, UNUSED, UNUSED)
    assert len(set(words.tokens)) == 263


def test_pieces_that_no_merge_makes_are_told(tmp_path: Path) -> None:
    raw = pieces()
    raw["model"]["merges"].pop()
    assert "1 tokens that no merge makes" in read(tmp_path, raw).notes[0]


def test_what_llama_cpp_makes_of_texts_alone_is_told(tmp_path: Path) -> None:
    raw = pieces()
    raw["model"]["vocab"] |= {"<": 264, "/s>": 265, "b\0": 266}
    raw["model"]["merges"].append("b \0")
    notes = read(tmp_path, raw).notes
    assert any("takes </s> for the token" in note for note in notes)
    assert any("1 tokens that hold a NUL" in note for note in notes)


@pytest.mark.parametrize(
    ("raw", "error", "said"),
    [
        (byte_level(pre_tokenizer=split(r"\w+")), UnsupportedError, r"no name for how .* splits text: \\w\+"),
        (byte_level(pre_tokenizer=None), UnsupportedError, "not at all"),
        (byte_level(pre_tokenizer={"type": "Whitespace"}), UnsupportedError, "Whitespace"),
        (byte_level(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), UnsupportedError, "adds a space"),
        (byte_level(normalizer={"type": "Lowercase"}), UnsupportedError, "no normalizer Lowercase"),
        (byte_level(model={"type": "WordPiece", "vocab": {"a": 0}}), UnsupportedError, "of the kind WordPiece"),
        (byte_level(model={**byte_level()["model"], "merges": []}), UnsupportedError, "merges nothing"),
        (pieces(normalizer={"type": "NFKC"}), UnsupportedError, "no normalizer NFKC"),
        (pieces(pre_tokenizer={"type": "Whitespace"}), UnsupportedError, "no pre-tokenizer Whitespace"),
        (byte_level(model={"type": "BPE"}), CorruptError, "can't be read"),
        (byte_level(model={"type": "BPE", "vocab": {"a": "x"}, "merges": []}), CorruptError, "an id is not a number"),
    ],
)
def test_what_llama_cpp_can_not_do_is_refused(
    tmp_path: Path, raw: dict[str, Any], error: type[GptcliError], said: str
) -> None:
    with pytest.raises(error, match=said):
        read(tmp_path, raw)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match="260 tokens, and the model has room for 259"):
        read(tmp_path, byte_level(), size=259)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        read_gguf_words(tmp_path, 9, start_id=None, end_ids=())


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        read_gguf_words(tmp_path, 9, start_id=None, end_ids=())
