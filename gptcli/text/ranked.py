"""RankedCoder: byte-level BPE through tiktoken, which is fast.

tiktoken merges by rank, the lowest first, whatever pair makes the token; Hugging Face's byte-level BPE merges listed
pairs in their order. For a vocabulary that BPE training made these are the same thing, once each token's rank is the
place of its merge: a token's pair is what merging its own bytes leaves before the last step. A word that is a token
tiktoken takes whole, merges or not, which is ``ignore_merges``, and else the same for tokens that merges make.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptcli.text.added import Added, Finder, to_nfc
from gptcli.text.patterns import Splitting, pattern_streams, safe_cut
from gptcli.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import tiktoken


class RankedCoder:
    """Text to ids and ids to bytes by a tiktoken encoding; see ``tokenizer.Coder``."""

    kind: str = "tiktoken"
    reason: str = ""
    start_space: str | None = None
    takes_space_off: bool = False

    def __init__(self, encoding: tiktoken.Encoding, vocabulary: Vocabulary | None = None) -> None:
        self._encoding = encoding
        self._ids = vocabulary.ids if vocabulary else None  # rank -> id, where they differ
        self._ranks = {id_: rank for rank, id_ in self._ids.items()} if self._ids else None
        self._unmerged = vocabulary.unmerged if vocabulary else {}
        self.special = {text: self._id(rank) for text, rank in encoding._special_tokens.items()}
        self.added: Sequence[Added] = [Added(text, id_) for text, id_ in self.special.items()]
        if vocabulary:
            self.added = vocabulary.added
        self._normalize = to_nfc if vocabulary and vocabulary.composes else None
        self._finders: dict[Set[str] | None, Finder] = {}
        self._plain = self._finder(frozenset())
        # The plain path is that of most texts: nothing to find, nothing to normalize.
        self._idle = self._plain.is_idle
        split = vocabulary.splitting if vocabulary else Splitting(encoding._pat_str, pattern_streams(encoding._pat_str))
        self._cuts = cuts(self.added) if split.streams else (False, False)

    def _finder(self, allowed: Set[str] | None) -> Finder:
        """What finds the tokens matched in any text, and of the special ones those allowed, or all of them."""
        if allowed not in self._finders:
            self._finders[allowed] = Finder(
                self.added,
                self._normalize,
                lambda each: not each.special or allowed is None or each.text in allowed,
            )
        return self._finders[allowed]

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        """The ids of a text."""
        if self._idle and not special:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in (self._finder(None) if special else self._plain).cut(text):
            if isinstance(part, str):
                ids += self._encode_plain(part)
            else:
                ids.append(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ranks = self._encoding.encode_ordinary(text)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def encode_array(self, text: str, *, special: bool = False, follows: bool = False) -> array[int]:
        """``encode`` as an ``array("I")``."""
        if self._idle and not special:
            return self._array_of_plain(text)
        ids = array("I")
        for part in (self._finder(None) if special else self._plain).cut(text):
            if isinstance(part, str):
                ids += self._array_of_plain(part)
            else:
                ids.append(part)
        return ids

    def _array_of_plain(self, text: str) -> array[int]:
        # What tiktoken's encode_to_numpy wraps; NumPy would take longer to import than most texts to encode.
        to_buffer = getattr(self._encoding._core_bpe, "encode_to_tiktoken_buffer", None)
        if to_buffer is None:
            return array("I", self._encode_plain(text))
        try:
            # Through bytes, since the buffer misstates its own shape.
            ranks = array("I", bytes(to_buffer(text, set())))
        except UnicodeEncodeError:
            return self._array_of_plain(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return ranks if self._ids is None else array("I", map(self._ids.__getitem__, ranks))

    @property
    def ids_of_ranks(self) -> dict[int, int] | None:
        """tiktoken's rank of a token -> its id; None where the two are the same."""
        return None if self._ids is None else dict(self._ids)

    def encode_ranks(self, text: str, allowed: Set[str] = frozenset()) -> Any:
        """tiktoken's ranks of a text, the special tokens in ``allowed`` as themselves."""
        if not self._idle and not self._plain.leaves(text):
            finder = self._finder(frozenset(allowed))
            ids = [
                id_
                for part in finder.cut(text)
                for id_ in (self._encode_plain(part) if isinstance(part, str) else [part])
            ]
            return ids if self._ranks is None else [self._ranks[id_] for id_ in ids]
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_ranks(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), allowed)

    @property
    def streams(self) -> bool:
        """Whether ``safe_cut`` may find a place."""
        return any(self._cuts)

    def safe_cut(self, text: str) -> int:
        """The last place where the text may be cut, whatever follows; 0: not known."""
        blanks, lines = self._cuts
        return safe_cut(text, blanks=blanks, lines=lines)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        merged = self._encoding.max_token_value if self._ids is None else max(self._ids.values())
        return 1 + max([merged, *self._unmerged, *self.special.values()])

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of one token; none for an id without text."""
        rank = id_ if self._ranks is None else self._ranks.get(id_, -1)
        try:
            return self._encoding.decode_single_token_bytes(rank)
        except (KeyError, OverflowError):
            return self._unmerged.get(id_, b"")

    def spelled(self) -> dict[bytes, int]:
        """The ids of tokens that are text by their bytes."""
        ranks = self._encoding._mergeable_ranks
        tokens = ranks if self._ids is None else {data: self._ids[rank] for data, rank in ranks.items()}
        unmerged = {data: id_ for id_, data in self._unmerged.items() if data}
        written = {each.text.encode(): each.id for each in self.added if not each.special}
        return {**unmerged, **tokens, **written}

    def _id(self, rank: int) -> int:
        return rank if self._ids is None else self._ids[rank]


def cuts(added: Sequence[Added]) -> tuple[bool, bool]:
    """Whether a text may be cut before a blank, and behind a line end, as far as its added tokens go.

    None may stretch over the place, nor take along white space from its other side.
    """
    blanks = not any(
        re.search(r"[^\W_][ \n]", each.text) or (each.rstrip and each.text[-1].isalnum()) for each in added
    )
    lines = not any(each.lstrip or "\n" in each.text[:-1] for each in added)
    return blanks, lines
