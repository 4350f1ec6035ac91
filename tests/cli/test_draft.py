"""``gptcli generate`` that guesses ahead: the same text, told with ``-v``, and a draft model that has to fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptcli.cli import opening
from gptcli.core.build import random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.runtime import DTYPES
from gptcli.spec.config import from_hf
from tests.cli.conftest import Run

AGAIN = "the king said the king said the king said"


@pytest.fixture
def generate(run: Run, tiny_folder: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """With the tiny model and a native step."""
    monkeypatch.setattr(opening, "native_cache", lambda: built)
    return lambda *args, **more: run("generate", "-m", tiny_folder, "--dtype", "float32", *args, **more)


@pytest.fixture
def draft(tmp_path: Path, tiny_folder: Path) -> Path:
    """Another model with the same tokenizer."""
    raw = json.loads((tiny_folder / "config.json").read_text())
    config = from_hf({**raw, "n_layer": 1})
    files = {"tokenizer.json": (tiny_folder / "tokenizer.json").read_bytes()}
    save_folder(random_model(config, seed=3), tmp_path / "draft", dtype=DTYPES["float32"], files=files)
    return tmp_path / "draft"


def test_guesses_from_the_text_leave_it_as_it_is(generate: Run) -> None:
    args = (AGAIN, "-n", "30", "-t", "0", "--ignore-eos", "--seed", "1", "--json", "--logprobs", "2")
    guessed, plain = generate(*args), generate(*args, "--draft-model", "none")
    for key in guessed.json.keys() - {"timing"}:
        assert guessed.json[key] == plain.json[key]
    assert guessed.json.keys() == plain.json.keys()
    counts = guessed.json["timing"]
    assert 0 < counts["accepted_tokens"] <= counts["drafted_tokens"]
    assert plain.json["timing"]["drafted_tokens"] == 0
    told = generate(*args[:5], "--ignore-eos", "-v").err.decode()
    said = f"{counts['drafted_tokens']} tokens were drafted and {counts['accepted_tokens']} accepted"
    assert f"{said}, by looking them up in the text" in told
    assert said in generate(*args[:5], "--ignore-eos", "--stats").err.decode()
    assert "drafted" not in generate(*args[:5], "-v", "--stats", "--draft-model", "none").err.decode()


def test_a_draft_model_keeps_greedy_text(generate: Run, draft: Path) -> None:
    args = (AGAIN, "-n", "20", "-t", "0", "--ignore-eos")
    assert generate(*args, "--draft-model", draft).out == generate(*args).out
    told = generate(*args, "--draft-model", draft, "-v").err.decode()
    assert "accepted, by draft" in told
    value = generate(*args, "--draft-model", draft, "--json").json
    assert value["draft_model"] == "draft"
    assert value["timing"]["drafted_tokens"] > 0


def test_samples_and_batches_are_drafted_one_after_another(generate: Run, draft: Path, tmp_path: Path) -> None:
    args = ("-n", "8", "--json", "--draft-model", draft, "--ignore-eos")
    done = generate("Once", *args, "--num-samples", "3", "--seed", "5")
    several = [json.loads(line) for line in done.out.splitlines()]
    assert [(value["index"], value["seed"]) for value in several] == [(0, 5), (1, 6), (2, 7)]
    for value in several:
        alone = generate("Once", *args, "--seed", str(value["seed"])).json
        assert value["tokens"] == alone["tokens"]
        assert len(alone["tokens"]) == 8
    (tmp_path / "batch.jsonl").write_text('{"prompt": "A", "seed": 7}\n{"prompt": "Once", "seed": 6}\n')
    lines = [json.loads(line) for line in generate("--batch", tmp_path / "batch.jsonl", *args).out.splitlines()]
    assert lines[1]["tokens"] == several[1]["tokens"]


def test_a_draft_model_comes_from_the_environment_too(
    generate: Run, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_DRAFT_MODEL", str(draft))
    assert generate("Once", "-n", "4", "--json").json["draft_model"] == "draft"


def test_a_draft_model_with_other_tokens_is_wrong_use(generate: Run, draft: Path, tmp_path: Path) -> None:
    raw = json.loads((draft / "config.json").read_text())
    fewer = tmp_path / "fewer"
    files = {"tokenizer.json": (draft / "tokenizer.json").read_bytes()}
    save_folder(random_model(from_hf({**raw, "vocab_size": 310}), 1), fewer, dtype=DTYPES["float32"], files=files)
    done = generate("Once", "--draft-model", fewer)
    assert (done.code, done.out) == (2, b"")
    assert b"tiny has 300 tokens and fewer 310" in done.err
    other = tmp_path / "other"
    shutil.copytree(draft, other)
    text = (draft / "tokenizer.json").read_text()
    assert '"A"' in text
    value = json.loads(text)
    words = value["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(value))
    done = generate("Once", "--draft-model", other)
    assert (done.code, done.out) == (2, b"")
    assert b"their tokenizers differ" in done.err
    assert generate("Once", "--draft-model", tmp_path / "nothing").code == 3
