"""Input: what a command is to work on, from arguments, files and standard input, as the contract orders it."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.cli.options import choice
from gptcli.errors import CorruptError, NotFoundError, UsageError

if TYPE_CHECKING:
    from gptcli.cli.out import Output

ERRORS = ("strict", "replace", "skip")
_READ = 1 << 20
# Seconds after which somebody who gave a text, and left a pipe open beside it, is told what is waited for.
_PATIENCE = 1.0


@dataclass(frozen=True)
class Source:
    """One document that can be read: standard input, a file, or an argument's bytes."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    strip: bool = False
    note: Callable[[str], None] | None = None  # says that standard input is waited for, where nobody may know

    @property
    def is_stdin(self) -> bool:
        return self.path is None and self.data is None

    def size(self) -> int | None:
        """Its bytes, where that is known before it is read: not of a pipe."""
        if self.data is not None:
            return len(self.data)
        try:
            found = os.fstat(sys.stdin.fileno()) if self.path is None else self.path.stat()
        except (AttributeError, OSError, ValueError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def chunks(self, errors: str = "strict") -> Iterator[str]:
        """The text in pieces; raises CorruptError for bytes that are not UTF-8, with their offset in bytes."""
        decoder = _Utf8(self.name, errors)
        held = ""
        for block in self._blocks():
            text = held + decoder.push(block)
            # The last newline is known only at the end, so a final one waits.
            held = "\n" if self.strip and text.endswith("\n") else ""
            yield text[: len(text) - len(held)]
        yield decoder.finish()

    def text(self, errors: str = "strict") -> str:
        """The whole text."""
        return "".join(self.chunks(errors))

    def lines(self, errors: str = "strict") -> Iterator[str]:
        """The text's lines, without their newlines."""
        begun: list[str] = []  # a line in its pieces, joined once
        for chunk in self.chunks(errors):
            *whole, rest = chunk.split("\n")
            for line in whole:
                yield "".join([*begun, line])
                begun = []
            if rest:
                begun.append(rest)
        if begun:
            yield "".join(begun)

    def _blocks(self) -> Iterator[bytes]:
        if self.data is not None:
            yield self.data
            return
        try:
            if self.path is None:
                if self.note is not None and stdin_is_idle(_PATIENCE):
                    self.note("waiting for standard input; --no-stdin does without")
                while block := os.read(sys.stdin.fileno(), _READ):  # what is there, without waiting for more
                    yield block
            else:
                with self.path.open("rb") as stream:
                    while block := stream.read(_READ):
                        yield block
        except FileNotFoundError:
            raise NotFoundError(f"there is no file {self.name}", "check the path") from None
        except OSError as error:
            raise CorruptError(f"{self.name} can't be read: {error.strerror}", "check the path") from None


def sources(
    arguments: Sequence[str],
    files: Sequence[Path] = (),
    *,
    no_stdin: bool = False,
    strip: bool = False,
    required: bool = True,
    note: Callable[[str], None] | None = None,
) -> list[Source]:
    """The documents of a command: standard input first, then files, then arguments.

    Standard input is read if an argument or file is ``-``, or if it is a pipe, a file or a socket. Where it is read
    beside a text or a file, which may have been all that was meant, ``note`` is told when nothing comes. Raises
    UsageError when there is nothing to work on, or when ``-`` and ``--no-stdin`` contradict each other.
    """
    asked = "-" in arguments or Path("-") in files
    if asked and no_stdin:
        raise UsageError("- asks for standard input, and --no-stdin refuses it", "give one of them")
    if asked and sys.stdin is None:
        raise UsageError("standard input is closed", "give the text as an argument or with -f")
    unasked = note if (arguments or files) and not asked else None
    piped = asked or (not no_stdin and stdin_has_data())
    found = [Source("stdin", strip=strip, note=unasked)] if piped else []
    found += [Source(str(path), path=path) for path in files if path != Path("-")]
    found += [Source(f"argument {i}", data=os.fsencode(text)) for i, text in enumerate(arguments, 1) if text != "-"]
    if not found and required:
        raise UsageError("there is nothing to work on", "give a text, pipe one in, or name a file with -f")
    return found


def one_text(found: Sequence[Source], errors: str) -> str:
    """All documents joined into one text, nothing added between them."""
    choice("--errors", errors, ERRORS)
    return "".join(source.text(errors) for source in found)


def note_line_end(text: str, out: Output) -> None:
    """Tell a person whose piped text is one line, as of ``echo``, that its end is a part of what is gone on with."""
    if out.talks_to_terminal and text.endswith("\n") and text.count("\n") == 1 and text.strip():
        out.note("the end of the line counts as text; --strip leaves it out")


def stdin_has_data() -> bool:
    """Whether standard input is a pipe, a file or a socket: something meant to be read, not a terminal or /dev/null."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no real file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def stdin_is_idle(seconds: float = 0) -> bool:
    """Whether nothing more has come yet, nor comes within so many seconds, so that whoever reads would wait."""
    try:
        return not select.select([sys.stdin.fileno()], [], [], seconds)[0]
    except (OSError, ValueError):
        return False


class _Utf8:
    """Decodes UTF-8 piece by piece, knowing where in the whole it is."""

    def __init__(self, name: str, errors: str) -> None:
        self._name, self._mode = name, {"strict": "strict", "replace": "replace", "skip": "ignore"}[errors]
        self._rest = b""
        self._offset = 0

    def push(self, block: bytes) -> str:
        data = self._rest + block
        # Keep back what may be the beginning of a character: at most three bytes.
        end = len(data) - _unfinished(data)
        self._rest = data[end:]
        return self._decode(data[:end])

    def finish(self) -> str:
        data, self._rest = self._rest, b""
        return self._decode(data)

    def _decode(self, data: bytes) -> str:
        try:
            text = data.decode("utf-8", errors=self._mode)
        except UnicodeDecodeError as error:
            raise CorruptError(
                f"{self._name} is not UTF-8: byte 0x{data[error.start]:02x} at offset {self._offset + error.start:,}",
                "convert it, or read on with --errors replace or --errors skip",
            ) from None
        self._offset += len(data)
        return text


def _unfinished(data: bytes) -> int:
    """How many bytes at the end begin a character that is not all there."""
    for back in range(1, min(3, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 == 0x80:
            continue
        length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
        return back if back < length else 0
    return 0
