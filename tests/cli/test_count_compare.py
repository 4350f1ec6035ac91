"""``count-params --diff`` and ``--check``."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.test_count_params import save


@pytest.fixture
def count(run: Run) -> Run:
    return lambda *args: run("count-params", *args)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "small")


def change(folder: Path, tmp_path: Path, **keys: Any) -> Path:
    """A configuration beside no weights, with some keys changed."""
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **keys}))
    return file


# --- --diff


def test_two_presets_by_hand(count: Run) -> None:
    value = count("--diff", "gpt2", "gpt2-medium", "--json").json
    assert (value["a"], value["b"]) == ("gpt2", "gpt2-medium")
    assert {"name": "layers", "a": 12, "b": 24} in value["config"]
    rows = {row["name"]: row for row in value["categories"]}
    assert rows["Embedding"]["difference"] == 50_257 * 256
    assert rows["Embedding"]["percent"] == 100 / 3
    assert value["total_stored"]["difference"] == 354_823_168 - 124_439_808
    assert value["total"]["a"] == 124_439_808 + 50_257 * 768
    new = [row for row in value["tensors"] if row["a_shape"] is None]
    assert len(new) == 12 * 16
    assert "layers" not in value
    assert len(count("--diff", "gpt2", "gpt2-medium", "--by", "layer", "--json").json["layers"]) == 28


def test_a_model_beside_itself(count: Run) -> None:
    done = count("--diff", "gpt2", "gpt2")
    assert done.code == 0
    assert b"the same tensors" in done.out
    value = count("--diff", "gpt2", "gpt2", "--json").json
    assert value["config"] == value["tensors"] == []
    assert value["total"]["difference"] == 0


def test_folders_differ_in_type_too(count: Run, small: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "small"
    shutil.copytree(small, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, other / "model.safetensors")
    value = count("--diff", small, other, "--json").json
    assert (value["a"], value["b"]) == (str(small), str(other))  # one name for both would say nothing
    assert {(row["a_dtype"], row["b_dtype"], row["difference"]) for row in value["tensors"]} == {
        ("bfloat16", "float32", 0)
    }
    assert b"of another type" in count("--diff", small, other).out


def test_diff_in_every_format(count: Run) -> None:
    header, *rows = csv.reader(io.StringIO(count("--diff", "gpt2", "gpt3", "--format", "csv").out.decode()))
    assert header == ["name", "gpt2", "gpt3", "difference", "percent"]
    assert [row[0] for row in rows][-2:] == ["Total", "Stored"]
    assert rows[-1][1:4] == ["124439808", "174604259328", str(174604259328 - 124439808)]
    tensors = list(
        csv.reader(io.StringIO(count("--diff", "gpt2", "gpt3", "--by", "tensor", "--format", "csv").out.decode()))
    )
    assert len(tensors) == 1 + 1540
    text = count("--diff", "gpt2", "gpt3", "--format", "markdown").out.decode()
    for part in text.split("\n\n")[:2]:
        assert len({line.count("|") for line in part.splitlines()}) == 1
    table = count("--diff", "gpt2", "gpt3").out.decode()
    assert "+579,000,960" not in table  # 617,558,016 - 38,597,376
    assert "+578,960,640" in table
    assert "1,540 tensors differ: 1,344 only in gpt3, 196 of another shape; --by tensor lists them" in table


@pytest.mark.parametrize("models", [(), ("gpt2",), ("gpt2", "gpt3", "gpt1")])
def test_diff_takes_two(count: Run, models: tuple[str, ...]) -> None:
    done = count("--diff", *models)
    assert (done.code, done.out) == (2, b"")
    assert str(len(models)).encode() in done.err


def test_modes_do_not_mix(count: Run) -> None:
    for args in (("--diff", "--memory"), ("--diff", "--check", "x"), ("--check", "x", "--gpus", "80GB")):
        done = count("gpt2", "gpt3", *args)
        assert (done.code, done.out) == (2, b"")
        assert b"do not go together" in done.err


# --- --check


def test_a_file_that_holds_what_the_configuration_wants(count: Run, small: Path, tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", shard_bytes=200_000)
    for model in (small, small / "config.json"):
        for file in (small, small / "model.safetensors", sharded, sharded / "model.safetensors.index.json"):
            value = count(model, "--check", file, "--json").json
            assert (value["ok"], value["tensors"], value["dtypes"]) == (True, 28, ["bfloat16"])
            assert value["parameters"] == value["expected_parameters"]
            assert [value[key] for key in ("missing", "left_over", "wrong_shape", "wrong_type")] == [[]] * 4
    done = count(small, "--check", small)
    assert (done.code, done.err) == (0, b"")
    assert b": ok, " in done.out
    assert b"28 tensors" in done.out


def test_without_a_model_the_configuration_beside_the_file_counts(
    count: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_MODEL", "fable")
    for file in (small, small / "model.safetensors"):
        assert count("--check", file).code == 0
    assert count("--check", small, "-m", "fable").code == 6
    shutil.copy(small / "model.safetensors", tmp_path / "alone.safetensors")
    assert count("--check", tmp_path / "alone.safetensors").code == 2


def test_every_fault_is_named(count: Run, small: Path, tmp_path: Path) -> None:
    config = change(small, tmp_path, n_layer=3, n_positions=8)
    done = count(config, "--check", small)
    assert done.code == 6
    listed = done.out.decode()
    assert len([line for line in listed.splitlines() if line.startswith("missing")]) == 12
    assert "h.2.mlp.c_proj.bias" in listed
    (shape,) = [line.split() for line in listed.splitlines() if line.startswith("shape")]
    assert shape == ["shape", "transformer.wpe.weight", "16", "x", "128", "8", "x", "128"]
    error = done.err.decode()
    assert "12 missing, 1 of the wrong shape" in error
    assert "h.2." in error
    done = count(config, "--check", small, "--json")
    assert done.code == 6
    value = done.json
    assert not value["ok"]
    assert len(value["missing"]) == 12
    assert value["wrong_shape"] == [{"name": "transformer.wpe.weight", "shape": [16, 128], "expected": [8, 128]}]
    assert (value["tensors"], value["expected_tensors"]) == (28, 40)
    assert json.loads(done.err)["error"]["type"] == "check"


def test_what_is_left_over_and_of_a_type_that_is_none(count: Run, small: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(small / "model.safetensors")
    tensors["adapter|x"] = torch.zeros(2)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].to(torch.int8)
    save_file(tensors, tmp_path / "odd.safetensors")
    done = count(small, "--check", tmp_path / "odd.safetensors", "--json")
    assert done.code == 6
    assert done.json["left_over"] == ["adapter|x"]
    assert done.json["wrong_type"] == [{"name": "transformer.ln_f.bias", "dtype": "I8"}]
    rows = list(
        csv.reader(io.StringIO(count(small, "--check", tmp_path / "odd.safetensors", "--format", "csv").out.decode()))
    )
    assert rows[1:] == [
        ["left over", "adapter|x", "", ""],
        ["type", "transformer.ln_f.bias", "I8", "float32 or bfloat16 or float16"],
    ]
    markdown = count(small, "--check", tmp_path / "odd.safetensors", "--format", "markdown").out.decode()
    assert "adapter\\|x" in markdown


def test_one_shard_lacks_the_others(count: Run, small: Path, tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", shard_bytes=200_000)
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    assert count(small, "--check", shard).code == 6


def test_a_damaged_file_is_3(count: Run, small: Path, tmp_path: Path) -> None:
    data = (small / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        done = count(small, "--check", tmp_path / "cut.safetensors")
        assert (done.code, done.out) == (3, b"")
    assert count(small, "--check", tmp_path / "no.safetensors").code == 3
    assert count(small, "--check", small / "config.json").code == 2
    assert count("no-such-model", "--check", small).code == 3
    assert count(small, small, "--check", small).code == 2


def test_a_model_is_checked_though_its_own_weights_are_gone(count: Run, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(small, folder)
    (folder / "model.safetensors").write_bytes(b"x")
    assert count(folder, "--check", small).code == 0


def test_a_model_is_checked_by_name_against_its_own_configuration(count: Run) -> None:
    value = count("--check", "fable", "--json").json
    assert value["ok"]
    assert value["tensors"] == value["expected_tensors"]
