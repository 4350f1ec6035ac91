"""The warm process as a person meets it: started on demand, found by commands, gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from gptcli.cli.warm import start_process
from gptcli.errors import GptcliError
from gptcli.serve.client import Client, GoneError
from gptcli.serve.place import Place, claim, runtime_folder
from tests.conftest import PATIENCE, ROOT, Gptcli

Start = Callable[..., "subprocess.Popen[bytes]"]


def place_of(folder: Path) -> Place:
    return Place.of(runtime_folder(os.environ), folder)


def status_of(folder: Path) -> dict[str, Any]:
    return Client(place_of(folder), timeout=PATIENCE).get("/gptcli/status")


def line_with(text: bytes, stream: IO[bytes]) -> bytes:
    """The next line of a process that has a text in it; fails where the process ends before."""
    for line in stream:
        if text in line:
            return line
    raise AssertionError(f"no {text!r} before the end")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model of this test's own."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """``gptcli serve`` of the test's model, in float32, ready to answer."""
    running: list[subprocess.Popen[bytes]] = []

    def run(*options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gptcli", "serve", "-m", str(folder), *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
        running.append(process)
        assert process.stderr
        line_with(b"is warm at", process.stderr)
        return process

    yield run
    for process in running:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


# gptcli where reading one text fails as nobody expected.
FAILING = """
import sys
from gptcli.cli import main
from gptcli.text.tokenizer import Tokenizer
encode = Tokenizer.encode
def failing(self, text, **more):
    if "fail" in text:
        raise RuntimeError("it\\nbroke")
    return encode(self, text, **more)
Tokenizer.encode = failing
sys.exit(main())
"""


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_is_a_line_and_a_traceback_is_for_who_debugs(folder: Path, debug: bool) -> None:
    """Of a route of the API, and of one of our own, which uvicorn tells of."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPTCLI_DEBUG": str(int(debug))}
    command = [sys.executable, "-c", FAILING, "serve", "-m", str(folder), "--dtype", "float32"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env) as process:
        assert process.stderr
        line_with(b"is warm at", process.stderr)
        client = Client(place_of(folder), timeout=PATIENCE)
        for path, asked in (("/tokenize", {"prompt": "fail"}), ("/gptcli/complete", {"prefix": "fail"})):
            with pytest.raises(GptcliError):
                client.post(path, asked)
        client.post("/gptcli/stop", {})
        said = process.stderr.read().decode()
    assert said.count(r"RuntimeError('it\nbroke')") == (0 if debug else 2)
    assert ("Traceback" in said) == debug
    assert len(said.splitlines()) == 2 or debug


def test_a_started_process_is_told_of_no_setting_but_that_somebody_debugs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda command, **more: told.update(more["env"]))
    monkeypatch.setenv("GPTCLI_TEMPERATURE", "2")
    monkeypatch.setenv("GPTCLI_DEBUG", "1")
    start_process(place_of(folder), folder, {})
    assert {name: value for name, value in told.items() if name.startswith("GPTCLI_")} == {"GPTCLI_DEBUG": "1"}


@pytest.fixture
def gptcli(gptcli: Gptcli, folder: Path) -> Iterator[Gptcli]:
    """gptcli with the test's model; whatever it started ends with the test."""
    yield lambda *args, **more: gptcli(*args, **{**more, "env": {"GPTCLI_MODEL": str(folder), **more.get("env", {})}})
    held = claim(place_of(folder))
    if held is None:
        with suppress(ProcessLookupError):
            os.kill(int(place_of(folder).lock.read_text()), signal.SIGKILL)
    else:
        held.release()


SAME = [
    ("--seed", "1", "-n", "20"),
    ("--seed", "2", "-n", "12", "-t", "1.5", "--top-k", "7", "--top-p", "0.9", "--min-p", "0.01"),
    ("--seed", "3", "-n", "15", "--repetition-penalty", "1.4", "--logit-bias", "5:3", "--stop", "e"),
    ("-t", "0", "-n", "9", "--echo"),
    ("--seed", "4", "-n", "90", "--slide", "--ignore-eos"),
    ("--seed", "5", "--num-samples", "3", "-n", "8"),
]


def test_text_is_the_same_warm_and_cold(gptcli: Gptcli, start: Start, folder: Path) -> None:
    start()
    for options in SAME:
        warm = gptcli("generate", "Once upon", *options, "-v")
        cold = gptcli("generate", "Once upon", *options, "--no-warm")
        assert b"from the warm process" in warm.stderr
        assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout) == (0, cold.stdout), options
    assert status_of(folder)["requests"] == len(SAME) + 2  # three samples are three requests


def test_json_is_the_same_warm_and_cold_but_for_times(gptcli: Gptcli, start: Start) -> None:
    start()
    options = ("--seed", "1", "-n", "5", "--logprobs", "3", "--json", "--special", "parse")
    warm, cold = (
        json.loads(gptcli("generate", "<|endoftext|>a", *options, more).stdout) for more in ("--quiet", "--no-warm")
    )
    assert warm.pop("timing").keys() == cold.pop("timing").keys()
    warm_choices, cold_choices = warm.pop("logprobs"), cold.pop("logprobs")
    assert warm == cold
    for one, other in zip(warm_choices, cold_choices, strict=True):
        assert one.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
        for choice, same in zip(one.pop("top"), other.pop("top"), strict=True):
            assert choice.pop("logprob") == pytest.approx(same.pop("logprob"), abs=1e-4)
            assert choice == same
        assert one == other


def test_predict_is_the_same_warm_and_cold(gptcli: Gptcli, start: Start) -> None:
    start()
    for options in (("-t", "0.5,1"), ("--choose", " a", "--choose", " the king"), ("--json", "--top", "3")):
        warm = gptcli("predict", "Once upon", *options, "-v")
        cold = gptcli("predict", "Once upon", *options, "--no-warm")
        assert b"from the warm process" in warm.stderr
        assert warm.stdout == cold.stdout


def test_errors_are_the_same_warm_and_cold(gptcli: Gptcli, start: Start) -> None:
    start()
    long = "king " * 100
    for args in (
        ("generate", long, "--seed", "1"),
        ("generate", "x", "--logit-bias", "999:1"),
        ("predict", long, "--choose", "a"),
    ):
        warm, cold = gptcli(*args), gptcli(*args, "--no-warm")
        assert (warm.returncode, warm.stderr) == (cold.returncode, cold.stderr)
        assert warm.returncode in (2, 4)


def test_warm_starts_a_process_once_and_it_stays(gptcli: Gptcli, folder: Path) -> None:
    cold = gptcli("generate", "Once", "--seed", "1", "-n", "5")
    assert not place_of(folder).lock.exists()  # nothing is started unless told to
    first = gptcli("generate", "Once", "--seed", "1", "-n", "5", "--warm")
    process = status_of(folder)["pid"]
    second = gptcli("generate", "Once", "--seed", "1", "-n", "5", "--warm")
    third = gptcli("generate", "Once", "--seed", "1", "-n", "5")
    assert cold.stdout == first.stdout == second.stdout == third.stdout
    assert (status_of(folder)["pid"], status_of(folder)["requests"]) == (process, 3)
    told = gptcli("serve", "--status", "-m", str(folder), "--json")
    assert json.loads(told.stdout)["pid"] == process
    assert b"tiny" in gptcli("serve", "--status").stdout
    assert gptcli("serve", "--stop").returncode == 0


def test_two_who_start_at_once_share_one_process(gptcli: Gptcli, folder: Path) -> None:
    done: list[subprocess.CompletedProcess[bytes]] = []
    ask = lambda: done.append(gptcli("generate", "Once", "--seed", "1", "-n", "5", "--warm"))
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    assert len({each.stdout for each in done}) == 1
    assert status_of(folder)["requests"] == 3


def test_without_a_process_status_and_stop_say_so(gptcli: Gptcli, folder: Path) -> None:
    for option in ("--status", "--stop"):
        done = gptcli("serve", option)
        assert done.returncode == 3
        assert b"hint: gptcli serve starts" in done.stderr
        assert gptcli("serve", option, "-m", str(folder)).returncode == 3


def test_stop_ends_it_and_leaves_no_socket(gptcli: Gptcli, start: Start, folder: Path) -> None:
    process = start()
    assert gptcli("serve", "--stop").returncode == 0
    assert process.wait(PATIENCE) == 0
    assert not place_of(folder).socket.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_no_socket(start: Start, folder: Path, number: signal.Signals, code: int) -> None:
    process = start()
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    assert not place_of(folder).socket.exists()


def test_what_nohup_has_ignored_stays_ignored(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)]
    try:
        process = start()  # which inherits that
    finally:
        for number, handler in zip((signal.SIGHUP, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    assert status_of(folder)["pid"] == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_in_the_background_it_has_no_terminal_and_stays(gptcli: Gptcli, folder: Path) -> None:
    done = gptcli("serve", "--background", "--http", "0", "--json")
    assert done.returncode == 0
    assert b"is warm at" in done.stderr
    where, told = json.loads(done.stdout), status_of(folder)
    assert (where["model"], where["socket"]) == ("tiny", str(place_of(folder).socket))
    assert os.getsid(told["pid"]) == told["pid"] != os.getsid(0)
    assert int(place_of(folder).lock.read_text()) == told["pid"]
    with urllib.request.urlopen(f"{where['url']}/models", timeout=PATIENCE) as answer:
        assert json.load(answer)["data"][0]["id"] == "tiny"
    assert b"from the warm process" in gptcli("generate", "Once", "-n", "3", "-v").stderr
    again = gptcli("serve", "--background")
    assert (again.returncode, b"is served already" in again.stderr) == (2, True)
    assert gptcli("serve", "--stop").returncode == 0
    assert not place_of(folder).socket.exists()  # so another can start at once
    assert gptcli("serve", "--background").returncode == 0


def test_in_the_background_it_says_why_it_could_not_start(gptcli: Gptcli, folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 8)
    done = gptcli("serve", "--background", "--json")
    assert done.returncode == 3
    told = json.loads(done.stderr)["error"]
    assert "could not start" in told["message"]
    assert "model.safetensors" in told["message"]
    assert not place_of(folder).socket.exists()


def test_it_leaves_when_nobody_has_asked_for_long(start: Start, folder: Path) -> None:
    process = start("--idle", "0.01")
    assert process.wait(PATIENCE) == 0
    assert not place_of(folder).socket.exists()


def test_a_second_serve_is_told_of_the_first(gptcli: Gptcli, start: Start, folder: Path) -> None:
    start()
    second = gptcli("serve", "-m", str(folder))
    assert second.returncode == 2
    assert b"is served already" in second.stderr


def test_after_a_kill_commands_go_cold_and_the_next_process_takes_over(
    gptcli: Gptcli, start: Start, folder: Path
) -> None:
    process = start()
    warm = gptcli("generate", "Once", "--seed", "1", "-n", "5")
    process.kill()
    process.wait()
    assert place_of(folder).socket.exists()
    cold = gptcli("generate", "Once", "--seed", "1", "-n", "5", "-v")
    assert cold.stdout == warm.stdout
    assert b"the warm process does not answer" in cold.stderr
    again = gptcli("generate", "Once", "--seed", "1", "-n", "5", "--warm")
    assert again.stdout == warm.stdout
    assert status_of(folder)["pid"] != process.pid


def test_a_kill_in_the_middle_of_an_answer_is_told(start: Start, folder: Path) -> None:
    process = start()
    command = [sys.executable, "-m", "gptcli", "generate", "Once", "-n", "-1", "--slide", "--ignore-eos"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPTCLI_MODEL": str(folder)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as caller:
        assert caller.stdout
        assert caller.stderr
        assert caller.stdout.read(20)
        process.kill()
        caller.stdout.read()
        said = caller.stderr.read()
        assert caller.wait(PATIENCE) == 3
    assert b"the warm process" in said
    assert b"--no-warm" in said


def test_whoever_reads_only_the_beginning_stops_the_work(gptcli: Gptcli, start: Start, folder: Path) -> None:
    start()
    endless = f"{sys.executable} -m gptcli generate Once -n -1 --slide --ignore-eos --seed 1 | head -c 20"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GPTCLI_MODEL": str(folder)}
    done = subprocess.run(["bash", "-c", endless], capture_output=True, env=env, timeout=PATIENCE, check=True)
    assert len(done.stdout) == 20
    assert done.stderr.startswith(b"seed") is False
    assert gptcli("generate", "Once", "-n", "3", "--seed", "1").returncode == 0
    while (told := status_of(folder))["running"] or not told["cancelled"]:
        pass  # it may not yet have seen that nobody reads any more
    assert told["cancelled"] == 1


def test_a_model_whose_files_have_changed_is_loaded_anew(gptcli: Gptcli, start: Start, folder: Path) -> None:
    start()
    os.utime(folder / "model.safetensors", (1, 1))
    done = gptcli("generate", "Once", "-n", "3", "-v")
    assert done.returncode == 0
    assert b"have changed since the warm process loaded them: the model is loaded here" in done.stderr


def test_a_model_asked_for_otherwise_is_loaded_here(gptcli: Gptcli, start: Start) -> None:
    start()
    for options, why in (
        (("--dtype", "bfloat16"), b"has tiny in float32"),
        (("--quantize", "int8"), b"--quantize none"),
    ):
        done = gptcli("generate", "Once", "-n", "3", "-v", *options)
        assert done.returncode == 0
        assert why in done.stderr
        refused = gptcli("generate", "Once", "-n", "3", "--warm", *options)
        assert refused.returncode == 6
        assert why in refused.stderr
    own_threads = gptcli("generate", "Once", "-n", "3", "-v", "--threads", "1")
    assert b"warm" not in own_threads.stderr


def test_what_keeps_a_process_from_starting_is_told(gptcli: Gptcli, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")
    done = gptcli("generate", "Once", "--warm")
    assert done.returncode == 3
    assert b"the warm process could not start" in done.stderr


def test_status_tells_of_one_that_loads(gptcli: Gptcli, folder: Path) -> None:
    """Whoever connects is listened to, and nobody answers yet."""
    held = claim(place_of(folder))
    assert held
    told = json.loads(gptcli("serve", "--status", "--json").stdout)
    held.release()
    assert told == {"model": "tiny", "starting": True, "socket": str(place_of(folder).socket)}


def test_only_loopback_is_served(gptcli: Gptcli) -> None:
    for address in ("0.0.0.0:8000", "192.168.1.2:80", "example.org:80", "8000x", "99999"):
        done = gptcli("serve", "--http", address)
        assert done.returncode == 2, address


def test_the_inner_routes_are_for_the_socket_alone(start: Start, folder: Path) -> None:
    import http.client

    process = start("--http", "0")
    assert process.stderr
    said = line_with(b"OpenAI's API", process.stderr).decode()
    port = int(said.rpartition(":")[2].partition("/")[0])
    for path in ("status", "stop", "tokens"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET" if path == "status" else "POST", f"/gptcli/{path}", b"{}")
        assert connection.getresponse().status == 404
        connection.close()
    assert status_of(folder)["pid"] == process.pid


def test_what_is_no_gptcli_is_not_believed(gptcli: Gptcli, folder: Path) -> None:
    held = claim(place_of(folder))
    assert held

    def talk() -> None:
        caller, _ = held.listener.accept()
        with caller:
            caller.recv(1000)
            caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    thread = threading.Thread(target=talk)
    thread.start()
    with pytest.raises(GoneError, match="no gptcli"):
        Client(place_of(folder), timeout=PATIENCE).get("/gptcli/status")
    thread.join()
    held.release()
