"""Output: what goes to which stream, and in what form."""

from __future__ import annotations

import io
import json

import pytest

from gptcli.cli.out import Output, harmless
from gptcli.errors import NotFoundError, UsageError


class Stream(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def terminal() -> Output:
    return Output(Stream(True), Stream(True))


@pytest.fixture
def pipe() -> Output:
    return Output(Stream(False), Stream(False))


def written(out: Output) -> tuple[str, str]:
    assert isinstance(out.stdout, Stream)
    assert isinstance(out.stderr, Stream)
    return out.stdout.getvalue(), out.stderr.getvalue()


NASTY = "a\x1b[31mred\x07\r\x00\x9b1m\x7f\u202egnp.exe\u2066 [red]x[/red] \t\n東🙂"


def test_text_is_exact_in_a_pipe_and_harmless_on_a_terminal(pipe: Output, terminal: Output) -> None:
    pipe.text(NASTY)
    assert written(pipe) == (NASTY, "")
    terminal.text(NASTY)
    shown = written(terminal)[0]
    assert shown == ("a\\x1b[31mred\\x07\\x0d\\x00\\x9b1m\\x7f\\u202egnp.exe\\u2066 [red]x[/red] \t\n東🙂")


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), 0x202A, 0x202E, 0x2066, 0x2069])
def test_every_control_character_is_shown(code: int) -> None:
    shown = harmless(chr(code))
    if chr(code) in "\n\t":
        assert shown == chr(code)
    else:
        assert shown == (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def test_letters_of_all_scripts_are_left_alone() -> None:
    text = "naïve Ω 東京 🙂 e\u0301 ‘’ –"
    assert harmless(text) == text


def test_a_line_is_ended_on_a_terminal_alone_and_only_when_it_is_open(pipe: Output, terminal: Output) -> None:
    for text, ended in (("open", "open\n"), ("closed\n", "closed\n"), ("", "")):
        for out, wanted in ((Output(Stream(True), Stream(True)), ended), (Output(Stream(False), Stream(False)), text)):
            out.text(text)
            out.end_line()
            assert written(out)[0] == wanted
    terminal.text("open")
    terminal.text("")
    terminal.end_line()
    assert written(terminal)[0] == "open\n"
    terminal.end_line()
    assert written(terminal)[0] == "open\n"


def test_records_are_lines_of_exact_json(pipe: Output) -> None:
    pipe.record({"text": NASTY, "float": 0.1 + 0.2, "small": 1e-300})
    pipe.record({"line": "a\nb\u2028"})
    first, second = written(pipe)[0].split("\n")[:-1]
    assert json.loads(first) == {"text": NASTY, "float": 0.30000000000000004, "small": 1e-300}
    assert json.loads(second) == {"line": "a\nb\u2028"}
    assert harmless(first) == first
    assert "東🙂" in first


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_does_not_have_is_not_written(pipe: Output, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        pipe.record({"value": value})
    assert written(pipe)[0] == ""


def test_talk_goes_to_stderr(pipe: Output) -> None:
    pipe.note("one")
    pipe.detail("two")
    pipe.stats("three")
    pipe.warn("four")
    assert written(pipe) == ("", "note: one\nthree\nwarning: four\n")


def test_a_quiet_user_is_told_what_was_asked_for_and_a_verbose_one_more() -> None:
    for options, said in (
        ({"quiet": True}, "stats\n"),
        ({"verbose": True}, "note: note\ndetail\nstats\nwarning: warning\n"),
    ):
        out = Output(Stream(False), Stream(False))
        out.configure(**options, color="auto")
        out.note("note")
        out.detail("detail")
        out.stats("stats")
        out.warn("warning")
        assert written(out) == ("", said)


def test_quiet_does_not_silence_errors() -> None:
    out = Output(Stream(False), Stream(False))
    out.configure(quiet=True, color="auto")
    out.error(NotFoundError("it is not here", "look there"))
    assert written(out) == ("", "error: it is not here\nhint: look there\n")


def test_an_error_is_two_lines_whatever_is_in_it(pipe: Output, terminal: Output) -> None:
    pipe.error(NotFoundError("a\nb\x1b[0m", "c\nd"))
    assert written(pipe) == ("", "error: a b\\x1b[0m\nhint: c d\n")
    terminal.text("half a line")
    terminal.error(NotFoundError("a", "b"))
    assert written(terminal)[1].startswith("\n")


def test_an_error_in_json(terminal: Output) -> None:
    terminal.configure(json_=True, color="always")
    terminal.error(NotFoundError("a\x1b\u202e東", "b"))
    said = written(terminal)[1]
    assert json.loads(said) == {"error": {"type": "not_found", "message": "a\x1b\u202e東", "hint": "b"}}
    assert harmless(said) == said


@pytest.mark.parametrize(
    ("terminal", "environment", "color", "colored"),
    [
        (True, {}, "auto", True),
        (False, {}, "auto", False),
        (True, {"NO_COLOR": "1"}, "auto", False),
        (True, {"NO_COLOR": ""}, "auto", True),
        (True, {"TERM": "dumb"}, "auto", False),
        (True, {}, "never", False),
        (False, {}, "always", True),
        (False, {"NO_COLOR": "1"}, "always", True),
        (True, {"NO_COLOR": "1"}, "never", False),
    ],
)
def test_colour(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], color: str, colored: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = Output(Stream(terminal), Stream(terminal))
    out.configure(color=color)
    assert out.colored() is colored
    assert out.style("x", "bold") == ("\x1b[1mx\x1b[0m" if colored else "x")
    assert (out.stripe("x\ny", 0) != "x\ny") is colored
    if colored:
        # No colour runs over the end of a line.
        assert all(line.endswith("\x1b[0m") for line in out.stripe("x\ny", 1).split("\n"))


def test_each_stream_decides_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Output(Stream(False), Stream(True))
    assert (out.on_terminal, out.talks_to_terminal) == (False, True)
    assert (out.colored(), out.colored(out.stderr)) == (False, True)
    out.note("x")
    out.data(out.style("y", "bold"))
    assert written(out) == ("y\n", "\x1b[2mnote: x\x1b[0m\n")


@pytest.mark.parametrize(
    "options",
    [{"json_": True, "format": "text"}, {"json_": True, "format": "csv"}, {"color": "red"}, {"format": "xml"}],
)
def test_contradictions_are_wrong_use(pipe: Output, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        pipe.configure(**{"color": "auto", **options})  # type: ignore[arg-type]


def test_nobody_to_talk_to_is_no_error() -> None:
    class Closed(Stream):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    out = Output(Stream(False), Closed(False))
    out.note("x")
    out.error(NotFoundError("x", "y"))
    assert written(out)[0] == ""
