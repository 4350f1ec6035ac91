"""A model dealt out to two and to four ranks on gloo says what it says whole, and its ranks end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.core.build import open_model, random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.generate import generate, prompt_ids
from gptcli.core.quantize import quantize_
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.spec.config import from_hf
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Run, run  # noqa: F401
from tests.conftest import ROOT, tiny_tokenizer
from tests.dist.together import AXES, MODELS, PROMPTS, said, whole

RANKS = (2, 4)
COMMANDS: list[list[str]] = [
    ["generate", "Once upon a time", "-n", "12", "--seed", "3", "--json", "--no-stdin"],
    ["generate", "-", "-n", "6", "-t", "0", "--seed", "1", "--json"],
    ["generate", "Once", "-n", "4", "--num-samples", "3", "--seed", "3", "--json", "--no-stdin"],
    ["score", "Once upon a time there was a king.", "--json", "--no-stdin"],
    ["predict", "Once upon a time there", "--json", "--no-stdin"],
    ["generate", "Once upon a time " * 60, "--json", "--no-stdin"],
    ["generate", "Once", "--compile", "--no-stdin"],
]
STDIN = "One day the king said 你好 😀"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all models said on two ranks, started by torchrun, and on four; and the small folder that commands used."""
    folder = tmp_path_factory.mktemp("together")
    raw = {"model_type": "gpt2", "vocab_size": 301, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = random_model(from_hf(raw | {"bos_token_id": 0}), seed=7)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=noise) * 0.2
    save_folder(model, folder / "tiny", dtype=torch.float32, files={"tokenizer.json": tiny_tokenizer()})
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.dist.together"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(folder)],
        env=environment(), cwd=ROOT, capture_output=True, input=STDIN.encode(), timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    processes = [start(rank, 4, port, ["tests.dist.together", str(folder)]) for port in [free_port()] for rank in range(4)]
    assert [ended(process, STDIN.encode()) for process in processes] == [(0, b"", b"")] * 3 + [(-9, b"", b"")]
    return folder


def environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}
    return {**os.environ, **threads, "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(rank: int, ranks: int, port: int, command: list[str]) -> subprocess.Popen[bytes]:
    """As any launcher would that sets the variables; without torchrun's own process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    told = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-m", *command], env={**environment(), **told}, cwd=ROOT, **pipes)


def ended(process: subprocess.Popen[bytes], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    try:
        out, err = process.communicate(stdin, timeout=600)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_ranks_say_what_one_process_says(folder: Path, name: str, ranks: int) -> None:
    wanted = said(whole(MODELS[name]), MODELS[name], Tokenizer.from_folder(folder / "tiny"))
    found = load_file(folder / str(ranks) / f"{name}.safetensors")
    assert found.keys() == wanted.keys()
    for what, tensor in wanted.items():
        if tensor.dtype is torch.int64:  # ids
            assert found[what].tolist() == tensor.tolist(), what
        else:
            # Only the order of sums differs: within 2e-5 of a standard deviation of the logits.
            torch.testing.assert_close(found[what], tensor, rtol=0, atol=2e-5 * float(tensor.nan_to_num().std() + 1), equal_nan=True)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", AXES)
def test_every_axis_is_dealt_out(folder: Path, name: str, ranks: int) -> None:
    with torch.inference_mode():
        wanted = whole(AXES[name])(torch.tensor(PROMPTS[2:]))
    found = load_file(folder / str(ranks) / "axes.safetensors")[name]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.std() + 1))


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_quantize_their_own_slices(folder: Path, ranks: int) -> None:
    quantized = quantize_(whole(MODELS["llama"]), "int8")
    with torch.inference_mode():
        wanted, exact = (model(torch.tensor(PROMPTS[2:])) for model in (quantized, whole(MODELS["llama"])))
    found = load_file(folder / str(ranks) / "axes.safetensors")["int8"]
    assert (found - exact).norm() < 1.5 * (wanted - exact).norm()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: " ".join(COMMANDS[number])[:40])
def test_commands_give_the_same_answers(folder: Path, run: Run, number: int, ranks: int) -> None:
    args = COMMANDS[number]
    told = [json.loads((folder / str(ranks) / f"command-{number}-rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert [one["out"] for one in told[1:]] == [""] * (ranks - 1)
    if "--compile" in args:
        assert told[0]["code"] == 2
        assert "--tp and --compile do not go together" in told[0]["out"]
        return
    alone = run(*args, "-m", folder / "tiny", stdin=STDIN.encode() if "-" in args else None)
    assert told[0]["code"] == alone.code
    if alone.code:
        assert told[0]["out"].encode() == alone.err
        return
    assert [one["code"] for one in told] == [0] * ranks
    for one, other in zip(told[0]["out"].splitlines(), alone.out.splitlines(), strict=True):
        assert_alike(json.loads(one), json.loads(other))


def assert_alike(one: Any, other: Any) -> None:
    """The same but for times and rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"timing"}:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(other, float) else other)


# --- How ranks end


@pytest.fixture
def pair(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks in the middle of an answer without end."""
    command = ["gptcli", "generate", "Once", "-n", "-1", "--slide", "--ignore-eos", "--tp", "2", "-m"]
    port = free_port()
    processes = [start(rank, 2, port, [*command, str(folder / "tiny"), "--seed", "1", "--no-stdin"]) for rank in range(2)]
    try:
        assert processes[0].stdout is not None
        assert processes[0].stdout.read(1)
        yield processes
    finally:
        for process in processes:
            process.kill()


def test_ctrl_c_ends_all_ranks_and_keeps_what_was_made(pair: list[subprocess.Popen[bytes]]) -> None:
    for process in pair:  # as a terminal does
        process.send_signal(signal.SIGINT)
    first, second = map(ended, pair)
    assert first[0] == 130
    assert b"rror" not in first[2]
    assert second == (0, b"", b"")


def test_no_rank_waits_for_one_that_was_killed(folder: Path) -> None:
    ends = [(folder / "4" / f"end-{rank}").read_text() for rank in range(3)]
    assert ends == ["another rank has ended, True", "lost, False", "lost, False"]


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], str]]:
    """Two ranks that serve, and where they complete text."""
    port = free_port()
    command = ["gptcli", "serve", "--tp", "2", "--http", "0", "-m", str(folder / "tiny")]
    ranks = [start(rank, 2, port, command) for rank in range(2)]
    try:
        assert ranks[0].stderr is not None
        said = b""
        while b"/v1" not in said:
            said = ranks[0].stderr.readline()
            assert said, ended(ranks[0])
        yield ranks, said.decode().split()[-1] + "/completions"
    finally:
        for process in ranks:
            process.kill()


def test_a_server_answers_several_at_once_with_all_ranks(
    folder: Path, server: tuple[list[subprocess.Popen[bytes]], str]
) -> None:
    ranks, url = server
    asked = [{"model": "tiny", "prompt": text, "max_tokens": 6, "temperature": 0} for text in ("Once", "upon a time")]
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(partial(posted, url), [*asked, *asked]))
    assert together == [posted(url, one) for one in asked] * 2
    model = open_model(folder / "tiny", Tokenizer.from_folder(folder / "tiny"), device="cpu")
    for one, text in zip(asked, together, strict=False):
        request = Request(prompt_ids(model, str(one["prompt"])), 0, 6)
        assert text == "".join(step.text for step in generate(model, [request], Sampling(temperature=0)))
    ranks[0].send_signal(signal.SIGTERM)
    assert [ended(process)[:2] for process in ranks] == [(0, b""), (0, b"")]


def test_a_server_ends_when_one_of_its_ranks_was_killed(server: tuple[list[subprocess.Popen[bytes]], str]) -> None:
    ranks, url = server
    ranks[1].kill()
    ranks[1].wait(600)
    with pytest.raises(urllib.error.HTTPError) as failed:  # nobody was asked anything meanwhile
        posted(url, {"model": "tiny", "prompt": "Once", "max_tokens": 6})
    assert failed.value.code == 500
    assert "another rank has ended" in json.load(failed.value)["error"]["message"]
    code, out, err = ended(ranks[0])
    assert (code, out) == (1, b"")
    assert b"Traceback" not in err
    assert err.splitlines()[-2:] == [b"error: the ranks no longer work together", b"hint: start all of them again"]


def posted(url: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=100) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text
