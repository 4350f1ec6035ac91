"""``count-params --memory``, ``--flops`` and ``--gpus``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.spec.presets import NAMES
from tests.cli.conftest import Done, Run

ALL = ("--memory", "--flops", "--gpus", "80GB")


@pytest.fixture
def count(run: Run) -> Run:
    return lambda *args: run("count-params", *args)


def counted(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    return done.json


def test_memory_of_gpt3_by_hand(count: Run) -> None:
    memory = counted(count("gpt3", "--memory", "--json"))["memory"]
    assert (memory["context"], memory["sequences"]) == (2048, 1)
    inference = {row["dtype"]: row for row in memory["inference"]}
    assert list(inference) == ["float32", "bfloat16", "int8", "int4"]
    assert inference["bfloat16"] == {
        "dtype": "bfloat16",
        "weights_bytes": 2 * 174_604_259_328,
        "kv_cache_bytes_per_token": 4_718_592,
        "kv_cache_bytes": 4_718_592 * 2048,
        "total_bytes": 2 * 174_604_259_328 + 4_718_592 * 2048,
    }
    training = {(row["optimizer"], row["dtype"]): row for row in memory["training"]}
    assert len(training) == 4
    adamw = training["adamw", "float32"]
    assert adamw["weights_bytes"] == adamw["gradients_bytes"] == 4 * 174_604_259_328
    assert adamw["optimizer_bytes"] == 8 * 174_604_259_328
    assert adamw["copies_bytes"] == 0
    assert training["muon", "bfloat16"]["optimizer_bytes"] == 8 * 174_604_259_328 - 4 * 96 * 12 * 12_288**2


def test_context_and_sequences_are_of_ones_choosing(count: Run) -> None:
    memory = counted(count("gpt2", "--memory", "--context", "100", "--sequences", "7", "--json"))["memory"]
    assert (memory["context"], memory["sequences"]) == (100, 7)
    for row in memory["inference"]:
        assert row["kv_cache_bytes"] == 700 * row["kv_cache_bytes_per_token"]
    assert counted(count("gpt2", "--flops", "--context", "100", "--json"))["flops"]["context"] == 100


def test_flops_of_gpt3_by_hand(count: Run) -> None:
    flops = counted(count("gpt3", "--flops", "--json"))["flops"]
    multiplied = 96 * 12 * 12_288**2 + 50_257 * 12_288
    assert flops["multiplied_parameters"] == multiplied
    assert flops["forward_matrices"] == 2 * multiplied
    assert flops["forward_attention"] == 4 * 96 * 12_288 * 2048
    assert flops["forward"] == flops["decode"] == flops["forward_matrices"] + flops["forward_attention"]
    assert flops["training"] == 3 * flops["forward"]
    assert flops["training_causal"] == 3 * flops["forward_causal"]
    assert flops["parameters"] == 174_604_259_328
    assert (flops["forward_rule"], flops["training_rule"]) == (2 * flops["parameters"], 6 * flops["parameters"])
    assert flops["training_rule"] * 300e9 == pytest.approx(3.14e23, rel=0.01)
    assert flops["training_causal"] * 300e9 == pytest.approx(3.14e23, rel=0.02)


def test_training_flops_are_the_plans(count: Run, run: Run) -> None:
    plan = run("train", "--plan", "--preset", "gpt2", "--gpus", "80GB", "--json").json
    assert counted(count("gpt2", "--flops", "--json"))["flops"]["training"] == plan["flops_per_token"]


def test_gpus_say_how_many_and_what_each_holds(count: Run) -> None:
    gpus = counted(count("gpt3", "--gpus", "80GB", "--json"))["gpus"]
    assert (gpus["card_bytes"], gpus["count"], gpus["context"], gpus["sequences"]) == (80 * 10**9, None, 2048, 1)
    rows = {row["dtype"]: row for row in gpus["inference"]}
    assert {dtype: row["cards"] for dtype, row in rows.items()} == {"bfloat16": 6, "int8": 3, "int4": 2}
    for row in rows.values():
        assert row["cards"] == row["tensor"] * row["pipeline"]
        assert row["card"]["total_bytes"] == max(stage["total_bytes"] for stage in row["stages"]) <= 80 * 10**9
        assert sum(stage["layers"] for stage in row["stages"]) == 96
        assert row["data"] is None
    assert rows["bfloat16"]["fewest_cards"] == 5
    assert [row["optimizer"] for row in gpus["training"]] == ["adamw", "muon"]
    for row in gpus["training"]:
        assert row["card"]["total_bytes"] <= 80 * 10**9
        assert (row["parallel"], row["fits"]) == ("fsdp", None)


def test_training_takes_as_many_cards_as_the_plan_says(count: Run, run: Run) -> None:
    gpus = counted(count("gpt3", "--gpus", "141GB", "--json"))["gpus"]
    plan = run("train", "--plan", "--preset", "gpt3", "--gpus", "8x141GB", "--json").json
    assert {row["optimizer"]: row["cards"] for row in gpus["training"]}[plan["optimizer"]] == plan["least_ranks"] == 21


def test_cards_that_are_there_hold_copies_or_do_not_do(count: Run) -> None:
    gpus = counted(count("gpt3", "--gpus", "4x80GB", "--json"))["gpus"]
    assert gpus["count"] == 4
    assert {row["dtype"]: row["data"] for row in gpus["inference"]} == {"bfloat16": 0, "int8": 1, "int4": 2}
    assert {row["fits"] for row in gpus["training"]} == {False}
    assert {row["fits"] for row in counted(count("gpt3", "--gpus", "100x80GB", "--json"))["gpus"]["training"]} == {True}
    text = count("gpt3", "--gpus", "4x80GB").out.decode()
    assert "on 4: copies" in text
    assert "2 x" in text


def test_what_no_number_of_cards_holds(count: Run) -> None:
    gpus = counted(count("gpt3", "--gpus", "1GB", "--json"))["gpus"]
    assert {row["cards"] for row in gpus["inference"] + gpus["training"]} == {None}
    text = count("gpt3", "--gpus", "2x1GB").out.decode()
    assert "no split fits" in text
    assert "no number fits" in text


def test_a_family_for_counting_only_is_not_trained(count: Run) -> None:
    assert counted(count("gpt1", *ALL, "--json"))["gpus"]["training"] == []
    assert "counting only" in count("gpt1", "--gpus", "80GB").out.decode()


@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_in_every_format(count: Run, preset: str) -> None:
    for format in ("table", "markdown", "csv", "json"):
        done = count(preset, *ALL, "--format", format)
        assert (done.code, done.err) == (0, b"")
        assert preset.encode() in done.out or format == "markdown"


def test_the_object_has_memory_and_flops_asked_for_or_not(count: Run) -> None:
    plain, all_ = counted(count("gpt2", "--json")), counted(count("gpt2", *ALL, "--json"))
    assert {name: all_[name] for name in plain} == plain
    assert all_.keys() - plain.keys() == {"gpus"}
    for view in (("--memory",), ("--flops",), ("--by", "layer"), ("--by", "tensor")):
        value = counted(count("gpt2", *view, "--json"))
        assert (value["memory"], value["flops"]) == (all_["memory"], all_["flops"])
    several = [json.loads(line) for line in count("gpt2", "gpt3", "--json").out.splitlines()]
    assert [value["flops"]["context"] for value in several] == [1024, 2048]
    assert counted(count("gpt2", "--context", "5", "--json"))["memory"]["context"] == 5
    assert counted(count("--diff", "gpt2", "gpt3", "--json")).keys().isdisjoint({"memory", "flops"})


def test_the_table_is_left_out_unless_asked_for(count: Run) -> None:
    assert b"Up-projection" not in count("gpt2", "--memory").out
    both = count("gpt2", "--memory", "--by", "category").out
    assert b"Up-projection" in both
    assert b"KV cache" in both


def test_csv_is_a_figure_a_row(count: Run) -> None:
    done = count("gpt2", "gpt3", *ALL, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.out.decode())))
    figures = {(row["model"], row["name"]): row["value"] for row in rows}
    assert len(figures) == len(rows)
    assert int(figures["gpt3", "memory.inference.bfloat16.weights_bytes"]) == 349_208_518_656
    assert int(figures["gpt2", "memory.training.adamw.float32.optimizer_bytes"]) == 8 * 124_439_808
    assert int(figures["gpt3", "gpus.inference.int8.cards"]) == 3
    assert int(figures["gpt3", "gpus.inference.int8.stages.0.layers"]) == 96
    assert figures["gpt3", "gpus.count"] == ""
    value = counted(count("gpt2", "--flops", "--json"))["flops"]
    assert {name: float(figures["gpt2", f"flops.{name}"]) for name in value} == value


def test_markdown_tables_have_one_width_each(count: Run) -> None:
    text = count("gpt2", *ALL, "--format", "markdown").out.decode()
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1


def test_a_folder_has_the_same_as_its_configuration(count: Run, tiny_folder: Path) -> None:
    folder, config = (counted(count(path, *ALL, "--json")) for path in (tiny_folder, tiny_folder / "config.json"))
    assert {**folder, "model": ""} == {**config, "model": ""}


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("gpt2", "--gpus", "80"), 2, "8x141GB"),
        (("gpt2", "--gpus", "0x80GB"), 2, "cards"),
        (("gpt2", "--memory", "--context", "0"), 2, "at least 1"),
        (("gpt2", "--memory", "--sequences", "-1"), 2, "at least 1"),
        (("gpt2", "--memory", "--context", "1025"), 4, "1,024 positions"),
        (("gpt2", "--context", "5"), 2, "--memory"),
        (("gpt2", "--memory", "--by", "layer", "--format", "csv"), 2, "CSV is one table"),
    ],
)
def test_wrong_use(count: Run, args: tuple[str, ...], code: int, told: str) -> None:
    in_json = "csv" not in args and told != "--memory"  # where --context says something alone
    done = count(*args, "--json") if in_json else count(*args)
    assert (done.code, done.out) == (code, b"")
    assert told in done.err.decode()
    if in_json:
        assert json.loads(done.err)["error"]["hint"]


def test_a_setting_for_another_command_is_no_mistake(count: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTCLI_CONTEXT", "64")
    assert count("gpt2").code == 0
    assert counted(count("gpt2", "--memory", "--json"))["memory"]["context"] == 64
    assert counted(count("gpt2", "--json"))["memory"]["context"] == 1024
    monkeypatch.setenv("GPTCLI_CONTEXT", "4096")
    assert counted(count("gpt2", "--json"))["flops"]["context"] == 1024
    monkeypatch.setenv("GPTCLI_GPUS", "8x80GB")
    assert count("--diff", "gpt2", "gpt3").code == 0
