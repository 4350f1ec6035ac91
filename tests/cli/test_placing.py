"""``--plan``, and ``--tp`` where nobody started as many processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptcli.cli import ranks
from tests.cli.conftest import Run

PLAN = ("--plan", "--gpus")


@pytest.mark.parametrize(
    "command",
    [
        ("count-params", "gpt3"),
        ("generate", "-m", "gpt3"),
        ("score", "-m", "gpt3"),
        ("serve", "-m", "gpt3", "--rows", "1"),
    ],
    ids=lambda command: command[0],
)
def test_every_command_places_gpt3(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, *PLAN, "8x141GB", "--tp", "8", "--json")
    assert done.code == 0, done.err
    told = done.json
    assert (told["model"], told["tp"], told["storage"], told["fits"], told["fewest_cards"]) == (
        "gpt3",
        8,
        "bfloat16",
        True,
        3,
    )
    assert [rank["rank"] for rank in told["ranks"]] == list(range(8))
    for rank in told["ranks"]:
        parts = ("weights", "kv_cache", "workspace", "overhead")
        assert rank["total_bytes"] == sum(rank[f"{part}_bytes"] for part in parts)
        assert rank["spare_bytes"] == 141 * 10**9 - rank["total_bytes"]
    up = next(tensor for tensor in told["tensors"] if tensor["name"] == "blocks.*.mlp.up.weight")
    assert (up["count"], up["shape"], up["part"]) == (96, [49152, 12288], [6144, 12288])
    assert up["bytes"] == 96 * 6144 * 12288 * 2


def test_for_people_it_is_two_tables_and_a_verdict(run: Run) -> None:
    said = run("count-params", "gpt3", *PLAN, "8x141GB", "--tp", "8").out.decode()
    assert "8 cards of 141 GB: dealt out over 8; 1 sequence of 2,048 tokens" in said
    assert "ranks 1-" in said
    assert "blocks.*.attention.query.weight 96 12,288 x 12,288 1,536 x 12,288 by heads" in " ".join(said.split())
    assert said.rstrip().endswith("to spare on the fullest card.")


def test_what_does_not_fit_is_5_and_told_with_what_would(run: Run) -> None:
    done = run("generate", "-m", "gpt3", *PLAN, "4x80GB", "--json")
    assert done.code == 5
    assert done.json["fits"] is False
    assert b"gpt3 does not fit" in done.err
    assert b"use --quantize int8, or --offload, or --tp 6 on 6 such cards" in done.err
    for way in (["--quantize", "int8"], ["--offload"]):
        assert run("generate", "-m", "gpt3", *PLAN, "4x80GB", *way, "--json").json["fits"] is True
    assert run("generate", "-m", "gpt3", *PLAN, "6x80GB", "--tp", "6", "--json").json["fits"] is True


def test_a_folder_is_placed_in_its_own_type_on_this_machine(run: Run, tiny_folder: Path) -> None:
    told = run("generate", "-m", tiny_folder, "--plan", "--json").json
    assert (told["model"], told["storage"], told["tp"], told["fits"]) == (tiny_folder.name, "float32", 1, True)
    assert told["cards"] >= 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("generate", "x", "--gpus", "80GB"), b"--gpus goes with --plan"),
        (("count-params", "gpt3", "--plan"), b"--plan is for one model on cards that are named"),
        (("count-params", "gpt3", *PLAN, "8x80GB", "--tp", "5"), b"96 heads can't be dealt out evenly to 5 ranks"),
        (("count-params", "gpt3", *PLAN, "2x80GB", "--tp", "4"), b"--tp 4 takes 4 cards, and there are 2"),
        (("count-params", "gpt3", *PLAN, "80GB", "--offload", "--quantize", "int8"), b"--offload keeps the weights"),
        (("count-params", "gpt3", *PLAN, "8x80"), b"names no cards"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_use(run: Run, args: tuple[str, ...], said: bytes) -> None:
    done = run(*args)
    assert done.code == 2
    assert said in done.err


@pytest.mark.parametrize("command", ["generate", "score", "predict", "serve"])
def test_without_torchrun_tp_says_how_to_start_it(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    text = [] if command == "serve" else ["x"]
    done = run(command, *text, "-m", tiny_folder, "--tp", "2")
    assert (done.code, done.out) == (2, b"")
    assert b"error: --tp 2 needs 2 processes, and this is one" in done.err
    assert f"torchrun --nproc-per-node 2 -m gptcli {command} --tp 2".encode() in done.err


def test_as_many_processes_as_ranks(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_TIME_TO_TELL", 0.0)
    place = {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for rank, said in (("0", b"--tp 2, and 4 processes were started"), ("1", b"")):
        monkeypatch.setenv("RANK", rank)
        done = run("generate", "x", "-m", tiny_folder, "--tp", "2")
        assert done.code == 2
        assert (said in done.err) if said else (done.err == b"")
        done = run("generate", "x", "--tp", "4", "--nonsense")
        assert done.code == 2
        assert (b"no such option" in done.err) if said else (done.err == b"")
    assert b"no such option" in run("count-params", "--nonsense").err  # which is not shared


def test_offload_on_a_cpu_moves_nothing_and_says_so(run: Run, tiny_folder: Path) -> None:
    asked = ("generate", "Once", "-m", tiny_folder, "-n", "5", "--seed", "1", "--device", "cpu")
    plain, offloaded = run(*asked), run(*asked, "--offload")
    assert plain.out == offloaded.out
    assert b"nothing is moved" in offloaded.err
    assert run(*asked, "--offload", "--quantize", "int8").code == 2
