"""``gptcli tokenize``: see, count, cut and split the tokens of a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli import options
from gptcli.cli.input import ERRORS, Source, sources
from gptcli.cli.out import Output, harmless
from gptcli.cli.tokens import visible
from gptcli.errors import CorruptError, LimitError, UsageError

if TYPE_CHECKING:
    from gptcli.text.tokenizer import Piece, Tokenizer


def _encodings(incomplete: str) -> list[str]:
    """What an encoding's name that is being typed may become."""
    from gptcli.text.tokenizer import encoding_names

    return options.one_of(*encoding_names())(incomplete)


def tokenize(
    ctx: typer.Context,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts, - for stdin; with --count also files.")
    ] = None,
    model: options.Model = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            "--encoding",
            "-e",
            metavar="NAME",
            help="A tiktoken encoding: cl100k_base, o200k_base, gpt2, ...",
            autocompletion=_encodings,
        ),
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="Only how many; rows like wc's for several files.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Ids, on a terminal too.")] = False,
    pieces: Annotated[bool, typer.Option("--pieces", help="One token a line: id, tab, text.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="The other way: ids to bytes.")] = False,
    truncate: Annotated[int | None, typer.Option("--truncate", metavar="N", help="The text of N tokens.")] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="head|tail|middle", help="Which part --truncate keeps.")
    ] = "head",
    split: Annotated[int | None, typer.Option("--split", metavar="N", help="The text in pieces of N tokens.")] = None,
    overlap: Annotated[int, typer.Option("--overlap", metavar="K", help="Tokens that pieces share.")] = 0,
    null: Annotated[bool, typer.Option("--null", "-0", help="End each piece of --split with a NUL byte.")] = False,
    max_: Annotated[int | None, typer.Option("--max", metavar="N", help="Fail (exit 4) if there are more.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line is a text of its own.")] = False,
    file: options.Files = None,
    no_stdin: options.NoStdin = False,
    strip: options.Strip = False,
    errors: options.Errors = "strict",
    special: options.Special = "text",
    pull: Annotated[bool, typer.Option("--pull", help="Download the encoding or model if it is not here.")] = False,
    offline: options.Offline = False,
) -> None:
    """See, count, cut and split the tokens of a text.

    On a terminal: the pieces in colour, with their ids. In a pipe: the ids, a line a text.
    """
    out: Output = ctx.obj
    options.choice("--errors", errors, ERRORS)
    if model and encoding and (typed := options.stronger(ctx, "model", "encoding")):
        model, encoding = (model, None) if typed == "model" else (None, encoding)
    options.choice("--special", special, ("text", "parse"))
    options.choice("--keep", keep, ("head", "tail", "middle"))
    options.refuse_offline(ctx, "pull")
    _check(count, ids, pieces, decode, truncate, split, overlap, null, max_, model, encoding)
    tokenizer = _open(model, encoding, pull, offline, out)
    arguments, named = _files_to_count(texts or [], count, out)
    found = sources(arguments, [*(file or []), *named], no_stdin=no_stdin, strip=strip, note=out.note)
    work = _Work(out, tokenizer, errors, special == "parse", max_)
    if decode:
        work.decode(found)
    elif count:
        work.count(found, lines)
    elif truncate is not None:
        work.truncate(found, truncate, keep, lines)
    elif split is not None:
        work.split(found, split, overlap, null, lines)
    else:
        work.show(found, lines, ids, pieces)


def _check(
    count: bool,
    ids: bool,
    pieces: bool,
    decode: bool,
    truncate: int | None,
    split: int | None,
    overlap: int,
    null: bool,
    max_: int | None,
    model: str | None,
    encoding: str | None,
) -> None:
    modes = {
        "--count": count,
        "--ids": ids,
        "--pieces": pieces,
        "--decode": decode,
        "--truncate": truncate is not None,
        "--split": split is not None,
    }
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} ask for different things", "give one of them")
    if model and encoding:
        raise UsageError("--model and --encoding both name a tokenizer", "give one of them")
    for name, value, least in (("--truncate", truncate, 0), ("--split", split, 1), ("--max", max_, 0)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value} is out of range", f"it should be {least} or more")
    if not 0 <= overlap < (split or 1):
        raise UsageError(f"--overlap {overlap} is out of range", "it should be less than --split")
    if null and split is None:
        raise UsageError("-0 ends the pieces of --split, and there is none", "add --split N")


def _open(model: str | None, encoding: str | None, pull: bool, offline: bool, out: Output) -> Tokenizer:
    from gptcli.spec.library import hub_is_offline
    from gptcli.text.tokenizer import Tokenizer

    if encoding:
        return Tokenizer.from_encoding(encoding, download=pull and not (offline or hub_is_offline()))
    from gptcli.cli.opening import find, open_tokenizer

    if pull and model:
        from gptcli.cli.models_pull import get_if_missing

        get_if_missing(model, offline=offline, out=out)
    return open_tokenizer(find(model), out)


def _files_to_count(texts: Sequence[str], count: bool, out: Output) -> tuple[list[str], list[Path]]:
    """With --count, arguments that name files are those files; raises UsageError when only some do."""
    named = [text for text in texts if text != "-" and _is_file(text)]
    if not count or not named:
        if count and any(re.fullmatch(r"\S+[./]\S+", text) for text in texts):
            out.note("there is no such file; the argument itself was counted")
        return list(texts), []
    if other := [text for text in texts if text not in named and text != "-"]:
        raise UsageError(f"{named[0]} is a file and {other[0]!r} is not", "name files with -f")
    return [text for text in texts if text == "-"], [Path(text) for text in named]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or a NUL in it
        return False


class _Work:
    """One tokenizer at work on some documents."""

    def __init__(self, out: Output, tokenizer: Tokenizer, errors: str, special: bool, most: int | None) -> None:
        self.out, self.tokenizer, self.errors, self.special, self.most = out, tokenizer, errors, special, most

    def ids(self, chunks: Iterable[str]) -> Iterator[list[int]]:
        """The ids of one document in pieces; with ``--max`` all at once, so that nothing is shown that should fail."""
        groups = self.tokenizer.encode_stream(chunks, special=self.special)
        if self.most is None:
            yield from groups
            return
        held: list[int] = []
        for group in groups:
            held += group
            self._check_most(len(held))
        yield held

    def _check_most(self, count: int) -> None:
        if self.most is not None and count > self.most:
            raise LimitError(f"there are more than {self.most:,} tokens", "shorten the text, or raise --max")

    def documents(self, found: Sequence[Source], lines: bool) -> Iterator[Iterable[str]]:
        """The documents' chunks: each source, or each of its lines."""
        for source in found:
            if lines:
                yield from ([line] for line in source.lines(self.errors))
            else:
                yield source.chunks(self.errors)

    def show(self, found: Sequence[Source], lines: bool, ids: bool, pieces: bool) -> None:
        if (ids or not self.out.on_terminal) and not pieces and not self.out.json:
            self._show_ids(found, lines)
            return
        for chunks in self.documents(found, lines):
            groups = self.ids(chunks)
            if self.out.json:
                self._write_json(groups)
            elif pieces:
                for piece in self._pieces(groups):
                    self.out.data(f"{piece.id}\t{visible(piece.data)}")
            else:
                self._show_pieces(groups)

    def _show_ids(self, found: Sequence[Source], lines: bool) -> None:
        """A line a document; with ``--max`` only once it is known to be within."""
        words = _Words()
        shown: list[str] = []
        count, separator = 0, ""
        for group, last in self._groups(found, lines):
            count += len(group)
            self._check_most(count)
            if group:
                shown += [separator, " ".join(map(words.__getitem__, group))]
                separator = " "
            if self.most is None or last:
                self.out.data("".join(shown), end="\n" if last else "")
                shown.clear()
            if last:
                count, separator = 0, ""

    def _groups(self, found: Sequence[Source], lines: bool) -> Iterator[tuple[Sequence[int], bool]]:
        """The ids of the documents in pieces, and whether a piece is the last of its document."""
        if lines:  # too short to be shared out
            encode = self.tokenizer.encode_array
            return ((encode(line, special=self.special), True) for [line] in self.documents(found, lines))
        return self.tokenizer.encode_streams(self.documents(found, lines), special=self.special)

    def count(self, found: Sequence[Source], lines: bool) -> None:
        numbers = self._counts(found, lines)
        if lines:
            for number in numbers:
                self.out.record(self._counted(number)) if self.out.json else self.out.data(str(number))
            return
        counts = []
        for source, number in zip(found, numbers, strict=True):
            counts.append((number, source.name))
            if self.out.json:
                self.out.record(self._counted(number) | {"name": source.name})
        if self.out.json:
            return
        if len(counts) == 1:
            self.out.data(str(counts[0][0]))
            return
        counts.append((sum(number for number, _ in counts), "total"))
        digits = len(str(counts[-1][0]))
        for number, name in counts:
            self.out.data(f"{number:>{digits}} {harmless(name)}")

    def _counts(self, found: Sequence[Source], lines: bool) -> Iterator[int]:
        number = 0
        for group, last in self._groups(found, lines):
            number += len(group)
            self._check_most(number)
            if last:
                yield number
                number = 0

    def decode(self, found: Sequence[Source]) -> None:
        for source in found:
            ids = _parse_ids(source, self.errors)
            self._check_most(len(ids))
            if self.out.json:
                text = self.tokenizer.decode(ids)
                self.out.record(self._counted(len(ids)) | {"ids": ids, "text": text})
            elif self.out.on_terminal:
                self.out.text(self.tokenizer.decode(ids))
            else:
                self.out.raw(self.tokenizer.decode_bytes(ids))
        self.out.end_line()

    def truncate(self, found: Sequence[Source], size: int, keep: str, lines: bool) -> None:
        from gptcli.text.cut import truncate

        for chunks in self.documents(found, lines):
            text = truncate(self.tokenizer, chain.from_iterable(self.ids(chunks)), size, keep, special=self.special)
            if self.out.json:
                self.out.record(self._counted(len(self.tokenizer.encode(text, special=self.special))) | {"text": text})
            else:
                self.out.text(text + "\n" if lines else text)
        self.out.end_line()

    def split(self, found: Sequence[Source], size: int, overlap: int, null: bool, lines: bool) -> None:
        from gptcli.text.cut import split

        for chunks in self.documents(found, lines):
            every = chain.from_iterable(self.ids(chunks))
            for index, text in enumerate(split(self.tokenizer, every, size, overlap, special=self.special)):
                number = len(self.tokenizer.encode(text, special=self.special))
                if number > size:
                    self.out.note(f"one character is {number} tokens, more than {size}; it was kept whole")
                if self.out.json:
                    self.out.record({"index": index} | self._counted(number) | {"text": text})
                else:
                    self.out.text(text)
                    self.out.data("\0" if null else "\n", end="")

    def _counted(self, number: int) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.name, "count": number}

    def _pieces(self, groups: Iterable[list[int]]) -> Iterator[Piece]:
        return self.tokenizer.pieces(chain.from_iterable(groups))

    def _write_json(self, groups: Iterable[list[int]]) -> None:
        """One object, written as it comes: a text may be larger than memory."""
        groups = iter(groups)
        groups = chain([next(groups, [])], groups)  # what is wrong from the start is told before anything is written
        self.out.data(f'{{"tokenizer": {json.dumps(self.tokenizer.name)}, "tokens": [', end="")
        number = 0
        for piece in self._pieces(groups):
            token = {
                "id": piece.id,
                "text": piece.data.decode("utf-8", errors="replace"),
                "bytes": piece.data.hex(),
                "start": piece.start,
                "end": piece.end,
            }
            self.out.data((", " if number else "") + self.out.encoded(token), end="")
            number += 1
        self.out.data(f'], "count": {number}}}')

    def _show_pieces(self, groups: Iterable[list[int]]) -> None:
        """Coloured pieces, then the ids in the same colours, then the count."""
        shown = list(self._pieces(groups))
        colored = self.out.colored()
        text = [self.out.stripe(part, i) for i, part in enumerate(_whole_pieces(shown))]
        self.out.data(("" if colored else "|").join(text))
        self.out.data(" ".join(self.out.stripe(str(piece.id), i) for i, piece in enumerate(shown)))
        self.out.data(self.out.style(f"{len(shown):,} tokens ({self.tokenizer.name})", "dim"))


class _Words(dict[int, str]):
    """Ids as they are written, each made once."""

    def __missing__(self, id_: int) -> str:
        self[id_] = word = str(id_)
        return word


def _whole_pieces(pieces: Sequence[Piece]) -> Iterator[str]:
    """What to show for each token; a character of several tokens shows at its last, its first bytes as dots before."""
    pending = b""
    for piece in pieces:
        pending += piece.data
        try:
            text, pending = pending.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                text, pending = pending[: error.start].decode("utf-8") + "·", pending[error.start :]
            else:
                text, pending = pending.decode("utf-8", errors="replace"), b""
        yield harmless(text)


def _parse_ids(source: Source, errors: str) -> list[int]:
    """Numbers separated by white space or commas. Raises CorruptError that names what is none."""
    words = re.split(r"[\s,\[\]]+", source.text(errors))
    ids = []
    for word in words:
        if not word:
            continue
        if not (word.isascii() and word.isdigit() and len(word) < 20):
            raise CorruptError(f"{source.name}: {word[:40]!r} is not a token id", "ids are whole numbers from 0")
        ids.append(int(word))
    return ids
