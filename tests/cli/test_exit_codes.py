"""Exit codes and errors, each by a real situation: two lines on stderr, or one JSON object, and nothing on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gptcli import __version__
from tests.cli.conftest import Run
from tests.conftest import PATIENCE

Gptcli = Callable[..., "subprocess.CompletedProcess[bytes]"]
ROOT = Path(__file__).parent.parent.parent


class Situation(NamedTuple):
    """A command line, ``{here}`` and ``{tiny}`` to be filled in, and how it should end."""

    name: str
    args: str
    code: int
    type: str
    told: str
    stdin: bytes | None = None


SITUATIONS = [
    Situation("option", "generate --bogus x", 2, "usage", "--bogus"),
    Situation("value", "generate -n many x", 2, "usage", "--max-tokens"),
    Situation("range", "tokenize --split 0 -m {tiny} x", 2, "usage", "--split 0"),
    Situation("nothing", "tokenize -m {tiny}", 2, "usage", "nothing to work on"),
    Situation("command", "genrate x", 2, "usage", "generate"),
    Situation("a text for a command", "'Once upon' x", 2, "usage", "gptcli generate 'Once upon' continues it"),
    Situation("command below", "models lst", 2, "usage", "list"),
    Situation("missing argument", "train -o {here}/new", 2, "usage", "DATA"),
    Situation("missing option", "train {here}/text", 2, "usage", "--out"),
    Situation("too many arguments", "generate a b", 2, "usage", "b"),
    Situation("format", "models list --format csv", 2, "usage", "csv"),
    Situation("color", "models list --color maybe", 2, "usage", "maybe"),
    Situation("unknown model", "tokenize -m gpt2-medum x", 3, "not_found", "did you mean gpt2-medium"),
    Situation("not cached", "tokenize -m nobody/nothing x", 3, "not_found", "gptcli models pull nobody/nothing"),
    Situation("empty folder", "tokenize -m {here} x", 3, "not_found", "config.json"),
    Situation("corrupt folder", "count-params {here}/corrupt", 3, "corrupt", "config.json"),
    Situation("corrupt weights", "count-params {here}/cut", 3, "corrupt", "model.safetensors"),
    Situation("unsupported", "count-params {here}/mamba", 3, "unsupported", "mamba"),
    Situation("UTF-8", "tokenize -m {tiny}", 3, "corrupt", "offset 3", b"abc\xff"),
    Situation("file", "tokenize -m {tiny} -f {here}/none", 3, "not_found", "none"),
    Situation("file is a folder", "tokenize -m {tiny} -f {here}", 3, "corrupt", "directory"),
    Situation("encoding", "tokenize -e no_base x", 3, "not_found", "no_base"),
    Situation("max", "tokenize -m {tiny} --max 1 Once", 4, "limit", "--max"),
    Situation("changed file", "models verify {here}/changed", 6, "check", "model.safetensors"),
    Situation("below a file", "train {here}/text -o {here}/text/new --vocab-size 300", 1, "output", "text/new"),
]

# The same, but slower: these start torch.
SLOW = [
    Situation("context", "generate -m {tiny} " + "x" * 100, 4, "limit", "context"),
    Situation("device", "generate -m {tiny} --device cuda:99 x", 5, "resource", "--device cpu"),
    Situation("training data", "train {here}/none -o {here}/new --vocab-size 300", 3, "not_found", "none"),
]


@pytest.fixture
def arguments(tmp_path: Path, tiny_folder: Path) -> Callable[[Situation], list[str]]:
    """Make the folders that the situations speak of."""
    here = tmp_path / "here"
    for name in ("corrupt", "cut", "mamba", "changed"):
        (here / name).mkdir(parents=True)
        for file in tiny_folder.iterdir():
            (here / name / file.name).write_bytes(file.read_bytes())
    (here / "text").write_text("Once upon a time")
    (here / "corrupt" / "config.json").write_text('{"model_type": ')
    (here / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    data = (tiny_folder / "model.safetensors").read_bytes()
    (here / "cut" / "model.safetensors").write_bytes(data[:-100])
    (here / "changed" / "SHA256SUMS").write_text("0" * 64 + "  model.safetensors\n")
    return lambda situation: shlex.split(situation.args.format(here=here, tiny=tiny_folder))


def check(code: int, out: bytes, err: bytes, situation: Situation) -> None:
    """Two lines on stderr, and nothing on stdout."""
    assert code == situation.code, err
    assert out == b""
    lines = err.decode().splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert len(lines[0]) > len("error: ")
    assert len(lines[1]) > len("hint: ")
    assert situation.told in err.decode()


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_an_error_is_two_lines_and_a_code(
    gptcli: Gptcli, arguments: Callable[[Situation], list[str]], situation: Situation
) -> None:
    done = gptcli(*arguments(situation), stdin=situation.stdin)
    check(done.returncode, done.stdout, done.stderr, situation)


@pytest.mark.parametrize("situation", SLOW, ids=lambda situation: situation.name)
def test_an_error_behind_torch_is_the_same(
    run: Run, arguments: Callable[[Situation], list[str]], situation: Situation
) -> None:
    check(*run(*arguments(situation), "-q"), situation)


@pytest.mark.parametrize(
    "situation",
    [situation for situation in [*SITUATIONS, *SLOW] if "--format" not in situation.args],
    ids=lambda situation: situation.name,
)
def test_an_error_in_json_is_one_object(
    run: Run, arguments: Callable[[Situation], list[str]], situation: Situation
) -> None:
    done = run(*arguments(situation), "--json", stdin=situation.stdin)
    assert (done.code, done.out) == (situation.code, b""), done.err
    told = [line for line in done.err.splitlines() if not line.startswith((b"note: ", b"warning: "))]
    assert len(told) == 1
    value = json.loads(told[0])
    assert value.keys() == {"error"}
    assert value["error"].keys() == {"type", "message", "hint"}
    assert value["error"]["type"] == situation.type
    assert value["error"]["message"]
    assert value["error"]["hint"]
    assert situation.told in value["error"]["message"] + value["error"]["hint"]


@pytest.mark.parametrize("option", [["--format", "json"], ["--format=json"]], ids=" ".join)
@pytest.mark.parametrize("args", ["count-params no-such-model", "generate --bogus", "genrate"])
def test_format_json_is_for_errors_too(run: Run, args: str, option: list[str]) -> None:
    done = run(*args.split(), *option)
    assert (done.code, done.out) in ((2, b""), (3, b""))
    assert json.loads(done.err).keys() == {"error"}


def test_json_that_is_text_asks_for_nothing(run: Run) -> None:
    assert run("tokenize", "--bogus", "--", "--json").err.startswith(b"error: ")


def test_0_and_an_answer(gptcli: Gptcli, tiny_folder: Path) -> None:
    done = gptcli("generate", "-m", str(tiny_folder), "-n", "3", "--seed", "1", "Once")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["models", "--help"], ["tokenize", "-h"]], ids=" ".join)
def test_help_is_an_answer(run: Run, args: list[str]) -> None:
    done = run(*args)
    assert (done.code, done.err) == (0, b"")
    assert done.out.startswith(b"Usage: gptcli")


def test_version_is_an_answer(run: Run) -> None:
    assert run("--version") == (0, f"gptcli {__version__}\n".encode(), b"")


@pytest.mark.parametrize("args", [[], ["models"]], ids=["gptcli", "models"])
def test_no_command_shows_the_commands_and_is_wrong_use(run: Run, args: list[str]) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, b"")
    assert b"Usage: gptcli" in done.err
    assert (b"generate" if not args else b"verify") in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("command", ["tokenize", "count-params", "generate", "models show"])
def test_an_output_that_can_not_be_written_is_1(tiny_folder: Path, command: str, option: list[str]) -> None:
    args = [*command.split(), *([str(tiny_folder)] if command in ("count-params", "models show") else ["Once"])]
    if command in ("tokenize", "generate"):
        args += ["-m", str(tiny_folder), "-q"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", *args, *option],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=PATIENCE,
        )
    assert done.returncode == 1
    if option:
        assert json.loads(done.stderr)["error"]["type"] == "output"
    else:
        assert [line.partition(":")[0] for line in done.stderr.decode().splitlines()] == ["error", "hint"]


def test_a_device_that_is_not_there_is_5(run: Run, tiny_folder: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("generate", "-m", tiny_folder, "--device", "cuda", "x", "--json")
    assert (done.code, done.out) == (5, b"")
    assert json.loads(done.err)["error"]["type"] == "resource"


def test_memory_that_is_not_there_is_5(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's CPU allocator says when it is out of memory, asked for more than any machine has."""
    import torch

    monkeypatch.setattr("gptcli.core.build.open_model", lambda *_, **__: torch.empty(2**60))
    done = run("generate", "-m", tiny_folder, "x", "--json")
    assert done.code == 5
    assert json.loads(done.err)["error"]["type"] == "resource"


def test_ctrl_c_is_130_and_keeps_what_was_made(run: Run, tiny_folder: Path) -> None:
    args = ["generate", "-m", str(tiny_folder), "--slide", "--ignore-eos", "--seed", "5", "-q", "Once"]
    whole = run(*args, "-n", "300").out
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", *args, "-n", "-1"],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert said == b""
    kept = first + rest
    assert kept
    assert kept[: len(whole)] == whole[: len(kept)]
    kept.decode("utf-8")  # nothing was cut within a character


def test_ctrl_c_while_reading_is_130(tiny_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "tokenize", "-m", str(tiny_folder), "--lines", "--ids"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"Once\n")
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert (first + rest).split()
    assert b"Traceback" not in said


def test_ctrl_c_on_a_terminal_ends_the_shells_loop_too(tiny_folder: Path, tmp_path: Path) -> None:
    """A shell goes on with its loop unless what it ran has died of the signal."""
    pty = pytest.importorskip("pty")
    generating = f"{sys.executable} -m gptcli generate Once -n -1 --slide --ignore-eos --no-warm -m {tiny_folder}"
    # The shell is a child of the terminal's session, so the key's signal reaches it and what it runs.
    script = f"for i in 1 2; do echo turn >> {tmp_path}/turns; {generating}; done; echo after >> {tmp_path}/turns"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execvp("bash", ["bash", "-c", script])
    shown = b""
    while len(shown) < 400:  # it is generating
        shown += os.read(terminal, 100)
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # the terminal's end, on Linux
        while os.read(terminal, 1 << 16):
            pass
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert (tmp_path / "turns").read_text() == "turn\n"
    assert os.waitstatus_to_exitcode(status) in (-signal.SIGINT, 130)


def test_a_fault_is_1_and_shows_its_traceback_only_to_who_debugs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr("gptcli.cli.count_params.find_config", broken)
    done = run("count-params", "gpt2")
    assert (done.code, done.out) == (1, b"")
    assert [line.partition(":")[0] for line in done.err.decode().splitlines()] == ["error", "hint"]
    assert b"a wheel came off" in done.err
    assert b"GPTCLI_DEBUG=1" in done.err
    monkeypatch.setenv("GPTCLI_DEBUG", "1")
    told = run("count-params", "gpt2")
    assert told.code == 1
    assert b"Traceback" in told.err
    assert b"a wheel came off" in told.err


def test_debug_shows_the_traceback_of_an_error_too(gptcli: Gptcli) -> None:
    done = gptcli("count-params", "no-such-model", env={"GPTCLI_DEBUG": "1"})
    assert done.returncode == 3
    assert b"Traceback" in done.stderr
    assert b"error: " in done.stderr
    assert b"Traceback" not in gptcli("count-params", "no-such-model", env={"GPTCLI_DEBUG": "0"}).stderr


def test_names_in_errors_can_not_drive_a_terminal(run: Run) -> None:
    done = run("tokenize", "-m", "\x1b[2Jevil\r\nname", "x")
    assert done.code == 3
    assert b"\x1b" not in done.err
    assert b"\r" not in done.err
    assert len(done.err.splitlines()) == 2


def test_what_has_loaded_torch_ends_without_the_interpreter_being_taken_down() -> None:
    """What ends with the interpreter is never called: it takes long, and gloo's threads may need it. All else is."""
    script = """
import atexit, sys
from gptcli.__main__ import end

class Last:
    def __del__(self):
        print("taken down", flush=True)

last = Last()
atexit.register(print, "said goodbye")
if sys.argv[1] == "torch":
    sys.modules["torch"] = sys
print("done")
end(4)
"""
    ends = {}
    for who in ("torch", "alone"):
        done = subprocess.run(
            [sys.executable, "-c", script, who], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (done.returncode, done.stderr) == (4, "")
        ends[who] = done.stdout.splitlines()
    assert ends == {"torch": ["done", "said goodbye"], "alone": ["done", "said goodbye", "taken down"]}
