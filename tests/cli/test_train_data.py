"""``gptcli train``: where its data comes from, and that it is tokenized once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.training import TEXT, course, events, of_kind, refused
from tests.conftest import ROOT


def test_a_text_is_tokenized_once(train: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptcli.train.encode import Encoder

    args = ("--steps", "2", "--seed", "1", "--valid", text)
    first = events(train(text, *args, "-o", tmp_path / "first"))
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "gptcli" / "tokens"
    kept = {file.name for file in cache.iterdir()}
    assert kept
    assert ROOT not in cache.parents
    with monkeypatch.context() as context:
        context.setattr(Encoder, "documents", lambda *_: pytest.fail("the tokens are there"))
        second = events(train(text, *args, "-o", tmp_path / "second"))
    assert {file.name for file in cache.iterdir()} == kept
    assert second[0]["train_tokens"] == first[0]["train_tokens"]
    assert course(tmp_path / "second") == course(tmp_path / "first")
    third = events(train(text, *args, "--vocab-size", "280", "-o", tmp_path / "third"))
    assert third[0]["train_tokens"] > first[0]["train_tokens"]


def test_a_folder_is_all_its_texts(train: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("The king had a daughter. " * 8)
    (folder / "more" / "b.jsonl").write_text(json.dumps({"text": "One day she went. " * 8}))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("No.")
    told = events(train(folder, "--steps", "1"))
    assert told[0]["train_bytes"] == 8 * 25 + 8 * 18
    (tmp_path / "none").mkdir()
    assert "no text files" in refused(train(tmp_path / "none", "--steps", "1", "-o", tmp_path / "other"))


def test_zstandard_is_unpacked(train: Run, text: Path, tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(TEXT.encode())
    (tmp_path / "text.zst").write_bytes(packed)
    (tmp_path / "cut.zst").write_bytes(packed[:-9])
    plain, same = (
        events(train(file, "--steps", "1", "-o", tmp_path / file.suffix)) for file in (text, tmp_path / "text.zst")
    )
    assert same[0]["train_tokens"] == plain[0]["train_tokens"]
    assert "cut.zst" in refused(train(tmp_path / "cut.zst", "--steps", "1", "-o", tmp_path / "other"), 3)


def test_texts_to_evaluate_on_that_are_called_alike_are_told_apart(train: Run, text: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "valid.txt").write_text("The king had a daughter. " * (4 if name == "a" else 8))
    one, other = (str(tmp_path / name / "valid.txt") for name in ("a", "b"))
    valid = ("--valid", one, "--valid", other, "--valid", str(text), "--valid", one)
    told = events(train(text, *valid, "--steps", "1"))
    assert list(of_kind("eval", told)[0]["valid"]) == [one, other, "text"]


def test_what_there_is_to_train_on_is_said(train: Run, text: Path, tmp_path: Path) -> None:
    done = train(text, "--steps", "1", "--seed", "1", quiet=False)
    start = events(done)[0]
    told = done.err.decode().splitlines()
    assert (
        told[0]
        == "warning: the text is too short to hold some out, so there is no evaluation; name a text with --valid"
    )
    assert told[1] == f"note: 3 documents, {start['train_bytes']} bytes, {start['train_tokens']} tokens to train on"
    assert len(told) == 2


# --- What is asked of the loop


def test_samples_go_on_from_the_prompt_when_asked(train: Run, text: Path, tmp_path: Path) -> None:
    args = (text, "--valid", text, "--eval-every", "1", "--steps", "4", "--seed", "1")
    told = events(train(*args, "--sample-every", "3", "--sample-prompt", "The king"))
    samples = of_kind("sample", told)
    assert [sample["step"] for sample in samples] == [3, 4]
    assert all(sample["prompt"] == "The king" and sample["text"] for sample in samples)
    assert [event["step"] for event in of_kind("eval", told)] == [1, 2, 3, 4]
    told = events(train(*args, "--sample-every", "0", "-o", tmp_path / "none"))
    assert not of_kind("sample", told)
    told = events(train(*args, "--sample-prompt", "The king " * 99, "-o", tmp_path / "long"))
    assert [sample["step"] for sample in of_kind("sample", told)] == [1, 2, 3, 4]
    assert course(tmp_path / "none") == course(tmp_path / "long") == course(tmp_path / "out")


def test_both_optimizers_learn_and_differ(train: Run, text: Path, tmp_path: Path) -> None:
    courses = {}
    for name in ("muon", "adamw"):
        args = ("--optimizer", name, "--steps", "12", "--seed", "1", "-o", tmp_path / name)
        assert events(train(text, *args))[0]["optimizer"] == name
        courses[name] = [loss for _, loss, _, _ in course(tmp_path / name)]
        assert courses[name][-1] < courses[name][0] - 0.1
    assert courses["muon"][0] == courses["adamw"][0]
    assert courses["muon"][-1] != courses["adamw"][-1]


def test_rows_may_go_through_a_few_at_a_time(train: Run, text: Path, tmp_path: Path) -> None:
    args = (text, "--steps", "4", "--seed", "1")
    whole = events(train(*args, "-o", tmp_path / "whole"))[0]
    assert (whole["micro_batch"], whole["accumulate"]) == (4, 1)
    for rows, times in ((1, 4), (3, 2)):
        out = tmp_path / str(rows)
        start = events(train(*args, "--micro-batch", str(rows), "-o", out))[0]
        assert (start["micro_batch"], start["accumulate"]) == (2 if rows == 3 else rows, times)
        for one, other in zip(course(out), course(tmp_path / "whole"), strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def test_documents_may_be_kept_apart(train: Run, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.write_text("<|endoftext|>".join(f"King {i}." for i in range(80)))
    args = (many, "--steps", "2", "--seed", "1")
    events(train(*args, "-o", tmp_path / "packed"))
    events(train(*args, "--mask-documents", "-o", tmp_path / "apart"))
    assert course(tmp_path / "packed")[0][1] != course(tmp_path / "apart")[0][1]


def test_the_last_checkpoints_are_kept(train: Run, text: Path, tmp_path: Path) -> None:
    from tests.cli.training import checkpoint_names

    events(train(text, "--steps", "5", "--save-every", "1", "--keep", "3"))
    assert checkpoint_names(tmp_path / "out") == ["step-000000003", "step-000000004", "step-000000005"]
