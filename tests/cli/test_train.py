"""``gptcli train``: a text in, a model folder out that every command opens; the same seed, the same weights."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import SIZE, Run
from tests.cli.training import SENTENCES, TEXT, checkpoint_names, events, of_kind, refused
from tests.conftest import ROOT

# --- What comes out


def test_a_trained_folder_opens_in_every_command(train: Run, run: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = events(train(text, "--vocab-size", "280", "--steps", "4", "--valid", text))
    assert told[-1]["event"] == "done"
    names = {file.name for file in out.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "train.toml", "checkpoints"),
    }
    assert checkpoint_names(out) == ["step-000000004"]
    assert run("models", "verify", out).code == 0
    shown = run("models", "show", out, "--json").json
    assert shown["config"] | {"vocab_size": 280, "layers": 1, "heads": 2, "width": 16, "context": 16} == shown["config"]
    assert shown["dtype"] == "float32"
    assert run("count-params", out, "--json").json["total_stored"] == shown["parameters"] == told[0]["parameters"]
    made = run("generate", "-m", out, "The king", "-n", "3", "--seed", "1", "--json").json
    assert len(made["tokens"]) == 3
    assert run("generate", "-m", out, "", "-n", "3", "--seed", "1").code == 0
    assert run("tokenize", "-m", out, "--special", "parse", "<|endoftext|>").out == b"0\n"


def test_events_are_lines_in_order_and_in_metrics(train: Run, text: Path, tmp_path: Path) -> None:
    told = events(train(text, "--steps", "4", "--eval-every", "2", "--save-every", "2", "--valid", text, "--seed", "3"))
    half = ["step", "step", "eval", "sample", "save"]
    assert [event["event"] for event in told] == ["start", *half, *half, "done"]
    assert told == [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    start = told[0]
    known = {"seed": 3, "device": "cpu", "dtype": "float32", "steps": 4, "minutes": None, "batch_tokens": 64}
    known |= {"step": 0, "tokens": 0, "optimizer": "muon", "micro_batch": 4, "accumulate": 1, "resumed": False}
    known |= {"compile": False, "checkpoint_activations": False, "ranks": 1, "parallel": "none"}
    assert start | known == start
    assert start["flops_per_token"] > 0
    steps = of_kind("step", told)
    assert [(step["step"], step["tokens"]) for step in steps] == [(1, 64), (2, 128), (3, 192), (4, 256)]
    for number, step in enumerate(steps, 1):
        assert step["loss"] > 0
        assert step["grad_norm"] > 0
        assert step["tokens_per_second"] > 0
        assert step["seconds"] > 0
        assert 0 < step["lr"] <= 0.005
        assert (step["progress"], step["skipped"]) == (number / 4, False)
    assert [step["seconds"] for step in steps] == sorted(step["seconds"] for step in steps)
    first, last = of_kind("eval", told)
    assert list(last["valid"]) == ["text"]
    assert last["bits_per_byte"] == last["valid"]["text"]
    assert last["best"] == min(first["bits_per_byte"], last["bits_per_byte"])
    sample = of_kind("sample", told)[0]
    assert (sample["prompt"], sample["seed"], type(sample["text"])) == ("", 3, str)
    saves = of_kind("save", told)
    assert [save["path"] for save in saves] == [str(tmp_path / "out")] * 2
    assert [Path(save["checkpoint"]).name for save in saves] == checkpoint_names(tmp_path / "out")
    done = told[-1]
    assert (done["step"], done["tokens"], done["skipped"], done["bits_per_byte"]) == (4, 256, 0, last["best"])


def test_for_people_the_answer_is_the_folder_and_the_rest_is_talk(
    run: Run, text: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    done = run("train", text, "-o", tmp_path / "out", "--tokenizer", tiny_folder, *SIZE, "--steps", "2")
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n".encode())
    assert b"note: seed " in done.err
    quiet = run("train", text, "-o", tmp_path / "q", "--tokenizer", tiny_folder, *SIZE, "--steps", "2", "-q")
    assert (quiet.code, quiet.err) == (0, b"")


def test_the_run_can_be_read_in_train_toml(train: Run, text: Path, tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    events(
        train(text, "--steps", "2", "--lr", "0.005", "--seed", "9", "--micro-batch", "2", "--sample-prompt", 'ö "\\')
    )
    asked = tomllib.loads((tmp_path / "out" / "train.toml").read_text())
    assert (asked["data"], asked["sample_prompt"]) == ([str(text)], 'ö "\\')
    assert (asked["lr"], asked["seed"], asked["steps"], asked["layers"]) == (0.005, 9, 2, 1)
    assert (asked["dtype"], asked["save_dtype"]) == ("float32", "float32")
    assert (asked["optimizer"], asked["vocab_size"], asked["micro_batch"]) == ("muon", 300, 2)


def test_windows_and_scalings_are_toml_too(text: Path, tmp_path: Path, run: Run) -> None:
    """A model of another family is gone on with; TOML has no null."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    config = json.loads((ROOT / "tests" / "data" / "golden" / "qwen2" / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    done = run(
        "train", text, "-o", out, "--config", tmp_path / "config.json", "--vocab-size", "280", "--steps", "1", "-q"
    )
    assert done.code == 0, done.err
    asked = tomllib.loads((out / "train.toml").read_text())
    assert asked["windows"] == [0, 5, 5]
    assert asked["rope_scaling"]["original_context"] == 48
    assert "attention_factor" not in asked["rope_scaling"]


def test_the_same_seed_gives_the_same_weights_to_the_bit(train: Run, text: Path, tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        args = ("--steps", "6", "--seed", seed, "--vocab-size", "280", "-o", tmp_path / name)
        told = events(train(text, *args))
        losses = [event["loss"] for event in told if event["event"] == "step"]
        weights[name] = (losses, (tmp_path / name / "model.safetensors").read_bytes())
    assert weights["a"] == weights["b"]
    assert weights["a"][1] != weights["c"][1]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_the_loss_falls_on_what_can_be_learned_by_heart(train: Run, run: Run, tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abcdefgh" * 60)
    told = events(train(tmp_path / "abc", "--steps", "60", "--lr", "0.02", "--seed", "1", "--valid", tmp_path / "abc"))
    losses = [event["loss"] for event in told if event["event"] == "step"]
    assert losses[0] == pytest.approx(5.7, abs=0.2)  # ln 300: all tokens alike
    assert losses[-1] < 0.3
    evaluations = [event for event in told if event["event"] == "eval"]
    assert evaluations[-1]["bits_per_byte"] < 1
    done = run("generate", "-m", tmp_path / "out", "abcdefghab", "-n", "4", "-t", "0", "--color", "never")
    assert done.out == b"cdef"


def test_save_dtype(train: Run, run: Run, text: Path, tmp_path: Path) -> None:
    events(train(text, "--steps", "1", "--save-dtype", "bfloat16"))
    assert run("models", "show", tmp_path / "out", "--json").json["dtype"] == "bfloat16"


# --- How long


def test_steps_from_tokens_and_epochs(train: Run, text: Path, tmp_path: Path) -> None:
    (start, *_) = events(train(text, "--steps", "3", "-o", tmp_path / "steps"))
    assert (start["steps"], start["batch_tokens"]) == (3, 64)
    (start, *_) = events(train(text, "--tokens", "200", "-o", tmp_path / "tokens"))
    assert start["steps"] == round(200 / 64)
    (start, *_) = events(train(text, "--epochs", "2.5", "-o", tmp_path / "epochs"))
    assert start["steps"] == round(2.5 * start["train_tokens"] / 64)
    told = events(train(text, "-o", tmp_path / "default"))
    assert told[0]["steps"] == round(told[0]["train_tokens"] / 64)
    assert told[-1]["step"] == told[0]["steps"]


def test_minutes(train: Run, text: Path) -> None:
    told = events(train(text, "--minutes", "0.005"))
    assert (told[0]["steps"], told[0]["minutes"]) == (None, 0.005)
    assert told[-1]["seconds"] >= 0.3
    assert told[-1]["step"] >= 1
    assert told[-2]["event"] == "save"
    assert told[-2]["step"] == told[-1]["step"]


# --- Where it goes


def test_a_folder_that_holds_a_model_is_left_alone_unless_forced(train: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    events(train(text, "--steps", "1", "--seed", "1"))
    before = (out / "model.safetensors").read_bytes()
    assert "config.json" in refused(train(text, "--steps", "2", "--seed", "2"))
    assert (out / "model.safetensors").read_bytes() == before
    events(train(text, "--steps", "2", "--seed", "2", "--force"))
    assert (out / "model.safetensors").read_bytes() != before


def test_a_folder_that_holds_something_else_is_used(train: Run, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    events(train(text, "--steps", "1"))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_output_that_can_not_be_made_is_1(train: Run, text: Path, tmp_path: Path) -> None:
    refused(train(text, "--steps", "1", "-o", text), 1)
    refused(train(text, "--steps", "1", "-o", text / "below"), 1)


# --- The data


def test_packed_data_and_stdin_are_the_same_data(train: Run, text: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "text.xz").write_bytes(lzma.compress(TEXT.encode()))
    results = []
    for i, (name, stdin) in enumerate(
        (
            (text, None),
            (tmp_path / "text.gz", None),
            (tmp_path / "text.xz", None),
            ("-", TEXT.encode()),
            (None, TEXT.encode()),
        )
    ):
        named = [name] if name else []  # a pipe needs no name
        told = events(train(*named, "--steps", "2", "--seed", "1", "-o", tmp_path / str(i), stdin=stdin))
        results.append((told[0]["train_bytes"], told[0]["train_tokens"], told[1]["loss"], told[2]["loss"]))
    assert results == [results[0]] * 5


def test_a_file_named_twice_counts_twice(train: Run, text: Path, tmp_path: Path) -> None:
    once = events(train(text, "--steps", "1", "-o", tmp_path / "once"))[0]
    twice = events(train(text, text, "--steps", "1", "-o", tmp_path / "twice"))[0]
    assert twice["train_bytes"] == 2 * once["train_bytes"] == 2 * sum(len(part) * 4 + 3 for part in SENTENCES)


def test_a_part_of_the_documents_is_held_out(train: Run, tmp_path: Path) -> None:
    (tmp_path / "many").write_text("<|endoftext|>".join(f"The king had {i} daughters." for i in range(400)))
    told = events(train(tmp_path / "many", "--steps", "1"))
    (evaluation,) = [event for event in told if event["event"] == "eval"]
    assert list(evaluation["valid"]) == ["held out"]
    whole = sum(len(f"The king had {i} daughters.") for i in range(400))
    assert 0.9 * whole < told[0]["train_bytes"] < whole


def bad_files(folder: Path) -> dict[str, bytes]:
    packed = gzip.compress(TEXT.encode())
    return {
        "bad.txt": b"abc\xff" + TEXT.encode(),
        "cut.txt": TEXT.encode() + b"\xe6\x9d",
        "none.gz": b"this is no gzip",
        "cut.gz": gzip.compress(TEXT.encode())[:-20],
        "broken.gz": packed[:10] + b"\xff" * 20 + packed[30:],
        "none.xz": b"this is no xz",
        "cut.xz": lzma.compress(TEXT.encode())[:-20],
    }


@pytest.mark.parametrize("name", sorted(bad_files(Path())))
def test_bad_data_is_3_and_named(train: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bad_files(tmp_path)[name])
    message = refused(train(tmp_path / name, "--steps", "1"), 3)
    assert name in message
    if name == "bad.txt":
        assert "byte 3" in message


def test_data_that_is_not_there_is_3(train: Run, text: Path, tmp_path: Path) -> None:
    refused(train(tmp_path / "none", "--steps", "1"), 3)
    refused(train(text / "below", "--steps", "1", "-o", tmp_path / "fourth"), 3)
    refused(train(text, "--valid", tmp_path / "none", "--steps", "1", "-o", tmp_path / "other"), 3)
    refused(train(text, "--steps", "1", "--tokenizer", "no-such-model", "-o", tmp_path / "third"), 3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_data_that_may_not_be_read_is_3(train: Run, text: Path) -> None:
    text.chmod(0)
    refused(train(text, "--steps", "1"), 3)


def test_no_text_and_too_little_are_wrong_use(train: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n<|endoftext|>\n ")
    refused(train(tmp_path / "empty", "--steps", "1"))
    (tmp_path / "short").write_text("abc")
    assert "too few" in refused(train(tmp_path / "short", "--steps", "1", "-o", tmp_path / "other"))


# --- Wrong use


def test_a_vocabulary_without_room_for_the_bytes(train: Run, text: Path) -> None:
    assert "256" in refused(train(text, "--steps", "1", "--vocab-size", "256"))


def test_a_refusal_leaves_no_folder_in_the_way(train: Run, text: Path, tmp_path: Path) -> None:
    """What was wrong can be put right and run again, without --force."""
    refused(train(tmp_path / "none", "--steps", "1"), 3)
    events(train(text, "--steps", "1"))


def test_a_size_by_name_or_file(train: Run, text: Path, tmp_path: Path) -> None:
    raw = {
        "model_type": "gpt2",
        "vocab_size": 9,
        "n_positions": 12,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 1,
        "n_inner": 20,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    start = events(train(text, "--steps", "1", "--config", tmp_path / "config.json"))[0]
    assert start["config"] | {"vocab_size": 300, "context": 12, "width": 8, "mlp_width": 20} == start["config"]
    refused(train(text, "--steps", "1", "--preset", "gpt9", "-o", tmp_path / "other"), 3)
    for twice in (("--width", "8"), ("--preset", "gpt2")):
        refused(train(text, "--steps", "1", "--config", tmp_path / "config.json", *twice, "-o", tmp_path / "other"), 2)
