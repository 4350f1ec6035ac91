"""``gptcli train``: what is wrong use, said with a hint before anything is written; and who wins of several sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.cli.training import events, refused


@pytest.mark.parametrize(
    "options",
    [
        ("--vocab-size", "280", "--tokenizer", "fable"),
        ("--steps", "1", "--tokens", "10"),
        ("--epochs", "1", "--minutes", "1"),
        ("--steps", "0"),
        ("--tokens", "0"),
        ("--epochs", "0"),
        ("--epochs", "nan"),
        ("--minutes", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--weight-decay", "-1"),
        ("--weight-decay", "nan"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--heads", "3"),
        ("--heads", "0"),
        ("--layers", "0"),
        ("--context", "1"),
        ("--batch-tokens", "0"),
        ("--eval-every", "-1"),
        ("--device", "abacus"),
        ("--dtype", "float16"),
        ("--dtype", "float8"),
        ("--save-dtype", "int8"),
        ("--threads", "0"),
        ("--preset", "gpt2", "--config", "config.json"),
        ("--optimizer", "sgd"),
        ("--parallel", "tensor"),
        ("--keep", "0"),
        ("--micro-batch", "0"),
        ("--sample-every", "-1"),
        ("--freeze", "blocks.0.*"),  # of random weights
        ("--resume", "--force"),
        ("--gpus", "8x80GB"),  # without --plan
        ("-",),
    ],
    ids=" ".join,
)
def test_wrong_use_is_2(train: Run, text: Path, options: tuple[str, ...]) -> None:
    limit = () if {"--steps", "--tokens", "--epochs", "--minutes"} & set(options) else ("--steps", "1")
    twice = ("-",) if options == ("-",) else ()
    refused(train(text, *limit, *options, *twice, stdin=b""))


def test_no_data_and_no_folder_are_wrong_use(train: Run, run: Run, text: Path) -> None:
    assert "nothing to train on" in refused(train("--steps", "1"))
    assert "no folder" in refused(run("train", text, "--json"))
    # A pipe that is the text to evaluate on is not the one to train on, too.
    assert "nothing to train on" in refused(train("--valid", "-", "--steps", "1", stdin=b"x"))
    assert "stdin can be read only once" in refused(train("--vocab-size", "300", "--steps", "1", stdin=b"x"))


def test_what_excludes_each_other_is_named(train: Run, text: Path, tiny_folder: Path) -> None:
    said = refused(train(text, "--steps", "1", "--minutes", "2", "--epochs", "3"))
    assert "--steps and --epochs and --minutes" in said
    said = refused(train(text, "--preset", "gpt2", "--layers", "3", bare=True))
    assert "--preset and --layers" in said
    said = refused(train(text, "--init-from", tiny_folder, "--width", "8", bare=True))
    assert "--init-from and --width" in said
    assert "stdin" in refused(train("-", "--valid", "-", "--steps", "1", stdin=b"x"))


def test_the_command_line_goes_before_the_settings(
    train: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What excludes each other does so only where it comes from the same place."""
    home = tmp_path / "settings" / "gptcli"
    home.mkdir(parents=True)
    (home / "config.toml").write_text("[train]\nminutes = 30.0\nlayers = 2\nvocab_size = 280\nlr = 0.01\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home.parent))
    monkeypatch.setenv("GPTCLI_EPOCHS", "7")
    monkeypatch.setenv("GPTCLI_LAYERS", "3")
    start = events(train(text, "--steps", "1"))[0]
    assert (start["steps"], start["minutes"], start["config"]["layers"]) == (1, None, 1)
    assert start["config"]["vocab_size"] == 300
    (tmp_path / "config.json").write_text(
        '{"model_type": "gpt2", "vocab_size": 9, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 1}'
    )
    start = events(train(text, "--steps", "1", "--config", tmp_path / "config.json", "-o", tmp_path / "other"))[0]
    assert start["config"]["layers"] == 1
