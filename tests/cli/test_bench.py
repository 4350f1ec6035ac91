"""``gptcli bench``: what it tells, that its figures agree with each other, what it refuses. Nothing is timed here."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.cli.out import Output
from gptcli.core import measure
from gptcli.core.measure import Machine
from gptcli.train import measure as train_measure
from tests.cli.conftest import Run

CONTEXT, WIDTH, LAYERS, VOCABULARY = 64, 32, 2, 300  # of the tiny model


@pytest.fixture
def bench(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """``gptcli bench`` of the tiny model in float32, with little text and a machine that is quickly measured."""
    monkeypatch.setattr(measure, "TEXT_BYTES", 50_000)
    monkeypatch.setattr(measure, "ALONE_BYTES", 20_000)
    found = iter([Machine(2e9, 4e9, "float32"), Machine(3e9, 3e9, "float32")] * 2)
    monkeypatch.setattr(measure, "measure_machine", lambda device, dtype: next(found))
    fixed = ("-m", tiny_folder, "--dtype", "float32", "--rounds", "2", "--threads", "1")
    threads = torch.get_num_threads()
    yield lambda *args, **more: run("bench", *fixed, *args, **more)
    torch.set_num_threads(threads)


def figures(bench: Run, *args: str) -> Iterator[Any]:
    done = bench("--json", *args)
    assert (done.code, done.err) == (0, b"")
    return iter(done.json["figures"])


def test_json_is_one_object_with_all_parts_in_order(bench: Run, tiny_folder: Path) -> None:
    done = bench("--json", "--tokens", "4")
    assert (done.code, done.err, done.out.count(b"\n")) == (0, b"", 1)
    told = done.json
    parts = ["load", "prefill", "decode", "decode", "decode", "train", "tokenize"]
    assert [figure["part"] for figure in told["figures"]] == parts
    assert [figure.get("batch") for figure in told["figures"]] == [None, 1, 1, 8, 32, None, None]
    assert (told["model"], told["device"], told["dtype"], told["quantize"]) == ("tiny", "cpu", "float32", "none")
    assert told["left_out"] == []
    # The best of what was measured at the beginning and at the end.
    assert told["machine"] == {"bytes_per_second": 3e9, "flops_per_second": 4e9, "flops_dtype": "float32"}


def test_figures_agree_with_each_other(bench: Run) -> None:
    for figure in figures(bench, "--tokens", "4", "--batch", "1,3"):
        seconds = figure["seconds"]
        assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
        assert figure["rounds"] == 2
        assert figure["fraction"] == pytest.approx(figure["limit_seconds"] / seconds["median"])
        for name in {"tokens_per_second", "bytes_per_second"} & figure.keys():
            rate = figure[name]
            assert rate["least"] <= rate["median"] <= rate["most"]
            work = rate["median"] * seconds["median"]
            assert rate["least"] * seconds["most"] == pytest.approx(work)
            assert rate["most"] * seconds["least"] == pytest.approx(work)
        if figure["part"] in ("prefill", "decode", "train"):
            moved, computed = (figure["bytes"] or 0) / 3e9, figure["flops"] / 4e9
            assert figure["limit_seconds"] == pytest.approx(max(moved, computed))
            assert figure["limit"] == ("memory" if moved > computed else "arithmetic")


def test_decode_reads_the_weights_once_a_step_and_the_cache_of_each_row(bench: Run) -> None:
    blocks = LAYERS * (12 * WIDTH**2 + 13 * WIDTH)
    weights = 4 * (blocks + 2 * WIDTH + VOCABULARY * WIDTH)
    for figure, batch in zip(
        figures(bench, "--prompt", "5", "--tokens", "4", "--only", "decode"), (1, 8, 32), strict=True
    ):
        assert (figure["batch"], figure["prompt_tokens"], figure["new_tokens"]) == (batch, 5, 4)
        # Three steps behind the first token: each sees one token more, itself among them.
        cache = 2 * 4 * LAYERS * WIDTH * batch * (6 + 7 + 8)
        assert figure["bytes"] == 3 * weights + cache
        matrices = 2 * (12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH)
        assert figure["flops"] == batch * (3 * matrices + 4 * LAYERS * WIDTH * (6 + 7 + 8))
        assert figure["tokens_per_second"]["median"] * figure["seconds"]["median"] == pytest.approx(3 * batch)


def test_prefill_computes_logits_of_the_last_token_only(bench: Run) -> None:
    (figure,) = figures(bench, "--prompt", "10", "--only", "prefill")
    attention = 4 * LAYERS * WIDTH * sum(range(1, 11))
    assert figure["flops"] == 2 * (10 * 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH) + attention
    assert figure["tokens_per_second"]["median"] * figure["seconds"]["median"] == pytest.approx(10)


def test_load_reads_the_file_and_train_takes_whole_rows(bench: Run, tiny_folder: Path) -> None:
    load, train = figures(bench, "--only", "train,load")  # in the order of the work
    assert (load["part"], train["part"]) == ("load", "train")
    assert load["bytes"] == (tiny_folder / "model.safetensors").stat().st_size
    assert load["limit"] == "reading the files"
    assert train["batch_tokens"] % CONTEXT == 0
    matrices = 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH
    assert train["flops"] == train["batch_tokens"] * (6 * matrices + 12 * LAYERS * WIDTH * CONTEXT)


def test_the_model_is_as_it_was(bench: Run, tiny_folder: Path) -> None:
    """Training trains a copy."""
    before = (tiny_folder / "model.safetensors").read_bytes()
    assert bench("--only", "train").code == 0
    assert sorted(file.name for file in tiny_folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tiny_folder / "model.safetensors").read_bytes() == before


def test_text_is_a_table(bench: Run) -> None:
    done = bench("--prompt", "8", "--tokens", "2", "--batch", "2")
    assert (done.code, done.err) == (0, b"")
    lines = done.out.decode().splitlines()
    assert lines[0].startswith("tiny on cpu in float32, ")
    *lines, record = lines  # of a pipe the last line is what --json gives
    told = json.loads(record)
    assert [figure["part"] for figure in told["figures"]] == ["load", "prefill", "decode", "train", "tokenize"]
    names = ["load", "prefill 8", "decode 8 + 2, batch 2", "train 2048 a step", "tokenize"]
    assert [line.split("  ")[0] for line in lines[2:-1]] == names
    assert lines[-1] == "the machine: memory 3.0 GB/s, products in float32 4.0 GFLOP/s"
    assert all("%" in line for line in lines[2:-1])


def test_a_terminal_is_spared_the_record(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "on_terminal", property(lambda self: True))
    done = bench("--only", "prefill", "--prompt", "3")
    assert done.out.decode().splitlines()[-1].startswith("the machine:")


def test_what_is_measured_is_told_with_v(bench: Run) -> None:
    done = bench("-v", "--only", "prefill", "--prompt", "3")
    assert done.err.decode().splitlines()[1:] == [
        f"measuring {what}" for what in ("the machine", "prefill 3", "the machine")
    ]


def test_what_memory_is_too_small_for_is_left_out_unless_asked_for(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_measure.runtime, "free_memory_bytes", lambda: 1000)
    done = bench("--json", "--tokens", "2", "--batch", "1")
    assert done.code == 0
    assert b"note: train is left out" in done.err
    assert [each["part"] for each in done.json["left_out"]] == ["train"]
    assert "train" not in [figure["part"] for figure in done.json["figures"]]
    asked = bench("--only", "train", "--json")
    assert (asked.code, asked.out) == (5, b"")
    assert json.loads(asked.err)["error"]["type"] == "resource"


def test_ctrl_c_keeps_what_is_done(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "measure_decode", lambda *args: signal.raise_signal(signal.SIGINT))
    done = bench("--json", "--only", "prefill,decode")
    assert done.code == 130
    assert [figure["part"] for figure in done.json["figures"]] == ["prefill"]


def test_rounds_end_early_where_they_take_too_long(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PATIENCE_SECONDS", 0.0)
    assert [figure["rounds"] for figure in figures(bench, "--only", "prefill,tokenize")] == [1, 1]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--only", "prefill,nothing"), 2),
        (("--only", ""), 2),
        (("--batch", "0"), 2),
        (("--batch", "1,x"), 2),
        (("--batch", ""), 2),
        (("--rounds", "0"), 2),
        (("--tokens", "1"), 2),
        (("--prompt", "0"), 2),
        (("--prompt", str(CONTEXT + 1)), 4),
        (("--prompt", str(CONTEXT), "--only", "decode"), 4),
        (("--tokens", str(CONTEXT)), 4),
    ],
    ids=str,
)
def test_wrong_use(bench: Run, options: tuple[str, ...], code: int) -> None:
    done = bench(*options)
    assert (done.code, done.out) == (code, b"")
