"""``gptcli models pull`` and ``rm`` against a stand-in for the Hub: what comes, what it says when it does not."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gptcli.hub import fetch
from gptcli.spec.library import resolve
from tests.cli.conftest import Done, Run
from tests.hub.standin import Repo, Request, StandIn, git_sha1, sha256

NAME = "owner/tiny"
WEIGHTS = "model.safetensors"
TOKEN = "hf_sesame"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(fetch, "PAUSES", (0.0, 0.0))


@pytest.fixture
def files(tiny_folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(tiny_folder.iterdir())}


@pytest.fixture
def tiny(hub: StandIn, files: dict[str, bytes]) -> str:
    """The tiny model on the Hub; returns its commit."""
    return hub.add(NAME, files)


def repo(tmp_path: Path, name: str = NAME) -> Path:
    return tmp_path / "hf" / "hub" / ("models--" + name.replace("/", "--"))


def refused(done: Done, code: int, *said: str) -> dict[str, str]:
    """The error of a command that failed as it should; it says what is asked for."""
    assert done.code == code, done.err
    assert done.out == b""
    last = done.err.decode().splitlines()[-1]
    error: dict[str, str] = json.loads(last)["error"] if last.startswith("{") else {"all": done.err.decode()}
    for text in said:
        assert text in " ".join(error.values())
    return error


def got(requests: list[Request], path: str) -> list[Request]:
    return [request for request in requests if request.method == "GET" and request.path.endswith(path)]


# --- what comes


def test_a_pulled_model_is_in_the_cache_that_others_share(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, {**files, "README.md": b"---\nlicense: mit\n---\n# Tiny\n", "onnx/model.onnx": b"o", "x.py": b"p"})
    commit = hub.repos[NAME].refs["main"]
    value = run("models", "pull", NAME, "--json").json
    folder = repo(tmp_path) / "snapshots" / commit
    assert {name: value[name] for name in ("name", "revision", "commit", "folder")} == {
        "name": NAME,
        "revision": "main",
        "commit": commit,
        "folder": str(folder),
    }
    assert {file.name for file in folder.iterdir()} == {*files, "README.md"}
    assert {entry["name"]: entry["bytes"] for entry in value["files"]} == {
        file.name: file.stat().st_size for file in folder.iterdir()
    }
    assert value["fetched_bytes"] == value["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    for name, data in files.items():
        assert (folder / name).read_bytes() == data
        assert (folder / name).resolve().name == (sha256(data) if name == WEIGHTS else git_sha1(data))
    assert not list((repo(tmp_path) / "blobs").glob("*.incomplete"))

    from huggingface_hub import hf_hub_download, scan_cache_dir

    assert hf_hub_download(NAME, WEIGHTS, cache_dir=tmp_path / "hf" / "hub", local_files_only=True) == str(
        folder / WEIGHTS
    )
    scanned = scan_cache_dir(tmp_path / "hf" / "hub")
    assert not scanned.warnings
    (only,) = scanned.repos
    assert (only.repo_id, set(only.refs)) == (NAME, {"main"})

    told = run("generate", "-m", NAME, "Once", "-n", "3", "-t", "0", "--json").json
    assert (told["model"], told["usage"]["completion_tokens"]) == (NAME, 3)
    shown = run("models", "show", NAME, "--json").json
    assert (shown["revision"], shown["card"], shown["tokenizer"]) == (commit, {"license": ["mit"]}, "byte-level BPE")
    assert set(run("models", "verify", NAME, "--json").json["hashed"]) == {*files, "README.md"}


def test_stdout_is_the_folder_and_the_rest_is_talk(run: Run, tiny: str, tmp_path: Path) -> None:
    done = run("models", "pull", NAME)
    assert (done.code, done.out.decode()) == (0, f"{repo(tmp_path) / 'snapshots' / tiny}\n")
    first, second = done.err.decode().splitlines()
    assert first.startswith(f"note: {NAME} at main ({tiny[:8]}): ")
    assert "to get" in first
    assert second.startswith("note: got ")
    quiet = run("models", "pull", NAME, "-q")
    assert (quiet.out, quiet.err) == (done.out, b"")


def test_pulled_again_nothing_is_fetched(run: Run, hub: StandIn, tiny: str) -> None:
    run("models", "pull", NAME)
    hub.requests.clear()
    value = run("models", "pull", NAME, "--json").json
    assert [(request.host, request.path) for request in hub.requests] == [
        ("hub", f"/api/models/{NAME}/revision/main")
        if "revision" in hub.requests[0].path
        else ("hub", f"/api/models/{NAME}")
    ]
    assert value["fetched_bytes"] == 0
    assert not any(entry["fetched"] for entry in value["files"])


def test_a_new_commit_brings_only_what_changed(run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]) -> None:
    run("models", "pull", NAME)
    commit = hub.add(NAME, {**files, "README.md": b"new"})
    value = run("models", "pull", NAME, "--json").json
    assert value["commit"] == commit
    assert [entry["name"] for entry in value["files"] if entry["fetched"]] == ["README.md"]
    assert value["fetched_bytes"] == 3
    assert (resolve(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("asked", ["v1", "refs/pr/2", "commit"])
def test_a_revision(run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], asked: str) -> None:
    other = hub.add(NAME, {**files, "README.md": b"other"}, "v1", "refs/pr/2")
    revision = other if asked == "commit" else asked
    run("models", "pull", NAME)
    value = run("models", "pull", NAME, "--revision", revision, "--json").json
    assert (value["commit"], value["revision"]) == (other, revision)
    assert resolve(NAME).folder.name == tiny
    assert resolve(f"{NAME}@{revision}").folder.name == resolve(f"{NAME}@{other[:9]}").folder.name == other
    listed = [json.loads(line) for line in run("models", "list", "--json").out.splitlines()]
    shown = other[:8] if asked == "commit" else asked
    assert [(entry["name"], entry["revision"]) for entry in listed if entry["source"] == "cache"] == [
        (NAME, tiny),
        (f"{NAME}@{shown}", other),
    ]
    assert run("models", "pull", f"{NAME}@{revision}", "--json").json["fetched_bytes"] == 0
    refused(run("models", "pull", f"{NAME}@{revision}", "--revision", "main"), 2, "different revisions")


def test_include_takes_only_what_matches_and_no_pickle(run: Run, hub: StandIn, tiny: str, tmp_path: Path) -> None:
    hub.add(NAME, {"config.json": b"{}", "original/params.json": b"1", "original/a.pth": b"2", "b.bin": b"3"})
    done = run("models", "pull", NAME, "--include", "*.json", "--include", "original/", "--json")
    assert [entry["name"] for entry in done.json["files"]] == ["config.json", "original/params.json"]
    assert b"original/a.pth is a pickle" in done.err
    refused(run("models", "pull", NAME, "--include", "*.bin"), 3, "b.bin", "can run code")
    refused(run("models", "pull", NAME, "--include", "*.txt"), 3, "no file of owner/tiny matches *.txt")
    assert not hub.seen("GET", ".bin") + hub.seen("GET", ".pth")


def test_a_model_in_shards(run: Run, hub: StandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, in_shards(files))
    value = run("models", "pull", NAME, "--json").json
    names = {entry["name"] for entry in value["files"]}
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} < names
    assert "other.safetensors" not in names
    whole = tmp_path / "whole"
    shutil.copytree(resolve(NAME).folder, whole)
    assert run("models", "verify", NAME).code == 0
    again = run("models", "pull", NAME, "--json").json
    assert again["fetched_bytes"] == 0


def in_shards(files: dict[str, bytes]) -> dict[str, bytes]:
    """The tiny model in two shards with an index, and a safetensors file that belongs to nothing."""
    from safetensors.numpy import load, save

    tensors = load(files[WEIGHTS])
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    shards = {f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in part} for i, part in enumerate(parts)}
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    others = {name: data for name, data in files.items() if name != WEIGHTS}
    return {
        **others,
        **{shard: save(part) for shard, part in shards.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "other.safetensors": save({"x": tensors[names[0]]}),
    }


# --- what breaks


def test_a_broken_pull_is_3_and_the_next_goes_on(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.breaks[WEIGHTS] = [None, 5000, 0]  # the first answer is the look at the header
    error = refused(run("models", "pull", NAME, "--json"), 3, "the connection broke after 5,000 of", WEIGHTS)
    assert error["type"] == "network"
    assert "the same command goes on" in error["hint"]
    part = repo(tmp_path) / "blobs" / f"{sha256(files[WEIGHTS])}.incomplete"
    assert part.read_bytes() == files[WEIGHTS][:5000]
    refused(run("generate", "-m", NAME, "x"), 3, f"gptcli models pull {NAME}")
    (entry,) = [
        entry for entry in map(json.loads, run("models", "list", "--json").out.splitlines()) if entry["problem"]
    ]
    assert (entry["name"], "not whole" in entry["problem"]) == (NAME, True)

    hub.breaks.clear()
    hub.requests.clear()
    done = run("models", "pull", NAME)
    assert done.code == 0
    assert b"are here" in done.err
    ranges = [request.range for request in got(hub.requests, WEIGHTS) if request.host == "cdn"]
    assert ranges == ["bytes=0-65535", "bytes=5000-"]
    assert (resolve(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert not part.exists()


def test_a_connection_that_breaks_now_and_then_is_taken_up_again(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]
) -> None:
    hub.breaks[WEIGHTS] = [None, 4000, 0, 4000, 0, 4000, None]
    assert run("models", "pull", NAME).code == 0
    assert (resolve(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    asked = [request.range for request in got(hub.requests, WEIGHTS) if request.host == "cdn"][1:]
    assert asked == [None, *(f"bytes={at}-" for at in (4000, 4000, 8000, 8000, 12000))]


def test_a_server_without_ranges_sends_all_of_it_again(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]
) -> None:
    hub.no_ranges = True
    hub.breaks[WEIGHTS] = [None, 5000, None]
    assert run("models", "pull", NAME).code == 0
    assert (resolve(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_part_that_is_wrong_is_not_built_upon(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    blobs = repo(tmp_path) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(files[WEIGHTS])}.incomplete").write_bytes(b"?" * 100)
    assert run("models", "pull", NAME).code == 0
    assert (resolve(NAME).folder / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_bytes_of_another_hash_are_3_and_thrown_away(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    data = files[name]
    hub.changed[name] = data[:-1] + bytes([data[-1] ^ 1])
    error = refused(run("models", "pull", NAME, "--json"), 3, name, "hash", "thrown away")
    assert error["type"] == "corrupt"
    digest = sha256(data) if name == WEIGHTS else git_sha1(data)
    assert not list((repo(tmp_path) / "blobs").glob(f"{digest}*"))
    refused(run("generate", "-m", NAME, "x"), 3)
    hub.changed.clear()
    assert run("models", "pull", NAME).code == 0
    assert run("models", "verify", NAME).code == 0


def test_what_is_too_large_for_http_is_left_to_the_library_and_hashed(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptcli.hub.pull.MOST_OVER_HTTP", 1000)
    data = files[WEIGHTS]
    hub.changed[WEIGHTS] = data[:-1] + bytes([data[-1] ^ 1])
    refused(run("models", "pull", NAME, "--json"), 3, WEIGHTS, "thrown away")
    refused(run("generate", "-m", NAME, "x"), 3)
    hub.changed.clear()
    assert run("models", "pull", NAME, "--json").json["files"][1] == {
        "name": WEIGHTS,
        "bytes": len(data),
        "fetched": True,
    }
    assert run("models", "verify", NAME).code == 0


def test_ctrl_c_is_130_and_what_is_there_stays(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    part = repo(tmp_path) / "blobs" / f"{sha256(files[WEIGHTS])}.incomplete"
    over = threading.Event()
    held: list[bool] = []

    def interrupt() -> None:
        if part.exists() and not held:
            while part.stat().st_size < 5000:
                pass
            held.append(True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            over.wait(60)

    hub.holds[WEIGHTS] = (5000, interrupt)
    done = run("models", "pull", NAME)
    assert (done.code, done.out) == (130, b"")
    assert part.read_bytes() == files[WEIGHTS][:5000]
    over.set()
    hub.holds.clear()
    hub.requests.clear()
    assert run("models", "pull", NAME).code == 0
    assert "bytes=5000-" in [request.range for request in got(hub.requests, WEIGHTS)]
    assert run("models", "verify", NAME).code == 0


def test_a_hub_that_fails_or_is_not_there(run: Run, hub: StandIn, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status[WEIGHTS] = 500
    refused(run("models", "pull", NAME, "--json"), 3, "500")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused(run("models", "pull", NAME, "--json"), 3, "http://127.0.0.1:9 can't be reached", "HTTPS_PROXY")
    assert error["type"] == "network"
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.hub}/not-a-hub")
    refused(run("models", "pull", NAME, "--json"), 3, "HF_ENDPOINT")


def test_too_little_room_is_1(
    run: Run, hub: StandIn, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    error = refused(run("models", "pull", NAME, "--json"), 1, "room", "HF_HUB_CACHE")
    assert error["type"] == "output"
    assert not repo(tmp_path).exists()


def test_a_disk_that_fills_up_on_the_way_is_1_and_what_is_there_stays(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = len(files[WEIGHTS]) - 1000
    assert room > len(files["tokenizer.json"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # a file of more is refused as by a full disk
    try:
        done = run("models", "pull", NAME, "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refused(done, 1, str(repo(tmp_path)), "no more room", "goes on")["type"] == "output"
    assert (repo(tmp_path) / "blobs" / f"{sha256(files[WEIGHTS])}.incomplete").stat().st_size == room
    assert run("models", "pull", NAME, "--json").json["fetched_bytes"] == 1000 + len(files["config.json"])
    assert run("models", "verify", NAME).code == 0


# --- who may not, and what is not there


def test_gated(run: Run, hub: StandIn, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME].needs_token = TOKEN
    error = refused(run("models", "pull", NAME, "--json"), 3, "is gated", f"{hub.hub}/{NAME}", "HF_TOKEN")
    assert error["type"] == "access"
    refused(run("count-params", NAME, "--remote", "--json"), 3, "is gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(run("models", "pull", NAME, "--json"), 3, "is gated", "has no access yet")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run("models", "pull", NAME).code == 0


def test_the_token_goes_to_the_hub_alone_and_is_never_shown(
    run: Run, hub: StandIn, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repos[NAME].needs_token = TOKEN
    shown = [run("models", "pull", NAME, "-v"), run("count-params", NAME, "--remote")]
    hub.repos[NAME].needs_token = "another"
    shown += [run("models", "pull", NAME, "-v", *more) for more in ((), ("--json",), ("--revision", "none"))]
    assert [done.code for done in shown] == [0, 0, 0, 0, 3]
    assert not any(TOKEN.encode() in done.out + done.err for done in shown)
    assert {request.token for request in hub.requests if request.host == "hub"} == {TOKEN}
    assert {request.token for request in hub.requests if request.host == "cdn"} == {None}


def test_settings_that_can_not_be_meant(run: Run, hub: StandIn, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sésame")
    assert refused(run("models", "pull", NAME, "--json"), 3, "the token", "HF_TOKEN")["type"] == "access"
    monkeypatch.delenv("HF_TOKEN")
    for address in ("huggingface.co", "ftp://huggingface.co", "http://", "http://127.0.0.1:99999"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        refused(run("models", "pull", NAME, "--json"), 2, address, "https://huggingface.co")
    assert not hub.requests


def test_missing(run: Run, hub: StandIn, tiny: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(run("models", "pull", "owner/none", "--json"), 3, "no public model owner/none", "HF_TOKEN")
    assert error["type"] == "not_found"
    refused(run("models", "pull", NAME, "--revision", "v9", "--json"), 3, "no revision 'v9'")
    hub.add("owner/bare", {WEIGHTS: files[WEIGHTS]})
    refused(run("models", "pull", "owner/bare", "--json"), 3, "no config.json")
    hub.repos["owner/secret"] = Repo(private=True, needs_token=TOKEN)
    refused(run("models", "pull", "owner/secret", "--json"), 3, "no public model owner/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(run("models", "pull", "owner/secret", "--json"), 3, "nor one that the token may see")


def test_a_file_that_went_missing_meanwhile(run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]) -> None:
    hub.status["tokenizer.json"] = 404
    refused(run("models", "pull", NAME, "--json"), 3)


@pytest.mark.parametrize("name", ["a/b/c", "a b/c", "..", "-x/..", "owner/", "~/x", "owner/" + "x" * 200])
def test_what_is_no_name_is_2_or_3_and_asks_nothing(run: Run, hub: StandIn, name: str) -> None:
    assert run("models", "pull", "--", name).code in (2, 3)
    assert not hub.requests


# --- what gptcli can't run


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": b"1"}, "as a pickle (pytorch_model.bin)"),
        ({"model-q4.gguf": b"1"}, "holds no model.safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'}, "names b.safetensors"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'}, "not beside it"),
        ({"model.safetensors": b"x" * 100}, "header"),
    ],
)
def test_weights_that_are_none(run: Run, hub: StandIn, files: dict[str, bytes], said: str, tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    hub.add(NAME, {"config.json": json.dumps(config).encode(), **files})
    refused(run("models", "pull", NAME, "--json"), 3, said)
    assert not repo(tmp_path).exists()


def test_a_family_that_is_not_read_is_refused_before_its_weights_travel(
    run: Run, hub: StandIn, files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add(NAME, {**files, "config.json": b'{"model_type": "nobody"}'})
    refused(run("models", "pull", NAME, "--json"), 3, "'nobody'", "--force")
    assert not hub.seen("GET", WEIGHTS)
    assert not repo(tmp_path).exists()
    hub.add(NAME, {**files, "config.json": files["config.json"].replace(b'"n_layer": 2', b'"n_layer": 3')})
    refused(run("models", "pull", NAME, "--json"), 3, "--force")
    assert [request.range for request in hub.seen("GET", WEIGHTS) if request.host == "cdn"] == ["bytes=0-65535"]
    assert run("models", "pull", NAME, "--force").code == 0
    assert (repo(tmp_path) / "refs" / "main").exists()


def test_names_that_lead_out_of_the_folder_are_passed_over(run: Run, hub: StandIn, files: dict[str, bytes]) -> None:
    hub.add(NAME, {**files, "../README.md": b"1", "/LICENSE": b"2", "a\\..\\LICENSE": b"3"})
    value = run(
        "models", "pull", NAME, "--include", "*.json", "--include", "*README*", "--include", "*LICENSE", "--json"
    )
    assert {entry["name"] for entry in value.json["files"]} == {"config.json", "tokenizer.json"}


# --- --pull, offline, without the library


def test_commands_pull_when_told_to(run: Run, hub: StandIn, tiny: str) -> None:
    asked = ("generate", "-m", NAME, "Once", "-n", "2", "-t", "0")
    refused(run(*asked), 3, f"`gptcli models pull {NAME}`")
    refused(run(*asked, "--pull", "--offline"), 2, "--pull and --offline")
    assert not hub.requests
    first = run(*asked, "--pull", "-q")
    assert (first.code, first.err) == (0, b"")
    hub.requests.clear()
    for more in ("--pull", "--offline"):
        again = run(*asked, more)
        assert (again.code, again.out) == (0, first.out), again.err
    assert run("tokenize", "-m", NAME, "--pull", "x").code == 0
    assert run("count-params", NAME, "--pull").code == 0
    assert not hub.requests
    commands: tuple[tuple[str, ...], ...] = (
        *(("tokenize", "x", "-m"), ("count-params", "-m"), ("models", "show"), ("models", "verify")),
        *(("train", "--plan", "--init-from"), ("train", "--plan", "--layers", "1", "--tokenizer")),
    )
    for number, command in enumerate(commands):
        name = f"owner/number-{number}"
        hub.add(name, of(hub, NAME))
        done = run(*command, name, "--pull")
        assert resolve(name).source == "cache", done.err
    refused(run("generate", "-m", "owner/none", "--pull", "x"), 3, "no public model owner/none")


def test_an_offline_setting_forbids_only_what_would_be_fetched(
    run: Run, hub: StandIn, tiny: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiny_folder / "none"))
    for command in (("tokenize", "x", "-m"), ("models", "verify")):
        assert run(*command, tiny_folder, "--pull").code == 0
        refused(run(*command, NAME, "--pull"), 3, "offline")
    # Of an encoding, too; one that nobody else loads, since tiktoken keeps what it has loaded.
    refused(run("tokenize", "x", "--pull", "-e", "p50k_edit"), 3, "p50k_edit is not on this machine")
    assert not hub.requests
    refused(run("tokenize", "x", "--pull", "--offline", "-m", str(tiny_folder)), 2, "--pull and --offline")


def of(hub: StandIn, name: str) -> dict[str, bytes]:
    return hub.repos[name].commits[hub.repos[name].refs["main"]]


def test_aliases(run: Run, hub: StandIn, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("openai-community/gpt2", files)
    assert run("models", "pull", "gpt2", "--json").json["name"] == "openai-community/gpt2"
    assert run("generate", "-m", "gpt2", "x", "-n", "1").code == 0
    refused(run("models", "pull", "fable"), 2, "came with gptcli")


# Runs command lines where any use of a socket is an error.
WITHOUT_SOCKETS = """
import json, sys
def refuse(event, args):
    if event.startswith("socket."):
        raise RuntimeError(f"SOCKET {event} {args}")
sys.addaudithook(refuse)
from gptcli.cli import main
codes = [main(args) for args in json.loads(sys.argv[1])]
print(json.dumps(codes))
"""


def test_offline_nothing_is_asked(run: Run, hub: StandIn, tiny: str, tmp_path: Path) -> None:
    """No socket is made at all."""
    run("models", "pull", NAME)
    hub.requests.clear()
    import os

    def codes(commands: list[list[str]], **settings: str) -> tuple[list[int], str]:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_SOCKETS, json.dumps(commands)],
            env={**os.environ, **settings},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=300,
        )
        assert "SOCKET" not in done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    forbidden = [
        ["models", "pull", "owner/other"],
        ["models", "pull", NAME],
        ["generate", "-m", "owner/other", "x", "--pull"],
        ["count-params", NAME, "--remote"],
        ["tokenize", "-m", "owner/other", "x", "--pull"],
    ]
    found, said = codes(forbidden, HF_HUB_OFFLINE="1")
    assert found == [3] * 5
    assert said.count("HF_HUB_OFFLINE is set") == 5
    allowed: list[list[str]] = [
        ["models", "pull", NAME, "--offline"],
        ["generate", "-m", NAME, "x", "-n", "1", "--offline", "--no-warm"],
        ["models", "list"],
        ["models", "show", NAME],
        ["models", "verify", NAME],
        ["count-params", NAME],
        ["generate", "-m", "owner/other", "x"],
    ]
    assert codes(allowed)[0] == [3, 0, 0, 0, 0, 0, 3]
    assert not hub.requests


def test_without_huggingface_hub(run: Run, hub: StandIn, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("models", "pull", NAME)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for command in (("models", "pull"), ("count-params", "--remote"), ("models", "rm")):
        refused(run(*command, NAME), 3, "pip install 'gptcli[hub]'")
    assert run("models", "verify", NAME).code == run("generate", "-m", NAME, "x", "-n", "1").code == 0


# --- verify, repair, rm


def test_verify_tells_what_is_wrong_and_repair_gets_it(run: Run, hub: StandIn, tiny: str) -> None:
    run("models", "pull", NAME)
    file = (resolve(NAME).folder / WEIGHTS).resolve()
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(run("models", "verify", NAME, "--json"), 6, WEIGHTS, f"gptcli models pull {NAME} --repair")
    assert run("models", "pull", NAME, "--json").json["fetched_bytes"] == 0
    value = run("models", "pull", NAME, "--repair", "--json").json
    assert [entry["name"] for entry in value["files"] if entry["fetched"]] == [WEIGHTS]
    assert run("models", "verify", NAME).code == 0
    file.write_bytes(data[:-5])  # of another size: that is seen at a glance
    assert run("models", "pull", NAME, "--json").json["fetched_bytes"] == len(data)
    assert run("models", "verify", NAME).code == 0


def test_rm_gives_the_disk_back(run: Run, hub: StandIn, tiny: str, tmp_path: Path) -> None:
    run("models", "pull", NAME)
    refused(run("models", "rm", NAME), 2, "--yes")
    assert resolve(NAME)
    value: dict[str, Any] = run("models", "rm", NAME, "--yes", "--json").json
    assert value["name"] == NAME
    assert value["commits"] == [tiny]
    assert value["freed_bytes"] == sum(len(data) for data in of(hub, NAME).values())
    assert not repo(tmp_path).exists()
    refused(run("models", "rm", NAME, "--yes"), 3, NAME)


def test_rm_of_one_revision_leaves_what_another_shares(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]
) -> None:
    other = hub.add(NAME, {**files, "README.md": b"other"}, "v1")
    run("models", "pull", NAME)
    run("models", "pull", NAME, "--revision", "v1")
    value = run("models", "rm", f"{NAME}@v1", "--yes", "--json").json
    assert (value["commits"], value["freed_bytes"]) == ([other], len(b"other"))
    assert run("models", "verify", NAME).code == 0
    refused(run("models", "rm", f"{NAME}@v1", "--yes"), 3)


def test_rm_leaves_the_same_commit_under_another_name(
    run: Run, hub: StandIn, tiny: str, files: dict[str, bytes]
) -> None:
    names = [f"owner/name-{number}" for number in range(4)]  # as of a model that was renamed, or duplicated
    for name in names:
        assert hub.add(name, files) == tiny
        assert run("models", "pull", name).code == 0
    while names:
        assert run("models", "rm", names.pop(), "--yes").code == 0
        assert [resolve(name).name for name in names] == names


def test_rm_refuses_what_is_not_the_caches(run: Run, tiny_folder: Path, hub: StandIn) -> None:
    refused(run("models", "rm", "fable", "--yes"), 2, "came with gptcli")
    refused(run("models", "rm", str(tiny_folder), "--yes"), 2, "a folder of your own")
    assert (tiny_folder / WEIGHTS).exists()


def test_rm_takes_the_rest_of_a_broken_pull(run: Run, hub: StandIn, tiny: str, tmp_path: Path) -> None:
    hub.breaks[WEIGHTS] = [None, 5000, 0]
    run("models", "pull", NAME)
    value = run("models", "rm", NAME, "--yes", "--json").json
    assert value["freed_bytes"] >= 5000
    assert not repo(tmp_path).exists()
