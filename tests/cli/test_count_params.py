"""``gptcli count-params``: the lecture's numbers, and the same report whatever names a model."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.spec.presets import NAMES
from tests.cli.conftest import Done, Run

CATEGORIES = ["Embedding", "Key", "Query", "Value", "Output", "Up-projection", "Down-projection", "Unembedding"]
OTHERS = ["Positions", "Biases", "Norms"]


@pytest.fixture
def count(run: Run) -> Run:
    """``gptcli count-params``."""
    return lambda *args: run("count-params", *args)


def counted(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return done.json


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a GPT-2 with heads of 64, which is what a lone weight file is taken to have."""
    return save(tmp_path_factory.mktemp("models") / "small")


def save(folder: Path, **more: Any) -> Path:
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import from_hf

    raw = {"model_type": "gpt2", "vocab_size": 40, "n_positions": 16, "n_embd": 128, "n_layer": 2, "n_head": 2}
    save_folder(random_model(from_hf(raw), seed=1), folder, dtype=DTYPES["bfloat16"], **more)
    return folder


# --- The numbers


def test_gpt3_is_as_the_lecture_counts_it(count: Run) -> None:
    value = counted(count("gpt3", "--json"))
    assert value["matrices"] == 27_938
    assert value["matrix_parameters"] == 175_181_291_520
    rows = {row["name"]: (row["matrices"], row["shape"], row["parameters"]) for row in value["categories"]}
    assert rows == {
        "Embedding": (1, [12_288, 50_257], 617_558_016),
        "Key": (96 * 96, [128, 12_288], 14_495_514_624),
        "Query": (96 * 96, [128, 12_288], 14_495_514_624),
        "Value": (96 * 96, [128, 12_288], 14_495_514_624),
        "Output": (96, [12_288, 12_288], 14_495_514_624),
        "Up-projection": (96, [49_152, 12_288], 57_982_058_496),
        "Down-projection": (96, [12_288, 49_152], 57_982_058_496),
        "Unembedding": (1, [50_257, 12_288], 617_558_016),
    }


def test_gpt2_is_what_its_file_holds(count: Run) -> None:
    value = counted(count("gpt2", "--json"))
    assert value["total_stored"] == 124_439_808
    assert value["total"] == 124_439_808 + 50_257 * 768
    assert {row["name"]: row["parameters"] for row in value["other"]} == {
        "Positions": 1024 * 768,
        "Biases": 12 * (3 * 768 + 768 + 3072 + 768),
        "Norms": 25 * 2 * 768,
    }


def test_gpt1_is_here_for_counting(count: Run) -> None:
    assert counted(count("gpt1", "--json"))["total_stored"] == 116_534_784


# --- JSON


def test_json_has_the_fields_of_the_contract(count: Run) -> None:
    value = counted(count("gpt3", "--json"))
    fields = {
        "model",
        "config",
        "categories",
        "matrices",
        "matrix_parameters",
        "other",
        "total",
        "total_stored",
        "tied",
        "memory",
        "flops",
    }
    assert value.keys() == fields
    assert (value["model"], value["tied"]) == ("gpt3", True)
    assert [row["name"] for row in value["categories"]] == CATEGORIES
    assert [row["name"] for row in value["other"]] == OTHERS
    for row in value["categories"]:
        assert row.keys() == {"name", "matrices", "shape", "parameters", "percent", "tied"}
        assert row["matrices"] * row["shape"][0] * row["shape"][1] == row["parameters"]
        assert row["tied"] == (row["name"] == "Unembedding")
    assert all(row.keys() == {"name", "parameters"} for row in value["other"])
    assert {"layers": 96, "width": 12_288, "heads": 96, "context": 2_048}.items() <= value["config"].items()


@pytest.mark.parametrize("preset", NAMES)
def test_the_sums_agree(count: Run, preset: str) -> None:
    value = counted(count(preset, "--json"))
    assert sum(row["matrices"] for row in value["categories"]) == value["matrices"]
    assert sum(row["parameters"] for row in value["categories"]) == value["matrix_parameters"]
    assert sum(row["percent"] for row in value["categories"]) == pytest.approx(100)
    assert value["total"] == value["matrix_parameters"] + sum(row["parameters"] for row in value["other"])
    tied = sum(row["parameters"] for row in value["categories"] if row["tied"])
    assert value["total_stored"] == value["total"] - tied
    assert value["tied"] == (tied > 0)


def test_several_models_are_an_object_a_line(count: Run) -> None:
    done = count("gpt2", "gpt3", "gpt2-xl", "--json")
    assert [json.loads(line)["model"] for line in done.out.splitlines()] == ["gpt2", "gpt3", "gpt2-xl"]
    assert count("gpt2", "--format", "json").out == count("gpt2", "--json").out


# --- For people and sheets


def test_the_table(count: Run) -> None:
    done = count("gpt3")
    assert (done.code, done.err) == (0, b"")
    table = done.out.decode()
    assert table.startswith("gpt3")
    assert "27,938 matrices" in table
    assert "175,181,291,520" in table
    places = [table.index(name) for name in [*CATEGORIES, *OTHERS]]
    assert places == sorted(places)
    assert "\x1b" not in table
    assert "tied" in table.lower()


def test_several_tables(count: Run) -> None:
    assert count("gpt2", "gpt3").out == count("gpt2").out + b"\n" + count("gpt3").out


def test_csv_is_plain_numbers(count: Run) -> None:
    header, *rows = csv.reader(io.StringIO(count("gpt2", "gpt3", "--format", "csv").out.decode()))
    table = [dict(zip(header, row, strict=True)) for row in rows]
    assert header == ["model", "name", "matrices", "rows", "columns", "parameters", "percent", "tied"]
    for model in ("gpt2", "gpt3"):
        value = counted(count(model, "--json"))
        mine = [row for row in table if row["model"] == model]
        assert [row["name"] for row in mine][:11] == CATEGORIES + OTHERS
        for row, category in zip(mine, value["categories"], strict=False):
            assert int(row["parameters"]) == category["parameters"]
            assert [int(row["rows"]), int(row["columns"])] == category["shape"]
            assert int(row["matrices"]) == category["matrices"]
            assert float(row["percent"]) == category["percent"]
            assert row["tied"] == str(category["tied"]).lower()
        totals = {row["name"]: int(row["parameters"]) for row in mine[11:]}
        assert totals == {"Total": value["total"], "Stored": value["total_stored"]}


def test_markdown_is_a_table(count: Run) -> None:
    lines = count("gpt2", "--format", "markdown").out.decode().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    assert set(lines[1]) <= set("|-: ")
    assert any("38,597,376" in line for line in lines)
    assert any("124,439,808" in line for line in lines)


# --- Whatever names it


def test_folder_config_file_and_preset_of_one_shape_count_alike(count: Run, tmp_path: Path) -> None:
    from gptcli.spec.config import to_hf
    from gptcli.spec.presets import read_preset

    (tmp_path / "config.json").write_text(json.dumps(to_hf(read_preset("gpt2"))))
    preset = counted(count("gpt2", "--json"))
    for name in (tmp_path, tmp_path / "config.json"):
        value = counted(count(name, "--json"))
        assert {**value, "model": "", "config": {}} == {**preset, "model": "", "config": {}}


def test_folder_config_and_weights_count_alike(count: Run, small: Path, tmp_path: Path) -> None:
    folder = count(small, "--json")
    assert folder.err == b""
    value = counted(folder)
    assert value["model"] == "small"
    shutil.copy(small / "model.safetensors", tmp_path / "alone.safetensors")
    for name in (small / "config.json", small / "model.safetensors"):
        same = counted(count(name, "--json"))
        assert {**same, "model": ""} == {**value, "model": ""}
    alone = count(tmp_path / "alone.safetensors", "--json")
    assert b"64" in alone.err  # the heads are assumed, and it says so
    same = counted(alone)
    for key in value.keys() - {"model", "config"}:
        assert same[key] == value[key], key


def test_shards_are_counted_through_their_index(count: Run, small: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "sharded", shard_bytes=200_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    value = counted(count(small, "--json"))
    for name in (folder, folder / "model.safetensors.index.json"):
        assert counted(count(name, "--json"))["categories"] == value["categories"]
    done = count(shards[0])
    assert (done.code, done.out) == (3, b"")
    assert b"index.json" in done.err
    shards[0].unlink()
    assert count(folder).code == 3


def test_no_tensor_is_read(count: Run, small: Path, tmp_path: Path) -> None:
    """Data that is not there on the disk, in a file as long as it says, is no hindrance."""
    file = small / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little") + 8
    sparse = tmp_path / "sparse"
    sparse.mkdir()
    shutil.copy(small / "config.json", sparse)
    with (sparse / "model.safetensors").open("wb") as stream:
        stream.write(file.read_bytes()[:length])
        stream.truncate(file.stat().st_size)
    assert counted(count(sparse, "--json"))["total"] == counted(count(small, "--json"))["total"]


def test_a_header_that_contradicts_the_config_is_3(count: Run, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "contradicting"
    shutil.copytree(small, folder)
    config = json.loads((folder / "config.json").read_text())
    for key, value, told in (("n_embd", 64, "wants"), ("n_layer", 3, "missing"), ("n_layer", 1, "left over")):
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        for name in (folder, folder / "model.safetensors"):
            done = count(name, "--json")
            assert (done.code, done.out) == (3, b"")
            error = json.loads(done.err)["error"]
            assert error["type"] == "corrupt"
            assert told in error["message"]


def test_a_cut_file_is_3(count: Run, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(small, folder)
    data = (small / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        assert count(folder).code == 3


def test_text_as_every_other_command_has_it_is_the_table(
    count: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = count("gpt2").out
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "gptcli").mkdir()
    (tmp_path / "gptcli" / "config.toml").write_text('format = "text"\n')
    done = count("gpt2")
    assert (done.code, done.out) == (0, table)
    assert count("gpt2", "--json").json["model"] == "gpt2"


def test_what_is_no_model(count: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert count(tmp_path / "notes.txt").code == 2
    assert count(tmp_path).code == 3
    unknown = count("gpt5")
    assert unknown.code == 3
    assert b"gpt3" in unknown.err
    assert count("gpt2", "--format", "xml").code == 2
    assert count("gpt2", "--json", "--format", "csv").code == 2
    assert count("gpt2", "--json", "--format", "text").code == 2
    # Nothing of the first is lost, and the second is an error.
    both = count("gpt2", "gpt5", "--json")
    assert both.code == 3
