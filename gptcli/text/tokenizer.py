"""Tokenizer: text <-> token ids, of a model folder or of a tiktoken encoding.

What knows the vocabulary is a Coder: tiktoken where it makes the very tokens (``ranked``), else the ``tokenizers``
library (``listed``). Streams, batches, pieces and the space that some put before a text are the same for both.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gptcli.errors import CorruptError, NotFoundError, UnsupportedError
from gptcli.text.added import SPACES, Added
from gptcli.text.bulk import in_order
from gptcli.text.folder import named_tokens, start_of
from gptcli.text.patterns import InexactError
from gptcli.text.ranked import RankedCoder
from gptcli.text.spelling import Spelling
from gptcli.text.vocabulary import AGAIN, Vocabulary, from_tokenizer_json, from_vocab_and_merges, load_json

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


class Coder(Protocol):
    """What a Tokenizer encodes and decodes by.

    Attributes:
        kind: ``tiktoken`` or ``tokenizers``, whichever does the work.
        reason: why it is not tiktoken; empty where it is.
        special: the added tokens' texts and ids.
        start_space: where encoding puts a space that the text has not: ``text``, before a text; ``parts``, also behind
            every added token; None nowhere.
        takes_space_off: whether decoding a text takes that space off again.
        added: the added tokens.
    """

    kind: str
    reason: str
    special: dict[str, int]
    start_space: str | None
    takes_space_off: bool
    added: Sequence[Added]

    @property
    def vocab_size(self) -> int: ...
    @property
    def streams(self) -> bool: ...
    @property
    def ids_of_ranks(self) -> dict[int, int] | None: ...
    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]: ...
    def encode_array(self, text: str, *, special: bool = False, follows: bool = False) -> array[int]: ...
    def encode_ranks(self, text: str, allowed: Set[str] = frozenset()) -> Any: ...
    def safe_cut(self, text: str) -> int: ...
    def token_bytes(self, id_: int) -> bytes: ...
    def spelled(self) -> dict[bytes, int]: ...


class Tokenizer:
    """Encodes text into token ids and back.

    Special tokens written out in a text (``<|endoftext|>``) are plain text unless ``special=True``; a lone surrogate
    becomes U+FFFD, since it has no UTF-8.

    Some tokenizers put a space before a text. It belongs to the first token, and is taken off where a whole text is
    decoded; ``follows=True`` says that a text, or tokens, go on with others, where there is none.
    """

    def __init__(self, name: str, coder: Coder, start_id: int | None = None) -> None:
        self.name = name
        self._coder = coder
        # Where the file says so; None asks the caller to look into config.json.
        self.start_id = start_id

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

        Needs no network. Raises NotFoundError without these files, CorruptError or UnsupportedError for their content,
        UnsupportedError also where it takes the ``tokenizers`` library and that is not installed.
        """
        file = folder / "tokenizer.json"
        if not file.exists():
            return cls._from_older_files(folder)
        raw = load_json(file)
        try:
            try:
                coder: Coder = _ranked(folder, from_tokenizer_json(raw, file))
            except InexactError as reason:
                from gptcli.text.listed import ListedCoder

                coder = ListedCoder(raw, file, str(reason))
            return cls(folder.name, coder, start_of(folder, raw.get("post_processor"), coder.special))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CorruptError(f"{file} is not a tokenizer.json: {type(error).__name__} {error}", AGAIN) from None

    @classmethod
    def _from_older_files(cls, folder: Path) -> Tokenizer:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            vocab = load_json(folder / "vocab.json")
            named = named_tokens(folder, vocab) if isinstance(vocab, dict) else []
            coder = _ranked(folder, from_vocab_and_merges(folder, named))
            return cls(folder.name, coder, start_of(folder, None, coder.special))
        if (folder / "tokenizer.model").exists() or (folder / "tekken.json").exists():
            raise UnsupportedError(
                f"{folder} has its tokenizer only as tokenizer.model or tekken.json, which gptcli does not read",
                "copy the tokenizer.json of the same model, or write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
        raise NotFoundError(
            f"{folder} has no tokenizer.json, and no vocab.json with merges.txt",
            "copy the model's tokenizer files into the folder",
        )

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
        return cls(name, RankedCoder(encoding))

    @property
    def kind(self) -> str:
        """What does the work: ``tiktoken`` or ``tokenizers``."""
        return self._coder.kind

    @property
    def reason(self) -> str:
        """Why it is not tiktoken that does the work; empty where it is."""
        return self._coder.reason

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._coder.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens' texts and ids."""
        return dict(self._coder.special)

    def encode(self, text: str, *, special: bool = False, follows: bool = False) -> list[int]:
        """The token ids of ``text``; with ``special`` the special tokens written out in it become themselves."""
        return self._coder.encode(text, special=special, follows=follows)

    def encode_array(self, text: str, *, special: bool = False, follows: bool = False) -> array[int]:
        """``encode`` as an ``array("I")``: without a Python integer a token, mostly without the interpreter lock."""
        return self._coder.encode_array(text, special=special, follows=follows)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """The ids of a text that is given in parts: texts, each encoded apart, and ids of special tokens."""
        parts = self.trimmed(parts)
        ids: list[int] = []
        for part, follows in zip(parts, self.following(parts), strict=True):
            ids += self.encode(part, follows=follows) if isinstance(part, str) else [part]
        return ids

    def trimmed(self, parts: Iterable[str | int]) -> list[str | int]:
        """The parts of a text without the white space that the special tokens among them take along."""
        flagged = {each.id: each for each in self._coder.added if each.lstrip or each.rstrip}
        parts = list(parts)
        for places in (range(len(parts)), range(len(parts) - 1, -1, -1)) if flagged else ():
            behind, taking = places.step > 0, False
            for place in places:
                part = parts[place]
                if not isinstance(part, str):
                    token = flagged.get(part)
                    taking = token is not None and (token.rstrip if behind else token.lstrip)
                elif taking:
                    parts[place] = part = part.lstrip(SPACES) if behind else part.rstrip(SPACES)
                    taking = not part
        return parts

    def following(self, parts: Sequence[str | int]) -> list[bool]:
        """Of the parts of a text, which go on with one before, so that no space is to be put before them."""
        spaced = self._coder.start_space == "parts"
        return [place > 0 and not (spaced and isinstance(parts[place - 1], int)) for place in range(len(parts))]

    @property
    def ids_of_ranks(self) -> dict[int, int] | None:
        """The rank of a token, by which ``encode_ranks`` names it -> its id; None where the two are the same."""
        return self._coder.ids_of_ranks

    def encode_ranks(self, text: str, allowed: Set[str] = frozenset()) -> Any:
        """tiktoken's ranks (not ids) of ``text``, ``[N]``: a NumPy uint32 array, without a Python integer a token.

        Of the special tokens written out in the text, those in ``allowed`` become themselves, and those that are
        matched in any text. For bulk work: it leaves NumPy and the step to ids to the caller.
        """
        return self._coder.encode_ranks(text, allowed)

    def safe_cut(self, text: str) -> int:
        """The last place where ``text`` may be cut, whatever follows, without moving a token border; 0: not known.

        Never where a space is put before a text: the part behind the cut would get one, too.
        """
        return 0 if self._coder.start_space else self._coder.safe_cut(text)

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        special: bool = False,
        threads: int | None = None,
        follows: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """``encode`` of each text, on all cores; ``follows`` says of each whether it goes on with another."""
        pairs = zip(texts, follows if follows is not None else [False] * len(texts), strict=True)
        return list(in_order(lambda pair: self.encode(pair[0], special=special, follows=pair[1]), pairs, threads))

    def cut_stream(self, chunks: Iterable[str]) -> Iterator[str]:
        """The text that ``chunks`` make together, in pieces that can be encoded apart.

        The ids of the pieces joined are those of the whole: the text is cut only where the pre-tokenizer's pattern cuts
        in any case (see ``safe_cut``). A text for whose pattern that is not known comes as one piece. Those behind the
        first follow it.
        """
        buffer = ""
        wanted = _CHUNK
        for chunk in chunks:
            buffer += chunk
            if len(buffer) < wanted or not self._coder.streams:
                continue
            cut = self._coder.safe_cut(buffer)
            # A run without a break has to be seen whole; look again when it has doubled, not at every chunk.
            wanted = _CHUNK if cut else 2 * len(buffer)
            if cut:
                yield buffer[:cut]
                buffer = buffer[cut:]
        if buffer:
            yield buffer

    def encode_stream(self, chunks: Iterable[str], *, special: bool = False) -> Iterator[list[int]]:
        """The ids of the text that ``chunks`` make together, piece by piece, with memory bounded by a few chunks."""
        for number, piece in enumerate(self.cut_stream(chunks)):
            yield self.encode(piece, special=special, follows=number > 0)

    def encode_streams(
        self, documents: Iterable[Iterable[str]], *, special: bool = False, threads: int | None = None
    ) -> Iterator[tuple[array[int], bool]]:
        """The ids of many documents, each given in chunks, on all cores: pieces in order, and whether one is the last.

        Equal to ``encode_stream`` of one document after the other, and to ``[]`` for an empty one. Memory is bounded by
        a few pieces a thread; they are read ahead, also of the documents that follow.
        """

        def pieces() -> Iterator[tuple[str, bool, bool]]:
            for chunks in documents:
                held, follows = "", False
                for piece in self.cut_stream(chunks):
                    if held:
                        yield held, follows, False
                        follows = True
                    held = piece
                yield held, follows, True

        def encoded(piece: tuple[str, bool, bool]) -> tuple[array[int], bool]:
            return self.encode_array(piece[0], special=special, follows=piece[1]), piece[2]

        return in_order(encoded, pieces(), threads)

    def token_bytes(self, id_: int) -> bytes:
        """The bytes of one token within a text; an id without text (a padded vocabulary has them) is empty."""
        return self._coder.token_bytes(id_)

    def token_text(self, id_: int) -> str:
        """The text of one token; bytes that are no character become U+FFFD."""
        return self._coder.token_bytes(id_).decode("utf-8", errors="replace")

    def speller(self, *, follows: bool = False) -> Callable[[int], bytes]:
        """What gives the bytes of a text's tokens when it is called with one after the other, from the first on."""
        if not self._coder.takes_space_off:
            return self._coder.token_bytes
        return _Speller(self._coder, self.start_id, follows)

    @cached_property
    def spelling(self) -> Spelling:
        """All tokens that are text by their bytes, special ones left out; built when it is first asked for."""
        return Spelling(self._coder.spelled())

    def decode_bytes(self, ids: Iterable[int], *, follows: bool = False) -> bytes:
        """The bytes of a text's tokens, joined."""
        return b"".join(map(self.speller(follows=follows), ids))

    def decode(self, ids: Iterable[int], *, follows: bool = False) -> str:
        """The text of the tokens; bytes that are no character become U+FFFD."""
        return self.decode_bytes(ids, follows=follows).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> Iterator[Piece]:
        """Each token of a text with its bytes and its place in the text that they make."""
        position = 0
        spell = self.speller()
        for id_ in ids:
            data = spell(id_)
            yield Piece(id_, data, position, position + len(data))
            position += len(data)


class _Speller:
    """Takes the space that encoding put before a text, or before a part of it, off again."""

    def __init__(self, coder: Coder, start_id: int | None, follows: bool) -> None:
        self._token_bytes, self._start_id = coder.token_bytes, start_id
        self._marks = frozenset(coder.special.values())
        self._parts = coder.start_space == "parts"
        self._at_start = self._due = not follows

    def __call__(self, id_: int) -> bytes:
        data = self._token_bytes(id_)
        if id_ in self._marks:
            # The start token stands before the text: its beginning is still to come.
            self._due = self._parts or (self._at_start and id_ == self._start_id)
        elif self._due and data:
            data, self._due = data.removeprefix(b" "), False
        self._at_start = False
        return data


def _ranked(folder: Path, vocabulary: Vocabulary) -> RankedCoder:
    import tiktoken

    try:
        encoding = tiktoken.Encoding(
            name=folder.name,
            pat_str=vocabulary.splitting.pattern,
            mergeable_ranks=vocabulary.ranks,
            special_tokens=vocabulary.special,
        )
    except ValueError as error:
        raise CorruptError(f"{folder} splits text by a broken pattern: {error}", "get the tokenizer again") from None
    return RankedCoder(encoding, vocabulary)


def encoding_names() -> list[str]:
    """The encodings that tiktoken knows by name."""
    import tiktoken

    return sorted(tiktoken.list_encoding_names())


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
