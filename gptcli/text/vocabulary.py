"""Vocabulary files in tiktoken's terms: ``tokenizer.json`` of byte-level BPE, or ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, NotFoundError, UnsupportedError

# How GPT-2 splits text into words before merging (Radford et al. 2019, the released code), written with possessive
# quantifiers where backing off can't help, which is what makes it linear on long runs.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_AGAIN = "download or save the tokenizer again"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for every byte: itself if it prints, else the next free one from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in prints]
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()
# For str.translate: a character outside the alphabet becomes one that latin-1 refuses.
_TO_LATIN1 = dict.fromkeys(range(256), "\uffff") | {ord(char): chr(byte) for char, byte in BYTE_ALPHABET.items()}


@dataclass
class Vocabulary:
    """A vocabulary in tiktoken's terms.

    Attributes:
        pattern: the pre-tokenizer's regular expression.
        ranks: token bytes -> rank, by which tiktoken merges; ids themselves where they grow with the merges.
        special: added tokens' text -> rank.
        ids: rank -> id where the two differ, else None.
        always: the added tokens that are matched in any text, since they are not marked special.
        unmerged: id -> bytes of tokens that no merge makes; they can be decoded, never encoded.
        start_id: the token that the file puts before every text, if it does.
    """

    pattern: str
    ranks: dict[bytes, int]
    special: dict[str, int] = field(default_factory=dict)
    ids: dict[int, int] | None = None
    always: tuple[str, ...] = ()
    unmerged: dict[int, bytes] = field(default_factory=dict)
    start_id: int | None = None


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary files of a model folder.

    Raises NotFoundError without them, CorruptError when they can't be read, UnsupportedError for a kind of tokenizer
    that is not byte-level BPE with one pattern.
    """
    if (folder / "tokenizer.json").exists():
        return _from_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _from_vocab_and_merges(folder)
    raise NotFoundError(
        f"{folder} has no tokenizer.json, and no vocab.json with merges.txt",
        "copy the model's tokenizer files into the folder",
    )


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{file} can't be read as JSON: {error}", _AGAIN) from None


def _from_tokenizer_json(file: Path) -> Vocabulary:
    raw = _load(file)
    try:
        model = raw["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "BPE with byte fall-back" if model.get("byte_fallback") else model["type"]
            raise UnsupportedError(f"{file} is a tokenizer of the kind {kind}", "gptcli reads byte-level BPE")
        if raw.get("normalizer"):
            raise UnsupportedError(f"{file} normalizes text ({raw['normalizer'].get('type')})", "use another model")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise UnsupportedError(f"{file} has {key} = {model[key]!r}", "gptcli reads byte-level BPE")
        for token in raw.get("added_tokens") or []:
            _check_added(token, file)
        pattern = _pattern(raw.get("pre_tokenizer"), file)
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        added = raw.get("added_tokens") or []
        vocabulary = _build(file, pattern, model["vocab"], merges, {token["content"]: token["id"] for token in added})
        vocabulary.always = tuple(token["content"] for token in added if not token.get("special", True))
        vocabulary.start_id = _start_id(raw.get("post_processor"))
        if model.get("ignore_merges") and vocabulary.unmerged:
            raise UnsupportedError(f"{file} has whole words that no merge makes", "use another model")
        return vocabulary
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{file} is not a tokenizer.json: {type(error).__name__} {error}", _AGAIN) from None


def _from_vocab_and_merges(folder: Path) -> Vocabulary:
    vocab = _load(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        ends = {text: vocab[text] for text in ("<|endoftext|>",) if text in vocab}
        return _build(folder / "vocab.json", GPT2_PATTERN, vocab, merges, ends)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{folder}: vocab.json and merges.txt can't be read: {error}", _AGAIN) from None


def _check_added(token: Any, file: Path) -> None:
    if not token["content"]:
        raise CorruptError(f"{file} has an added token without text", _AGAIN)
    for key in ("lstrip", "rstrip", "single_word"):
        if token.get(key):
            raise UnsupportedError(f"{file}: the token {token['content']!r} has {key}", "use another model")


def _pattern(raw: Any, file: Path) -> str:
    """The one regular expression that a pre-tokenizer splits by."""
    steps = raw["pretokenizers"] if raw and raw["type"] == "Sequence" else [raw] if raw else []
    patterns = []
    for step in steps:
        if step["type"] == "ByteLevel":
            if step.get("add_prefix_space"):
                raise UnsupportedError(f"{file} adds a space before every text", "use another model")
            if step.get("use_regex", True):
                patterns.append(GPT2_PATTERN)
        elif (
            step["type"] == "Split"
            and "Regex" in step["pattern"]
            and step["behavior"] == "Isolated"
            and not step.get("invert")
        ):
            patterns.append(step["pattern"]["Regex"])
        else:
            raise UnsupportedError(f"{file} has a pre-tokenizer of the kind {step['type']}", "use another model")
    if len(patterns) != 1 or steps[-1]["type"] != "ByteLevel":
        raise UnsupportedError(f"{file} splits text by {len(patterns)} patterns, not by one", "use another model")
    return str(patterns[0])


def _start_id(raw: Any) -> int | None:
    """The id of the special token that a TemplateProcessing puts before a single text."""
    steps = raw["processors"] if raw and raw["type"] == "Sequence" else [raw] if raw else []
    for step in steps:
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            text = step["single"][0]["SpecialToken"]["id"]
            return int(step["special_tokens"][text]["ids"][0])
    return None


def _build(
    file: Path, pattern: str, vocab: dict[str, int], merges: Sequence[Sequence[str]], added: dict[str, int]
) -> Vocabulary:
    """A vocabulary from its parts, ranked by the merges' order."""
    tokens = {token: id_ for token, id_ in vocab.items() if token not in added}
    every = [*tokens.values(), *added.values()]
    if any(type(id_) is not int or not 0 <= id_ < 2**31 for id_ in every):
        raise ValueError("an id is not a number from 0 on")
    if len(set(every)) != len(every):
        raise ValueError("two tokens have one id")
    made = [left + right for left, right in merges]
    if len(set(made)) != len(made):
        # tiktoken has one rank a token; a token with two pairs would merge by the first of them only.
        raise UnsupportedError(f"{file} makes a token by two different merges", "use another model")
    order = [token for token in BYTE_ALPHABET if token in tokens] + made
    absent = next((token for token in order if token not in tokens and token not in added), None)
    if absent is not None:
        raise CorruptError(f"{file} merges to {absent!r}, which its vocabulary lacks", _AGAIN)
    if len(order) - len(made) < 256:
        raise UnsupportedError(f"{file} has no token for some bytes", "gptcli reads byte-level BPE with all 256 bytes")
    ids = [vocab[token] for token in order]
    merged = ids[len(ids) - len(made) :]
    data = [_to_bytes(token, file) for token in order]
    special_ids = set(added.values())
    if _grows(merged) and not special_ids & set(ids):
        # Only the order among merged tokens matters to tiktoken, so the ids themselves can be the ranks.
        vocabulary = Vocabulary(pattern, dict(zip(data, ids, strict=True)), dict(added))
    else:
        special = {text: len(order) + i for i, text in enumerate(added)}
        by_rank = dict(enumerate(ids)) | {special[text]: id_ for text, id_ in added.items()}
        vocabulary = Vocabulary(pattern, {token: rank for rank, token in enumerate(data)}, special, by_rank)
    known = set(order)
    vocabulary.unmerged = {id_: _to_bytes(token, file) for token, id_ in tokens.items() if token not in known}
    return vocabulary


def _grows(ids: Iterable[int]) -> bool:
    last = -1
    for id_ in ids:
        if id_ <= last:
            return False
        last = id_
    return True


def _to_bytes(token: str, file: Path) -> bytes:
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        raise UnsupportedError(
            f"{file} has the token {token!r}, which is not written in GPT-2's byte alphabet",
            "gptcli reads byte-level BPE",
        ) from None
