"""``gptcli train --init-from``: a model learns on, from text or from the answers of examples alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli import train_run
from tests.cli.conftest import Run
from tests.cli.training import events, metrics, of_kind, refused, weights

ANSWER = " yes, it is."


@pytest.fixture
def learnt(train: Run, tmp_path: Path, tiny_folder: Path) -> Path:
    """A model that knows the alphabet's beginning by heart, with its text ``abc`` beside."""
    (tmp_path / "abc").write_text("abcdefgh" * 60)
    args = ("--context", "32", "--width", "32", "--steps", "40", "--lr", "0.02", "--seed", "1")
    events(train(tmp_path / "abc", *args, "-o", tmp_path / "learnt"))
    return tmp_path / "learnt"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Is {i} real?", "completion": ANSWER}) + "\n" for i in range(40)))
    return file


def test_a_model_learns_on_from_what_it_knows(train: Run, learnt: Path, tmp_path: Path) -> None:
    told = events(train(tmp_path / "abc", "--init-from", learnt, "--steps", "3"))
    steps = of_kind("step", told)
    assert steps[0]["loss"] < 1.1 * metrics(learnt)[-5]["loss"] + 0.1
    assert steps[0]["loss"] < 0.5
    assert "\nlr = 0.0005\n" in (tmp_path / "out" / "train.toml").read_text()
    assert told[0]["config"] == {**metrics(learnt)[0]["config"], "dtype": "float32"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (learnt / "tokenizer.json").read_bytes()
    events(train(tmp_path / "abc", "--init-from", learnt, "--optimizer", "adamw", "--steps", "1", "-o", tmp_path / "a"))
    assert "\nlr = 0.0001\n" in (tmp_path / "a" / "train.toml").read_text()


def test_only_completions_are_learnt(train: Run, run: Run, rows: Path, tmp_path: Path, tiny_folder: Path) -> None:
    out = tmp_path / "out"
    args = ("--init-from", tiny_folder, "--steps", "60", "--batch-tokens", "256", "--lr", "0.02", "--seed", "1")
    done = train(rows, *args, quiet=False)
    told = events(done)
    kept = told[0]["train_bytes"] // len(ANSWER)
    assert told[0]["train_bytes"] == kept * len(ANSWER)
    assert 30 <= kept < 40
    assert f"note: {kept} examples, {told[0]['train_bytes']} bytes of answers".encode() in done.err
    assert list(of_kind("eval", told)[0]["valid"]) == ["held out"]
    assert of_kind("step", told)[-1]["loss"] < 0.3
    answer = run("generate", "-m", out, "Is 7 real?", "-t", "0", "-n", "20", "--json").json
    assert (answer["text"], answer["finish_reason"]) == (ANSWER, "eos")
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert "Assistant:" in config["chat_template"]
    assert config["eos_token"] == "<|endoftext|>"
    assert run("models", "verify", out).code == 0


def test_of_messages_only_the_answers_are_learnt(train: Run, tmp_path: Path, tiny_folder: Path) -> None:
    chats = [
        [{"role": role, "content": text} for role, text in (("user", f"Hello {i}"), ("assistant", "Hi."))] * 2
        for i in range(5)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    args = (file, "--valid", file, "--init-from", tiny_folder, "--steps", "2", "--seed", "1")
    told = events(train(*args))
    assert told[0]["train_bytes"] == 5 * 2 * len("Hi.")
    assert list(of_kind("eval", told)[0]["valid"]) == ["chats"]
    assert "chat_template" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_fine_tuning_goes_on_to_the_bit(train: Run, rows: Path, tmp_path: Path, tiny_folder: Path) -> None:
    args = (rows, "--init-from", tiny_folder, "--steps", "4", "--save-every", "2", "--seed", "1")
    args = (*args, "--freeze", "blocks.0.*")
    events(train(*args))
    whole = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix in (".json", ".st")}
    before = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000000004")
    assert events(train("--resume", bare=True))[0]["step"] == 2
    assert weights(tmp_path / "out") == before
    assert {name: (tmp_path / "out" / name).read_bytes() for name in whole} == whole


def test_examples_need_a_model(train: Run, rows: Path, text: Path, tmp_path: Path, tiny_folder: Path) -> None:
    assert "no model to teach" in refused(train(rows, "--steps", "1"))
    said = refused(train(rows, text, "--init-from", tiny_folder, "--steps", "1"))
    assert "text.txt holds text" in said
    rows.write_text(rows.read_text() + '{"prompt": "x"}\n')
    said = refused(train(rows, "--init-from", tiny_folder, "--steps", "1"), 3)
    assert "rows.jsonl line 41" in said


def test_texts_under_a_field_are_texts(train: Run, tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"story": f"The king had {i} daughters.", "prompt": ""}) + "\n" for i in range(40))
    )
    told = events(train(file, "--field", "story", "--init-from", tiny_folder, "--steps", "1"))
    assert told[0]["train_bytes"] > 30 * len("The king had 0 daughters.")


def test_what_is_frozen_is_the_same_to_the_bit(train: Run, text: Path, tmp_path: Path, tiny_folder: Path) -> None:
    from safetensors.numpy import load_file

    args = (text, "--init-from", tiny_folder, "--steps", "2", "--freeze", "blocks.0.*", "--freeze", "embedding.weight")
    done = train(*args, quiet=False)
    events(done)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, tmp_path / "out"))
    same = {name for name in before if (before[name] == after[name]).all()}
    assert same == {name for name in before if name.startswith(("h.0.", "transformer.h.0.")) or "wte" in name}
    frozen = int(done.err.split(b" tensors are left")[0].split()[-1])
    assert frozen >= len(same)


def test_a_pattern_that_freezes_nothing_or_all_is_refused(train: Run, text: Path, tiny_folder: Path) -> None:
    args = (text, "--init-from", tiny_folder, "--steps", "2", "--freeze")
    done = train(*args, "block.0.*")
    assert "no parameter is named block.0.*" in refused(done)
    assert b"blocks.0.*" in done.err
    assert "nothing to train" in refused(train(*args, "*"))


@pytest.mark.parametrize(
    "option", ["--layers 3", "--width 8", "--preset gpt2", "--vocab-size 280", "--tokenizer fable"]
)
def test_a_model_brings_its_size_and_its_tokenizer(train: Run, text: Path, tiny_folder: Path, option: str) -> None:
    said = refused(train(text, "--init-from", tiny_folder, *option.split(), "--steps", "1", bare=True))
    assert option.split()[0] in said
    assert "--init-from" in said


def test_a_row_may_be_shorter_than_the_models_context(
    train: Run, text: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model keeps its own: what changes is how much of it one row of training fills."""

    def begun(*more: object) -> dict[str, Any]:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        args = ("--init-from", tiny_folder, "--steps", "2", "--batch-tokens", "96", "--seed", "1", "-o", out)
        done = train(text, *args, *more, bare=True)
        told = events(done)
        assert json.loads((out / "config.json").read_text())["n_positions"] == 64
        assert of_kind("step", told)[-1]["tokens"] == 2 * of_kind("start", told)[0]["batch_tokens"]
        start: dict[str, Any] = of_kind("start", told)[0]
        return {**start, "kept": (out / "train.toml").read_text()}

    assert begun()["batch_tokens"] == 128  # two of its 64 are nearest
    short = begun("--context", "16")
    assert short["batch_tokens"] == 96
    assert "context = 16" in short["kept"].splitlines()
    assert short["flops_per_token"] < begun()["flops_per_token"]
    said = refused(train(text, "--init-from", tiny_folder, "--context", "65", "--steps", "1", bare=True))
    assert "65" in said
    assert "64" in said
    monkeypatch.setattr(train_run, "_LONGEST_ROW", 32)
    assert begun()["batch_tokens"] == 96
    assert begun("--context", "64")["batch_tokens"] == 128


def test_a_model_that_is_not_there_is_3(train: Run, text: Path, tmp_path: Path) -> None:
    assert "no-such-model" in refused(train(text, "--init-from", "no-such-model", "--steps", "1"), 3)


def test_a_tokenizer_of_two_files_is_kept(
    train: Run, run: Run, text: Path, rows: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    old = shutil.copytree(tiny_folder, tmp_path / "old")
    raw = json.loads((old / "tokenizer.json").read_text())["model"]
    (old / "tokenizer.json").unlink()
    (old / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (old / "merges.txt").write_text("\n".join(" ".join(merge) for merge in raw["merges"]))
    for data in (text, rows):
        out = tmp_path / f"out-{data.stem}"
        events(train(data, "--init-from", old, "--steps", "1", "-o", out))
        names = {file.name for file in out.iterdir()}
        assert names >= {"vocab.json", "merges.txt"}
        assert "tokenizer.json" not in names
        assert ("tokenizer_config.json" in names) == (data == rows)
        assert run("models", "verify", out).code == 0
        assert run("generate", "-m", out, "The king", "-n", "2", "--seed", "1").code == 0


def test_a_chat_template_goes_along(train: Run, text: Path, rows: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """As a file of its own where the model had one so, and into the configuration with examples."""
    pytest.importorskip("jinja2")
    chatty = shutil.copytree(tiny_folder, tmp_path / "chatty")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (chatty / "chat_template.jinja").write_text(template)
    events(train(text, "--init-from", chatty, "--steps", "1", "-o", tmp_path / "text"))
    assert (tmp_path / "text" / "chat_template.jinja").read_text() == template
    events(train(rows, "--init-from", chatty, "--steps", "1", "-o", tmp_path / "rows"))
    assert not (tmp_path / "rows" / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "rows" / "tokenizer_config.json").read_text())["chat_template"] == template
