"""ListedCoder: tokenizers that tiktoken can't be exact with, through Hugging Face's ``tokenizers`` library.

These are BPE of characters with bytes to fall back on, as SentencePiece trains it (Llama 2, Mistral, TinyLlama, Phi-3),
and byte-level BPE that splits text in several steps or has more than ranks can say. Slower, and always the same.

SentencePiece writes a space as ``▁``, and puts one before a text so that its first word is the token that it is within
a text. A token's bytes here are those within a text, ``▁the`` is `` the``; ``Tokenizer`` takes the one that is too much
off where a text begins.
"""

from __future__ import annotations

import copy
import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptcli.errors import CorruptError, UnsupportedError
from gptcli.text.added import Added
from gptcli.text.patterns import InexactError, safe_cut, splitting, steps_of
from gptcli.text.ranked import cuts
from gptcli.text.vocabulary import AGAIN, added_tokens, bytes_of, check_ids, merges_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_READS = "gptcli reads byte-level BPE, and BPE with byte fall-back"


class _Form(NamedTuple):
    """What is to be known of a tokenizer besides what the library does.

    Attributes:
        bytes_of: a token as it is written in the vocabulary -> its bytes.
        start_space: where encoding puts a space: ``text``, before a text; ``parts``, also behind every added token.
        takes_space_off: whether decoding takes it off again.
        cuts: whether a text may be cut before a blank, and behind a line end.
    """

    bytes_of: Callable[[str], bytes]
    start_space: str | None
    takes_space_off: bool
    cuts: tuple[bool, bool]


class ListedCoder:
    """Text to ids and ids to bytes by the ``tokenizers`` library; see ``tokenizer.Coder``."""

    kind: str = "tokenizers"
    ids_of_ranks: dict[int, int] | None = None

    def __init__(self, raw: Any, file: Path, reason: str) -> None:
        """Of a tokenizer.json; ``reason`` says why it is not tiktoken's.

        Raises UnsupportedError for another kind of tokenizer, or without the library, CorruptError for what is none.
        """
        try:
            self.added: Sequence[Added] = added_tokens(raw, file)
            self._form = _form(raw, self.added, file)
            check_ids(list(_vocabulary(raw, self.added).values()))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CorruptError(f"{file} is not a tokenizer.json: {type(error).__name__} {error}", AGAIN) from None
        self._raw, self._file = {**raw, "truncation": None, "padding": None}, file
        self.reason = reason
        self._libraries: dict[tuple[bool, bool], Library] = {}
        self._plain = self._library(special=False, spaced=True)
        self.special = {token.text: token.id for token in self.added}
        self.start_space, self.takes_space_off = self._form.start_space, self._form.takes_space_off
        self._bytes: dict[int, bytes] = {}

    def _library(self, *, special: bool, spaced: bool) -> Library:
        """The library's tokenizer; each way of using it has one of its own, so that threads can share them."""
        if (special, spaced) not in self._libraries:
            library = _open(self._raw if spaced else _without_start_space(self._raw), self._file, self.reason)
            library.encode_special_tokens = not special
            self._libraries[special, spaced] = library
        return self._libraries[special, spaced]

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        """The ids of a text; with ``follows`` it goes on with another, and no space is put before it."""
        library = self._library(special=special, spaced=True) if special else self._plain
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not follows or self.start_space is None:
            return _ids(library, text)
        bare = self._library(special=special, spaced=False)
        if self.start_space == "text":
            return _ids(bare, text)
        # Behind an added token a space is put nevertheless.
        found = library.encode(text, add_special_tokens=False)
        own = {token.id for token in self.added}
        first = next((place for place, id_ in enumerate(found.ids) if id_ in own), None)
        if first is None:
            return _ids(bare, text)
        ids: list[int] = found.ids[first:]
        return _ids(bare, text[: found.offsets[first][0]]) + ids

    def encode_array(self, text: str, *, special: bool = False, follows: bool = False) -> array[int]:
        """``encode`` as an ``array("I")``."""
        return array("I", self.encode(text, special=special, follows=follows))

    def encode_ranks(self, text: str, allowed: Set[str] = frozenset()) -> Any:
        """The ids of a text; those special tokens in ``allowed`` that are written out in it part texts."""
        ids: list[int] = []
        pattern = "|".join(map(re.escape, sorted(allowed, key=len, reverse=True)))
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            if part in allowed:
                ids.append(self.special[part])
            elif part:
                ids += self.encode(part)
        return ids

    @property
    def streams(self) -> bool:
        """Whether ``safe_cut`` may find a place."""
        return any(self._form.cuts)

    def safe_cut(self, text: str) -> int:
        """The last place where the text may be cut, whatever follows; 0: not known."""
        blanks, lines = self._form.cuts
        return safe_cut(text, blanks=blanks, lines=lines)

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {id_: text for text, id_ in _vocabulary(self._raw, self.added).items()}

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._texts)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of one token within a text; none for an id without text."""
        data = self._bytes.get(id_)
        if data is None:
            text = self._texts.get(id_)
            if text is None:
                return b""
            data = text.encode("utf-8", "replace") if text in self.special else self._form.bytes_of(text)
            self._bytes[id_] = data
        return data

    def spelled(self) -> dict[bytes, int]:
        """The ids of tokens that are text by their bytes."""
        special = {token.id for token in self.added if token.special}
        # A byte that also is a character's token is hardly ever the byte.
        order = sorted(self._texts.items(), key=lambda pair: _BYTE.fullmatch(pair[1]) is None)
        tokens = {self.token_bytes(id_): id_ for id_, _ in order if id_ not in special}
        tokens.pop(b"", None)
        return tokens


def _ids(library: Library, text: str) -> list[int]:
    # Of one text as of a batch: the library lets go of the interpreter's lock only for batches.
    ids: list[int] = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _open(raw: Any, file: Path, reason: str) -> Library:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise UnsupportedError(
            f"{file} needs the tokenizers library: {reason}", "pip install 'gptcli[families]'"
        ) from None
    try:
        return Library.from_str(json.dumps(raw))
    except Exception as error:  # the library raises nothing more definite
        raise CorruptError(f"{file} is not a tokenizer.json: {error}", AGAIN) from None


def _vocabulary(raw: Any, added: Sequence[Added]) -> dict[str, int]:
    texts = {token.text: token.id for token in added}
    return {**raw["model"]["vocab"], **texts}


def _form(raw: Any, added: Sequence[Added], file: Path) -> _Form:
    """Raises UnsupportedError for a kind that is not known, LookupError and the like for what is no tokenizer.json."""
    model = raw["model"]
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"{file} is a tokenizer of the kind {model['type']}", _READS)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedError(f"{file} has {key} = {model[key]!r}", _READS)
    merges_of(model)
    decoding = steps_of(raw.get("decoder"), "decoders")
    spaces = {"text": False, "parts": False}
    normalizers = steps_of(raw.get("normalizer"), "normalizers")
    splits = steps_of(raw.get("pre_tokenizer"), "pretokenizers")
    for step in (*normalizers, *splits):
        if step["type"] == "Prepend" or (step["type"] == "ByteLevel" and step.get("add_prefix_space", True)):
            spaces["parts"] = True
        elif step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
            if scheme != "never":
                spaces["text" if scheme == "first" else "parts"] = True
    start = "parts" if spaces["parts"] else "text" if spaces["text"] else None
    kinds = [step["type"] for step in decoding]
    if kinds == ["ByteLevel"]:
        return _Form(bytes_of, start, False, _cuts_of_words(raw, normalizers, added))
    others = [kind for kind in kinds if kind not in ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace")]
    if not kinds or others:
        named = ", ".join(others) or "none"
        raise UnsupportedError(f"{file} is decoded in a way that gptcli does not know ({named})", _READS)
    falls_back = bool(model.get("byte_fallback"))
    replaced = [(step["pattern"]["String"], step["content"]) for step in decoding if step["type"] == "Replace"]
    replaced += [(step.get("replacement", "▁"), " ") for step in decoding if step["type"] == "Metaspace"]

    def spell(token: str) -> bytes:
        byte = _BYTE.fullmatch(token) if falls_back else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")

    takes_off = any(
        (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        or (step["type"] == "Metaspace" and start is not None)
        for step in decoding
    )
    return _Form(spell, start, takes_off and start is not None, _cuts(model, normalizers, splits, added, start))


def _cuts_of_words(raw: Any, normalizers: Sequence[Any], added: Sequence[Added]) -> tuple[bool, bool]:
    """Where a text may be cut: where it is split in any case."""
    try:
        streams = splitting(raw.get("pre_tokenizer")).streams and all(step["type"] == "NFC" for step in normalizers)
    except InexactError:
        streams = False
    return cuts(added) if streams else (False, False)


def _cuts(
    model: Any, normalizers: Sequence[Any], splits: Sequence[Any], added: Sequence[Added], start: str | None
) -> tuple[bool, bool]:
    """Where a text may be cut: between two characters that no token holds side by side, no merge goes across."""
    known = all(
        step["type"] == "Prepend"
        or (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁")
        for step in normalizers
    ) and all(step["type"] == "Metaspace" for step in splits)
    if not known or not (normalizers or splits):
        return False, False
    blanks, lines = cuts(added)
    if start is not None:  # behind an added token another space is put
        blanks = blanks and not any(token.text[-1].isalnum() for token in added)
        lines = lines and not any("\n" in token.text for token in added)
    inside = re.compile("[^▁]▁")
    blanks = blanks and not any(inside.search(token) for token in model["vocab"])
    return blanks and not any("\n" in token[1:] for token in model["vocab"]), lines and not any(
        "\n" in token[:-1] for token in model["vocab"]
    )


def _without_start_space(raw: Mapping[str, Any]) -> Any:
    """The same tokenizer, but that it puts no space before a text."""
    changed = {**raw, **{key: copy.deepcopy(raw.get(key)) for key in ("normalizer", "pre_tokenizer")}}
    normalizers = [step for step in steps_of(changed["normalizer"], "normalizers") if step["type"] != "Prepend"]
    changed["normalizer"] = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    for step in steps_of(changed["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return changed
