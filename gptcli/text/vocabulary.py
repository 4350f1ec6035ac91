"""Vocabulary files of byte-level BPE in tiktoken's terms: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.text.added import Added
from gptcli.text.patterns import GPT2_PATTERN, InexactError, Splitting, splitting, steps_of

AGAIN = "download or save the tokenizer again"


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
        splitting: how a text is split into words.
        ranks: token bytes -> rank, by which tiktoken merges; ids themselves where they grow with the merges.
        special: added tokens' text -> rank.
        ids: rank -> id where the two differ, else None.
        added: the added tokens.
        unmerged: id -> bytes of tokens that no merge makes; they can be decoded, never encoded.
        composes: whether a text is brought into Unicode's form C first.
    """

    splitting: Splitting
    ranks: dict[bytes, int]
    special: dict[str, int] = field(default_factory=dict)
    ids: dict[int, int] | None = None
    added: Sequence[Added] = ()
    unmerged: dict[int, bytes] = field(default_factory=dict)
    composes: bool = False


def load_json(file: Path) -> Any:
    """What a JSON file holds. Raises CorruptError when it can't be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{file} can't be read as JSON: {error}", AGAIN) from None


def added_tokens(raw: Any, file: Path) -> list[Added]:
    """The added tokens of a tokenizer.json. Raises CorruptError for one without text, LookupError and the like."""
    added = [Added.read(token) for token in raw.get("added_tokens") or []]
    if not all(token.text for token in added):
        raise CorruptError(f"{file} has an added token without text", AGAIN)
    return added


def merges_of(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The pairs of the ``model`` of a tokenizer.json; older files have them as strings."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def from_tokenizer_json(raw: Any, file: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    Raises InexactError where tiktoken would not make the same tokens, CorruptError, and LookupError and the like, for
    what is no tokenizer.json.
    """
    model = raw["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise InexactError("it is not of byte-level BPE")
    if other := [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)]:
        raise InexactError(f"it has {other[0]}")
    composes = False
    for step in steps_of(raw.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise InexactError(f"it normalizes text ({step['type']})")
        composes = True
    split = splitting(raw.get("pre_tokenizer"))
    added = added_tokens(raw, file)
    vocabulary = _build(file, split, model["vocab"], merges_of(model), added)
    if model.get("ignore_merges") and vocabulary.unmerged:
        raise InexactError("it has whole words that no merge makes")
    vocabulary.composes = composes
    return vocabulary


def from_vocab_and_merges(folder: Path, named: Iterable[Added]) -> Vocabulary:
    """The vocabulary of ``vocab.json`` and ``merges.txt``, with the added tokens that files beside them name.

    Raises CorruptError when they can't be read, UnsupportedError for what is not GPT-2's kind.
    """
    vocab = load_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        found = {token.text: token for token in named}
        if "<|endoftext|>" in vocab:
            found.setdefault("<|endoftext|>", Added("<|endoftext|>", vocab["<|endoftext|>"]))
        return _build(folder / "vocab.json", Splitting(GPT2_PATTERN, True), vocab, merges, list(found.values()))
    except InexactError as error:
        raise UnsupportedError(f"{folder}: {error}", "get the tokenizer.json of this model") from None
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptError(f"{folder}: vocab.json and merges.txt can't be read: {error}", AGAIN) from None


def _build(
    file: Path, split: Splitting, vocab: dict[str, int], merges: Sequence[Sequence[str]], added: Sequence[Added]
) -> Vocabulary:
    """A vocabulary from its parts, ranked by the merges' order."""
    texts = {token.text: token.id for token in added}
    tokens = {token: id_ for token, id_ in vocab.items() if token not in texts}
    check_ids([*tokens.values(), *texts.values()])
    made = _made(merges, vocab)
    order = [token for token in BYTE_ALPHABET if token in tokens] + made
    absent = next((token for token in order if token not in tokens and token not in texts), None)
    if absent is not None:
        raise CorruptError(f"{file} merges to {absent!r}, which its vocabulary lacks", AGAIN)
    if len(order) - len(made) < 256:
        raise InexactError("it has no token for some bytes")
    ids = [vocab[token] for token in order]
    merged = ids[len(ids) - len(made) :]
    data = [_to_bytes(token) for token in order]
    special_ids = set(texts.values())
    if _grows(merged) and not special_ids & set(ids):
        # Only the order among merged tokens matters to tiktoken, so the ids themselves can be the ranks.
        vocabulary = Vocabulary(split, dict(zip(data, ids, strict=True)), dict(texts))
    else:
        special = {text: len(order) + i for i, text in enumerate(texts)}
        by_rank = dict(enumerate(ids)) | {special[text]: id_ for text, id_ in texts.items()}
        vocabulary = Vocabulary(split, {token: rank for rank, token in enumerate(data)}, special, by_rank)
    known = set(order)
    vocabulary.added = added
    vocabulary.unmerged = {id_: bytes_of(token) for token, id_ in tokens.items() if token not in known}
    return vocabulary


def check_ids(ids: Sequence[object]) -> None:
    """Raise ValueError unless these are ids, each once."""
    if any(type(id_) is not int or not 0 <= id_ < 2**31 for id_ in ids):
        raise ValueError("an id is not a number from 0 on")
    if len(set(ids)) != len(ids):
        raise ValueError("two tokens have one id")


def _made(merges: Sequence[Sequence[str]], vocab: Mapping[str, int]) -> list[str]:
    """The tokens that the merges make, in their order.

    Some files list every pair that makes a token, one behind the other, since they were made of tiktoken's ranks
    (Llama 3): any pair merges, as it does there. Raises InexactError where a token has several merges otherwise: its
    place among the others would not be clear, or tiktoken would merge a pair that is not listed.
    """
    made = [left + right for left, right in merges]
    order = list(dict.fromkeys(made))
    if len(order) == len(made):
        return made
    runs = sum(one != other for one, other in pairwise(made)) + 1
    ways = Counter(made)
    every = all(
        count == 1 or count == sum(token[:end] in vocab and token[end:] in vocab for end in range(1, len(token)))
        for token, count in ways.items()
    )
    if runs != len(order) or not every or len(set(map(tuple, merges))) != len(merges):
        raise InexactError("it makes a token by two different merges")
    return order


def _grows(ids: Iterable[int]) -> bool:
    last = -1
    for id_ in ids:
        if id_ <= last:
            return False
        last = id_
    return True


def bytes_of(token: str) -> bytes:
    """The bytes of a token in GPT-2's alphabet; one with other characters in it is text itself."""
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "replace")


def _to_bytes(token: str) -> bytes:
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        raise InexactError(f"it has the token {token!r}, which is not written in GPT-2's byte alphabet") from None
