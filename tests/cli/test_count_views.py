"""``count-params --by``: layer and tensor, in every format, at every width."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.count_open import Counted
from gptcli.cli.count_views import view_text
from gptcli.cli.out import Output
from gptcli.spec.params import count_params
from gptcli.spec.presets import NAMES, read_preset
from tests.cli.conftest import Done, Run

BLOCK = {"attention": 4 * 768**2, "mlp": 2 * 768 * 3072, "norms": 2 * 2 * 768, "biases": 4 * 768 + 3072 + 768}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def count(run: Run) -> Run:
    return lambda *args: run("count-params", *args)


def counted(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return done.json


def sheet(done: Done) -> list[dict[str, str]]:
    assert done.code == 0, done.err
    return list(csv.DictReader(io.StringIO(done.out.decode())))


# --- By layer


def test_layers_of_gpt2_by_hand(count: Run) -> None:
    value = counted(count("gpt2", "--by", "layer", "--json"))
    plain = counted(count("gpt2", "--json"))
    assert {name: value[name] for name in plain} == plain  # the contract's object, and more
    layers = value["layers"]
    assert [row["name"] for row in layers] == [
        *("Embedding", "Positions", *(f"Block {i}" for i in range(12)), "Final norm", "Unembedding")
    ]
    for row in layers[2:14]:
        assert BLOCK.items() <= row.items()
        assert row["parameters"] == sum(BLOCK.values()) == 7_087_872
    assert [row["layer"] for row in layers[1:4]] == [None, 0, 1]
    assert layers[0]["parameters"] == layers[-1]["parameters"] == 50_257 * 768
    assert [row["tied"] for row in layers] == [False] * 15 + [True]
    assert sum(row["parameters"] for row in layers) == value["total"]
    assert sum(row["percent"] for row in layers) == pytest.approx(100)


def test_layers_in_a_pipe_are_all_there(count: Run) -> None:
    lines = count("gpt3", "--by", "layer").out.decode().splitlines()
    blocks = [line for line in lines if line.startswith("Block ")]
    assert len(blocks) == 96
    assert blocks[95].split()[2:] == [
        *("603,979,776", "1,207,959,552", "49,152", "110,592", "1,812,099,072", "1.03", "%")
    ]
    assert lines[-1].split()[-3] == "175,221,817,344"
    assert "\x1b" not in "".join(lines)


# --- By tensor


def test_tensors_under_our_names_and_the_files(count: Run, tiny_folder: Path) -> None:
    value = counted(count(tiny_folder, "--by", "tensor", "--json"))
    tensors = {row["name"]: row for row in value["tensors"]}
    assert len(tensors) == 2 + 2 * 16 + 2
    assert sum(row["parameters"] for row in value["tensors"]) == value["total_stored"]
    assert sum(row["percent"] for row in value["tensors"]) == pytest.approx(100)
    assert tensors["blocks.1.attention.key.weight"] == {
        "name": "blocks.1.attention.key.weight",
        "category": "Key",
        "layer": 1,
        "shape": [32, 32],
        "parameters": 1024,
        "percent": 100 * 1024 / value["total_stored"],
        "disk_name": "transformer.h.1.attn.c_attn.weight",
        "disk_shape": [32, 96],
        "dtype": "float32",
    }


def test_the_names_are_those_in_the_file(count: Run, tiny_folder: Path) -> None:
    from gptcli.spec.index import read_folder

    value = counted(count(tiny_folder, "--by", "tensor", "--json"))
    infos = read_folder(tiny_folder)
    assert {row["disk_name"] for row in value["tensors"]} == set(infos)
    for row in value["tensors"]:
        assert tuple(row["disk_shape"]) == infos[row["disk_name"]].shape


def test_on_paper_there_is_no_type(count: Run) -> None:
    value = counted(count("gpt2", "--by", "tensor", "--json"))
    assert {row["dtype"] for row in value["tensors"]} == {None}
    assert value["tensors"][0]["disk_name"] == "transformer.wte.weight"
    assert b"type" not in count("gpt2", "--by", "tensor").out.splitlines()[1]


# --- Every format


@pytest.mark.parametrize("by", ["layer", "tensor"])
def test_csv_is_the_json_in_plain_numbers(count: Run, by: str) -> None:
    rows = sheet(count("gpt2", "gpt1", "--by", by, "--format", "csv"))
    both = [json.loads(line) for line in count("gpt2", "gpt1", "--by", by, "--json").out.splitlines()]
    wanted = [(value["model"], row) for value in both for row in value[f"{by}s"]]
    assert len(rows) == len(wanted)
    for row, (model, value) in zip(rows, wanted, strict=True):
        assert (row["model"], row["name"]) == (model, value["name"])
        assert int(row["parameters"]) == value["parameters"]
        assert float(row["percent"]) == value["percent"]
    if by == "tensor":
        assert rows[0]["shape"] == "50257x768"


@pytest.mark.parametrize("by", ["layer", "tensor"])
def test_markdown_is_one_table(count: Run, by: str) -> None:
    lines = count("gpt2", "--by", by, "--format", "markdown").out.decode().splitlines()
    assert lines[0].startswith("| gpt2 | ")
    assert set(lines[1]) == {"|", "-", ":"}
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + (16 if by == "layer" else 196) + 1


def test_by_what_it_is_not(count: Run) -> None:
    done = count("gpt2", "--by", "head")
    assert done.code == 2
    assert b"category, layer, tensor" in done.err


# --- Terminals


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A view on a terminal of some size."""

    def draw(name: str, by: str, columns: int, lines: int = 40) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        config = read_preset(name)
        out = Output(Terminal(), io.StringIO())
        out.color = "never"
        return view_text(Counted(name, config), count_params(config), by, out)

    return draw


@pytest.mark.parametrize("by", ["category", "layer", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_wider_than_the_terminal(drawn: Any, name: str, by: str) -> None:
    report = count_params(read_preset(name))
    for columns in (80, 120, 200):
        lines = drawn(name, by, columns)
        assert max(map(len, lines)) <= columns
        total = report.total if by == "layer" else report.total_stored
        assert any(f"{total:,}" in line for line in lines)


def test_bars_grow_with_the_terminal(drawn: Any) -> None:
    longest = [max(line.count("█") for line in drawn("gpt3", "category", columns)) for columns in (80, 100, 200)]
    assert longest[0] >= 8
    assert longest == sorted(set(longest))
    for columns in (80, 200):
        rows = drawn("gpt3", "category", columns)[:8]
        shares = [float(row.split("%")[0].split()[-1]) for row in rows]
        bars = [row.count("█") for row in rows]
        assert bars[5] == bars[6] == max(bars)  # the projections
        assert bars[1] == pytest.approx(max(bars) * shares[1] / shares[5], abs=1)
    assert not any("█" in line for line in drawn("gpt3", "category", 70))


def test_all_four_kinds_stand_beside_a_layer_in_80_columns(drawn: Any) -> None:
    for name in NAMES:
        heading = drawn(name, "layer", 80)[0].split()
        assert heading[:5] == ["attention", "MLP", "norms", "biases", "parameters"]


def test_long_models_are_summed_up_on_a_terminal(drawn: Any) -> None:
    layers = drawn("gpt3", "layer", 120)
    assert len(layers) < 15
    assert any("93 more, all alike" in line for line in layers)
    assert len(drawn("gpt3", "layer", 120, 200)) > 100  # where there is room
    tensors = drawn("gpt3", "tensor", 120)
    assert len(tensors) < 40
    (rest,) = [line for line in tensors if "alike in blocks 1 to 95" in line]
    assert "1,520" in rest
    assert f"{95 * 1_812_099_072:,}" in rest
