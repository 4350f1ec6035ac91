"""``gptcli train --plan``: nothing is needed but a size, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.training import refused


def test_a_plan_needs_neither_data_nor_a_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("train", "--plan", "--preset", "gpt3", "--gpus", "8x141GB")
    assert (done.code, done.err) == (0, b"")
    lines = done.out.decode().splitlines()
    assert lines[0].startswith("gpt3  174,604,259,328 parameters")
    assert lines[1] == "8 cards of 141 GB: weights, gradients and optimizer sharded (FSDP)"
    assert lines[-2].startswith("It does not fit")
    assert not list(tmp_path.iterdir())


def test_a_plan_in_json_follows_the_options(run: Run) -> None:
    def plan(*args: str) -> dict[str, object]:
        done = run("train", "--plan", "--gpus", "4x80GB", "--json", *args)
        assert (done.code, done.err) == (0, b"")
        told: dict[str, object] = done.json
        return told

    told = plan("--preset", "gpt2", "--optimizer", "adamw", "--batch-tokens", "65536", "--micro-batch", "2")
    known = {"model": "gpt2", "ranks": 4, "card_bytes": 80_000_000_000, "optimizer": "adamw", "micro_batch": 2}
    known |= {"batch_tokens": 65536, "dtype": "bfloat16", "parallel": "ddp", "fits": True}
    assert told | known == told
    told = plan("--preset", "gpt2", "--parallel", "fsdp", "--dtype", "float32", "--checkpoint-activations")
    known = {"parallel": "fsdp", "dtype": "float32", "checkpoint_activations": True, "optimizer": "muon"}
    assert told | known == told


def test_sizes_from_everywhere_can_be_planned(run: Run, tmp_path: Path, tiny_folder: Path) -> None:
    def parameters(*args: str | Path) -> tuple[str | None, int]:
        told = run("train", "--plan", "--gpus", "1x8GB", "--json", *args).json
        return told["model"], told["parameters"]

    known = run("count-params", tiny_folder, "--json").json["total_stored"]
    assert parameters("--config", tiny_folder / "config.json") == ("tiny", known)
    assert parameters("--init-from", tiny_folder) == (str(tiny_folder), known)
    shape = ("--layers", "2", "--width", "32", "--heads", "4", "--context", "64")
    assert parameters(*shape, "--vocab-size", "300") == (None, known)
    assert parameters(*shape, "--tokenizer", tiny_folder) == (None, known)
    assert refused(run("train", "--plan", "--preset", "gpt9", "--json"), 3)
    assert refused(run("train", "--plan", "--config", tmp_path / "none.json", "--json"), 3)


def test_without_cards_it_is_this_machine(run: Run) -> None:
    told = run("train", "--plan", "--preset", "gpt2", "--json").json
    assert told["ranks"] >= 1
    assert told["card_bytes"] is None or told["card_bytes"] > 1e9
    assert told["fits"] in (True, False, None)


@pytest.mark.parametrize("cards", ["8", "x80GB", "0x80GB", "8x0GB", "many"])
def test_cards_that_are_none_are_refused(run: Run, cards: str) -> None:
    done = run("train", "--plan", "--preset", "gpt2", "--gpus", cards, "--json")
    assert refused(done)
    assert json.loads(done.err)["error"]["hint"]
