"""A remote model's headers: the same count as of the files here, for some kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load, save

from tests.cli.conftest import Done, Run
from tests.hub.standin import StandIn

NAME = "owner/tiny"
WEIGHTS = "model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def error_of(done: Done) -> str:
    assert (done.code, done.out) == (3, b"")
    return str(json.loads(done.err.splitlines()[-1])["error"]["message"])


def counted(run: Run, name: str, *more: str) -> dict[str, object]:
    value: dict[str, object] = run("count-params", name, "--json", "--by", "tensor", *more).json
    return {key: value[key] for key in value if key != "model"}


def test_a_remote_count_is_the_count_of_the_files(run: Run, hub: StandIn, tiny_folder: Path, tmp_path: Path) -> None:
    hub.add(NAME, tiny_folder)
    assert counted(run, NAME, "--remote") == counted(run, str(tiny_folder))
    assert [(request.host, request.range) for request in hub.requests] == [
        ("hub", None),  # which commit, which files
        ("hub", None),  # config.json
        ("hub", "bytes=0-65535"),
        ("cdn", "bytes=0-65535"),
    ]
    assert not (tmp_path / "hf").exists()


def test_shards_are_read_side_by_side(run: Run, hub: StandIn, tiny_folder: Path) -> None:
    files = files_of(tiny_folder)
    tensors = load(files.pop(WEIGHTS))
    shards = {f"model-{i}.safetensors": {name: tensors[name] for name in sorted(tensors)[i::3]} for i in range(3)}
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add(NAME, {**files, **{shard: save(part) for shard, part in shards.items()}})
    assert counted(run, NAME, "--remote")["total"] == counted(run, str(tiny_folder))["total"]
    assert len(hub.seen("GET", "index.json")) == 1
    assert {request.path.rpartition("/")[2] for request in hub.requests if request.host == "cdn"} == set(shards)
    hub.add(NAME, {**files, **{shard: save(part) for shard, part in list(shards.items())[1:]}})
    assert "model-0.safetensors" in error_of(run("count-params", NAME, "--remote", "--json"))


def test_a_long_header_takes_a_second_request(run: Run, hub: StandIn, tiny_folder: Path) -> None:
    files = files_of(tiny_folder)
    files[WEIGHTS] = save(load(files[WEIGHTS]), metadata={"note": "x" * 100_000})
    hub.add(NAME, files)
    header = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    assert counted(run, NAME, "--remote") == counted(run, str(tiny_folder))
    ranges = [request.range for request in hub.requests if request.host == "cdn"]
    assert ranges == ["bytes=0-65535", f"bytes=65536-{header - 1}"]
    hub.no_ranges = True
    assert counted(run, NAME, "--remote") == counted(run, str(tiny_folder))


def test_views_and_revisions(run: Run, hub: StandIn, tiny_folder: Path) -> None:
    hub.add(NAME, {"README.md": b"nothing yet"})
    hub.add("openai-community/gpt2", tiny_folder)
    commit = hub.add(NAME, tiny_folder, "v1")
    for asked in (("--revision", "v1"), ("--revision", commit)):
        assert run("count-params", NAME, "--remote", *asked).code == 0
    assert run("count-params", f"{NAME}@v1", "--remote", "--memory", "--json").json["model"] == f"{NAME}@v1"
    assert run("count-params", "gpt2", "--remote", "--json").json["config"]["width"] == 32  # on the Hub, no preset
    assert run("count-params", "--diff", f"{NAME}@v1", "gpt2", "--remote").code == 0
    assert run("count-params", "gpt2", "--remote", "--check", str(tiny_folder)).code == 0
    assert run("count-params", NAME, "--remote", "--pull").code == 2
    assert run("count-params", NAME, "--remote", "--offline").code == 2
    assert run("count-params", "gpt2", "--revision", "v1").code == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config.json": b"{"}, "is not JSON"),
        ({"config.json": b"[]"}, "is not an object"),
        ({"config.json": b'{"model_type": "nobody"}'}, "'nobody'"),
        ({WEIGHTS: b"\x01"}, "too short"),
        ({WEIGHTS: (1 << 40).to_bytes(8, "little") + b"{}"}, "declares a header"),
        ({WEIGHTS: b"version https://git-lfs.github.com/spec/v1\n"}, "LFS pointer"),
        ({WEIGHTS: (2).to_bytes(8, "little") + b"{}"}, "missing: h.0.attn"),
    ],
)
def test_what_is_wrong_is_told(run: Run, hub: StandIn, tiny_folder: Path, changes: dict[str, bytes], said: str) -> None:
    hub.add(NAME, {**files_of(tiny_folder), **changes})
    assert said in error_of(run("count-params", NAME, "--remote", "--json"))


def test_a_connection_that_breaks_is_3(run: Run, hub: StandIn, tiny_folder: Path) -> None:
    hub.add(NAME, tiny_folder)
    hub.breaks[WEIGHTS] = [100]
    assert "can't be reached" in error_of(run("count-params", NAME, "--remote", "--json"))
    assert "no public model" in error_of(run("count-params", "owner/none", "--remote", "--json"))
    assert "no revision" in error_of(run("count-params", NAME, "--remote", "--revision", "v9", "--json"))
