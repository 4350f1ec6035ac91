"""What the tests of ``gptcli train`` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cli.conftest import Done

SENTENCES = ("The king had a daughter.", "One day she went to the forest.", "They were happy, all of them.")
TEXT = "\n<|endoftext|>\n".join(" ".join([sentence] * 4) for sentence in SENTENCES)


def events(done: Done) -> list[dict[str, Any]]:
    """The events of a run that ended well."""
    assert done.code == 0, done.err
    return lines(done.out)


def lines(out: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def of_kind(kind: str, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in told if event["event"] == kind]


def refused(done: Done, code: int = 2) -> str:
    """The message of a run that was refused, with a hint, before anything was trained."""
    assert (done.code, done.out) == (code, b""), done.err
    error = json.loads(done.err.splitlines()[-1])["error"]
    assert error["hint"]
    message: str = error["message"]
    return message


def metrics(folder: Path) -> list[dict[str, Any]]:
    return lines((folder / "metrics.jsonl").read_bytes())


def course(folder: Path) -> list[tuple[Any, ...]]:
    """What a run went through, but for the clock."""
    names = ("step", "loss", "lr", "grad_norm")
    return [tuple(event[name] for name in names) for event in of_kind("step", metrics(folder))]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "checkpoints").iterdir())
