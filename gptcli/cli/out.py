"""Output: the only voice of gptcli. stdout carries the answer or the data and nothing else; all talk goes to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from gptcli.errors import GptcliError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

# What could move the cursor, change colours or hide text: control characters but newline and tab, and the marks that
# reorder text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Pieces of a text in turn, in colours that read on dark and light.
_STRIPES = ("\x1b[44;97m", "\x1b[42;30m", "\x1b[43;30m", "\x1b[45;97m", "\x1b[46;30m")
_RESET = "\x1b[0m"
_MARKS = {"bold": "\x1b[1m", "dim": "\x1b[2m", "error": "\x1b[1;31m", "hint": "\x1b[36m"}


class Output:
    """The streams of one command, and what the user asked of them."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, json: bool = False) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.json = json
        self.quiet = False
        self.verbose = False
        self.color = "auto"
        self._line_open = False
        self._display: Console | None = None

    @classmethod
    def standard(cls, *, json: bool = False) -> Output:
        """Over the process's own streams, in UTF-8 whatever the locale says; a closed one swallows what it is given."""
        streams = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
        for stream in streams:
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        return cls(*streams, json=json)

    def configure(
        self,
        *,
        json_: bool = False,
        format: str | None = None,
        formats: Sequence[str] | None = ("text", "json"),
        quiet: bool = False,
        verbose: bool = False,
        color: str,
    ) -> None:
        """Take in the options that every command has; ``formats`` None leaves the format's check to the command.

        Raises UsageError when they contradict each other.
        """
        if json_ and format not in (None, "json"):
            raise UsageError(f"--json and --format {format} contradict each other", "give one of them")
        if color not in ("auto", "always", "never"):
            raise UsageError(f"--color {color!r} is not a choice", "use auto, always or never")
        if formats is not None and format is not None and format not in formats:
            raise UsageError(f"--format {format!r} is not a choice", "use text or json")
        self.json = json_ or format == "json"
        self.quiet, self.verbose, self.color = quiet, verbose, color

    def silence(self) -> None:
        """Say nothing from now on but errors: another process speaks for this one."""
        self.quiet, self.verbose, self.json = True, False, False
        self.stdout = open(os.devnull, "w")  # noqa: SIM115

    @property
    def on_terminal(self) -> bool:
        """Whether a person reads stdout directly."""
        return self.stdout.isatty()

    @property
    def talks_to_terminal(self) -> bool:
        """Whether a person reads stderr directly."""
        return self.stderr.isatty()

    def colored(self, stream: TextIO | None = None) -> bool:
        """Whether colour may be used on a stream, stdout by default."""
        if self.color != "auto":
            return self.color == "always"
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return (stream or self.stdout).isatty() and not plain

    def data(self, text: str, *, end: str = "\n") -> None:
        """Write our own data (numbers, ids, tables) to stdout."""
        self.stdout.write(text + end)
        self._line_open = not (text + end).endswith("\n")

    def text(self, text: str, *, flush: bool = True) -> None:
        """Write model text, or text from outside, to stdout: exact off a terminal, harmless on one."""
        self.stdout.write(harmless(text) if self.on_terminal else text)
        if text:
            self._line_open = not text.endswith("\n")
        if flush:
            self.stdout.flush()

    def painted(self, text: str) -> None:
        """Write to stdout text that ``harmless`` has seen, where a person reads it, with colours of our own around."""
        self.stdout.write(text)
        if text:
            self._line_open = not text.endswith("\n")
        self.stdout.flush()

    def part(self) -> None:
        """On a terminal, let talk begin on a line of its own, with not a byte more on stdout if stderr is there too."""
        if self.on_terminal and self._line_open and self.talks_to_terminal:
            self.stdout.flush()
            self._line_open = False
            self._say("")
        self.end_line()

    def end_line(self) -> None:
        """On a terminal, end the line if it is open, so that the prompt stands on its own; off one, add nothing."""
        if self.on_terminal and self._line_open:
            self.data("")

    def raw(self, data: bytes) -> None:
        """Write bytes that need not be text to stdout."""
        self.stdout.flush()
        self.stdout.buffer.write(data)
        self.stdout.flush()

    def record(self, value: Any) -> None:
        """Write one JSON object as a line."""
        self.stdout.write(self.encoded(value) + "\n")
        self.stdout.flush()

    def encoded(self, value: Any) -> str:
        """A value as JSON on one line, floats as they are."""
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # Control characters beyond ASCII's are legal in JSON, but not harmless on a terminal.
        return _UNSAFE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

    def stripe(self, text: str, number: int) -> str:
        """A piece of text in the ``number``-th colour of the stripes; plain where there is no colour."""
        if not self.colored():
            return text
        return "\n".join(
            f"{_STRIPES[number % len(_STRIPES)]}{line}{_RESET}" if line else "" for line in text.split("\n")
        )

    def style(self, text: str, mark: str, *, stderr: bool = False) -> str:
        """Text in bold, dim, error or hint; plain where there is no colour."""
        return f"{_MARKS[mark]}{text}{_RESET}" if self.colored(self.stderr if stderr else self.stdout) else text

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console on one of the streams."""
        from rich.console import Console

        stream = self.stderr if stderr else self.stdout
        color = self.colored(stream)
        return Console(file=stream, no_color=not color, force_terminal=True if color else None, highlight=False)

    def note(self, message: str) -> None:
        """Say something on stderr that a quiet user does without."""
        if not self.quiet:
            self._say(self.style(f"note: {harmless(message)}", "dim", stderr=True))

    def detail(self, message: str) -> None:
        """Say something on stderr to who asked for detail."""
        if self.verbose:
            self._say(self.style(harmless(message), "dim", stderr=True))

    def stats(self, message: str) -> None:
        """Say on stderr what was asked for by its own option, quiet or not."""
        self._say(harmless(message))

    def talk(self, line: str) -> None:
        """Say a line of our own making, coloured or not, on stderr; a quiet user does without."""
        if not self.quiet:
            self._say(line)

    def warn(self, message: str) -> None:
        """Say on stderr that something is off, though not wrong."""
        if not self.quiet:
            self._say(f"{self.style('warning:', 'bold', stderr=True)} {harmless(message)}")

    def error(self, error: GptcliError) -> None:
        """Say what happened and what to do, as two lines or as one JSON object."""
        with contextlib.suppress(OSError, ValueError):
            self.stdout.flush()
        if self.json:
            told = {"error": {"type": error.type, "message": error.message, "hint": error.hint}}
            self._say(json.dumps(told, ensure_ascii=True))
            return
        if self._line_open and self.on_terminal:
            self._say("")
        self._say(f"{self.style('error:', 'error', stderr=True)} {harmless(_one_line(error.message))}")
        if error.hint:
            self._say(f"{self.style('hint:', 'hint', stderr=True)} {harmless(_one_line(error.hint))}")

    def interrupted(self) -> None:
        """After Ctrl-C: what was made stays; the terminal's line ends."""
        with contextlib.suppress(OSError, ValueError):
            self.stdout.flush()
            if self.talks_to_terminal:
                self._say("")

    def close(self) -> None:
        """Hand over the last bytes. Raises OSError when that fails."""
        self.stdout.flush()

    def abandon(self) -> None:
        """Nobody reads stdout any more: let what is left go to nowhere, so that nothing complains at exit."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stdout.fileno())
            os.close(nowhere)

    @contextlib.contextmanager
    def progress(self, columns: Sequence[Any]) -> Iterator[Any]:
        """A rich progress display on stderr, shown only to a person."""
        from rich.progress import Progress

        with Progress(
            *columns,
            console=self.console(stderr=True),
            transient=True,
            disable=self.quiet or not self.talks_to_terminal,
        ) as shown:
            self._display = None if shown.disable else shown.console
            try:
                yield shown
            finally:
                self._display = None

    @contextlib.contextmanager
    def live(self, picture: Any, *, per_second: float = 1.0) -> Iterator[bool]:
        """Keep a rich renderable drawn at the bottom of a person's terminal, on stderr, and take it away at the end.

        Yields whether it is drawn at all: not in a pipe, not in JSON, not to a quiet user, not on a dumb terminal.
        Other talk goes above it. A picture costs some milliseconds that the work below goes without: few a second.
        """
        console = self.console(stderr=True)
        if self.quiet or self.json or not self.talks_to_terminal or console.is_dumb_terminal:
            yield False
            return
        from gptcli.cli.live import keep_drawn

        with keep_drawn(picture, console, per_second):
            self._display = console
            try:
                yield True
            finally:
                self._display = None

    def _say(self, line: str) -> None:
        if self._display is not None:  # above the bar, which is drawn anew
            from rich.text import Text

            with contextlib.suppress(OSError, ValueError):
                self._display.print(Text.from_ansi(line), soft_wrap=True)
            return
        with contextlib.suppress(OSError, ValueError):
            self.stderr.write(line + "\n")
            self.stderr.flush()


def harmless(text: str) -> str:
    """Text whose control characters are shown, not obeyed: ``\\x1b`` for an escape."""
    return _UNSAFE.sub(lambda match: _shown(ord(match[0])), text)


def _shown(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _one_line(text: str) -> str:
    return " ".join(text.split("\n"))
