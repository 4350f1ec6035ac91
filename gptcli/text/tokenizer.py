"""Tokenizer: text <-> token ids over tiktoken, built from a model folder or from a tiktoken encoding.

tiktoken merges by rank, the lowest first, whatever pair makes the token; Hugging Face's byte-level BPE merges listed
pairs in their order. For a vocabulary that BPE training made these are the same thing, once each token's rank is the
place of its merge: a token's pair is what merging its own bytes leaves before the last step.
"""

from __future__ import annotations

import contextlib
import re
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import CorruptError, NotFoundError
from gptcli.text.bulk import in_order
from gptcli.text.spelling import Spelling
from gptcli.text.vocabulary import Vocabulary, read_vocabulary

if TYPE_CHECKING:
    import tiktoken

# Same ranks, loaded three times as fast.
_ENCODING_ALIASES = {"gpt2": "r50k_base"}

# Characters taken at a time from a text that is encoded as a stream.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Piece:
    """One token of a text: ``[start, end)`` are byte offsets in the UTF-8 text."""

    id: int
    data: bytes
    start: int
    end: int


class Tokenizer:
    """Encodes text into token ids and back.

    Special tokens written out in a text (``<|endoftext|>``) are plain text unless ``special=True``; a lone surrogate
    becomes U+FFFD, since it has no UTF-8.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding, vocabulary: Vocabulary | None = None) -> None:
        self.name = name
        self._encoding = encoding
        self._ids = vocabulary.ids if vocabulary else None  # rank -> id, where they differ
        self._ranks = {id_: rank for rank, id_ in self._ids.items()} if self._ids else None
        self._unmerged = vocabulary.unmerged if vocabulary else {}
        self._special = {text: self._id(rank) for text, rank in encoding._special_tokens.items()}
        self._all_marks = _alternatives(self._special)
        self._always = vocabulary.always if vocabulary else ()
        self._always_marks = _alternatives(self._always)
        # Where the file says so; None asks the caller to look into config.json.
        self.start_id = vocabulary.start_id if vocabulary else None
        self._streams = _streams(encoding._pat_str) and not any(" " in text or "\n" in text for text in self._special)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

        Needs no network. Raises NotFoundError without these files, CorruptError or UnsupportedError for their content.
        """
        import tiktoken

        vocabulary = read_vocabulary(folder)
        try:
            encoding = tiktoken.Encoding(
                name=folder.name,
                pat_str=vocabulary.pattern,
                mergeable_ranks=vocabulary.ranks,
                special_tokens=vocabulary.special,
            )
        except ValueError as error:
            raise CorruptError(
                f"{folder} splits text by a broken pattern: {error}", "get the tokenizer again"
            ) from None
        return cls(folder.name, encoding, vocabulary)

    @classmethod
    def from_encoding(cls, name: str, *, download: bool = False) -> Tokenizer:
        """A tiktoken encoding by name, from tiktoken's cache; downloaded only if ``download``.

        Raises NotFoundError for an unknown name, or when the vocabulary is not in the cache and can't be had.
        """
        import tiktoken

        if name not in encoding_names():
            raise NotFoundError(f"there is no encoding {name!r}", f"tiktoken has: {', '.join(encoding_names())}")
        real = _ENCODING_ALIASES.get(name, name)
        try:
            with contextlib.nullcontext() if download else _no_download():
                encoding = tiktoken.get_encoding(real)
        except _WouldDownloadError:
            raise NotFoundError(
                f"the vocabulary of {name} is not on this machine",
                "let it be fetched with --pull, or set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files",
            ) from None
        except Exception as error:  # requests' errors, a bad hash, a full disk: all mean that there is no vocabulary
            raise NotFoundError(
                f"the vocabulary of {name} could not be downloaded: {type(error).__name__}",
                "set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files, or try again with a network",
            ) from None
        return cls(name, encoding)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        merged = self._encoding.max_token_value if self._ids is None else max(self._ids.values())
        return 1 + max([merged, *self._unmerged, *self._special.values()])

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens' texts and ids."""
        return dict(self._special)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of ``text``; with ``special`` the special tokens written out in it become themselves."""
        marks = self._all_marks if special else self._always_marks
        return self._encode_plain(text) if marks is None else self._encode_marked(text, marks)

    def _encode_marked(self, text: str, marks: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        end = 0
        for mark in marks.finditer(text):
            ids += self._encode_plain(text[end : mark.start()])
            ids.append(self._special[mark[0]])
            end = mark.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        ranks = self._encoding.encode_ordinary(text)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def encode_array(self, text: str, *, special: bool = False) -> array[int]:
        """``encode`` as an ``array("I")``: without a Python integer a token, mostly without the interpreter lock."""
        marks = self._all_marks if special else self._always_marks
        ids = array("I")
        end = 0
        for mark in marks.finditer(text) if marks is not None else ():
            ids += self._array_of_plain(text[end : mark.start()])
            ids.append(self._special[mark[0]])
            end = mark.end()
        rest = self._array_of_plain(text[end:] if end else text)
        return ids + rest if ids else rest

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
        """tiktoken's ranks (not ids) of ``text``, ``[N]``: a NumPy uint32 array, without a Python integer a token.

        Of the special tokens written out in the text, those in ``allowed`` become themselves, and those that are
        matched in any text. For bulk work: it leaves NumPy and the step to ids to the caller.
        """
        if self._always_marks is not None and self._always_marks.search(text):
            marks = _alternatives([*allowed, *self._always])
            assert marks is not None
            ids = self._encode_marked(text, marks)
            return ids if self._ranks is None else [self._ranks[id_] for id_ in ids]
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_ranks(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), allowed)

    def safe_cut(self, text: str) -> int:
        """The last place where ``text`` may be cut, whatever follows, without moving a token border; 0: not known."""
        return _safe_cut(text) if self._streams else 0

    def encode_batch(
        self, texts: Sequence[str], *, special: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        """``encode`` of each text, on all cores (tiktoken works without the interpreter lock)."""
        return list(in_order(lambda text: self.encode(text, special=special), texts, threads))

    def cut_stream(self, chunks: Iterable[str]) -> Iterator[str]:
        """The text that ``chunks`` make together, in pieces that can be encoded apart.

        The ids of the pieces joined are those of the whole: the text is cut only where the pre-tokenizer's pattern cuts
        in any case (see ``_safe_cut``). A text for whose pattern that is not known comes as one piece.
        """
        buffer = ""
        wanted = _CHUNK
        for chunk in chunks:
            buffer += chunk
            if len(buffer) < wanted or not self._streams:
                continue
            cut = _safe_cut(buffer)
            # A run without a break has to be seen whole; look again when it has doubled, not at every chunk.
            wanted = _CHUNK if cut else 2 * len(buffer)
            if cut:
                yield buffer[:cut]
                buffer = buffer[cut:]
        if buffer:
            yield buffer

    def encode_stream(self, chunks: Iterable[str], *, special: bool = False) -> Iterator[list[int]]:
        """The ids of the text that ``chunks`` make together, piece by piece, with memory bounded by a few chunks."""
        for piece in self.cut_stream(chunks):
            yield self.encode(piece, special=special)

    def encode_streams(
        self, documents: Iterable[Iterable[str]], *, special: bool = False, threads: int | None = None
    ) -> Iterator[tuple[array[int], bool]]:
        """The ids of many documents, each given in chunks, on all cores: pieces in order, and whether one is the last.

        Equal to ``encode_stream`` of one document after the other, and to ``[]`` for an empty one. Memory is bounded by
        a few pieces a thread; they are read ahead, also of the documents that follow.
        """

        def pieces() -> Iterator[tuple[str, bool]]:
            for chunks in documents:
                held = ""
                for piece in self.cut_stream(chunks):
                    if held:
                        yield held, False
                    held = piece
                yield held, True

        return in_order(lambda piece: (self.encode_array(piece[0], special=special), piece[1]), pieces(), threads)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of one token; an id without text (a padded vocabulary has them) is empty."""
        rank = id_ if self._ranks is None else self._ranks.get(id_, -1)
        try:
            return self._encoding.decode_single_token_bytes(rank)
        except (KeyError, OverflowError):
            return self._unmerged.get(id_, b"")

    @cached_property
    def spelling(self) -> Spelling:
        """All tokens that are text by their bytes, special ones left out; built when it is first asked for."""
        ranks = self._encoding._mergeable_ranks
        tokens = ranks if self._ids is None else {data: self._ids[rank] for data, rank in ranks.items()}
        unmerged = {data: id_ for id_, data in self._unmerged.items() if data}
        return Spelling({**unmerged, **tokens})

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens, joined."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> Iterator[Piece]:
        """Each token with its bytes and its place in the text that they make."""
        position = 0
        for id_ in ids:
            data = self.token_bytes(id_)
            yield Piece(id_, data, position, position + len(data))
            position += len(data)

    def _id(self, rank: int) -> int:
        return rank if self._ids is None else self._ids[rank]


def encoding_names() -> list[str]:
    """The encodings that tiktoken knows by name."""
    import tiktoken

    return sorted(tiktoken.list_encoding_names())


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    """What finds any of the texts, the longest where several begin alike; None for no texts."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


# Patterns in which a match that began before a space or newline ends there, if a letter or digit stood before it, and
# in which nothing looks behind: GPT-2's, and OpenAI's and Llama's later ones that are built from the same parts.
_KNOWN_PARTS = ("\\p{L}", "\\p{N}", "\\s")


def _streams(pattern: str) -> bool:
    return "(?<" not in pattern and all(part in pattern for part in _KNOWN_PARTS) and "\\s+(?!\\S)" in pattern


def _safe_cut(text: str) -> int:
    """The last place where ``text`` may be cut, whatever follows, without moving a token border; 0 if there is none.

    That is between a letter or digit and a space or newline: the match before ends there with or without the cut (words
    and numbers hold no white space, and only white space looks ahead), and the next one starts there. Without such a
    place it is behind a single newline: what follows is neither white space nor ``/``, which some patterns take
    along with line ends.
    """
    for blank in (" ", "\n"):
        place = text.rfind(blank, 1)
        for _ in range(1000):
            if place < 1:
                break
            if text[place - 1].isalpha() or text[place - 1].isdecimal():
                return place
            place = text.rfind(blank, 1, place)
    place = len(text) - 1
    for _ in range(1000):
        place = text.rfind("\n", 1, place)
        if place < 1:
            break
        if not text[place - 1].isspace() and not text[place + 1].isspace() and text[place + 1] != "/":
            return place + 1
    return 0


class _WouldDownloadError(Exception):
    pass


_download_lock = threading.Lock()


@contextlib.contextmanager
def _no_download() -> Iterator[None]:
    """Within, tiktoken uses its cache or fails: a command opens a connection only when told to."""
    from tiktoken import load

    def refuse(blobpath: str, *_: Any) -> bytes:
        if "://" in blobpath:
            raise _WouldDownloadError(blobpath)
        return real(blobpath)

    with _download_lock:
        real: Callable[..., bytes] = load.read_file
        load.read_file = refuse
        try:
            yield
        finally:
            load.read_file = real
