"""Checkpoints of a training run: tensors as safetensors, the rest as JSON; no pickle is written or read.

``checkpoints/step-000001000/`` holds ``state.json`` and one ``part-00001-of-00001.safetensors`` for each rank that has
something of its own. Each tensor is stored with the rows that the rank held, so that any number of ranks can go on from
what any other number wrote. A checkpoint is written into a folder beside, synced, and renamed: it is there whole or not
at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gptcli.core.checkpoint import output_errors, sync
from gptcli.errors import CorruptError
from gptcli.train.ranks import Part, Ranks

FOLDER = "checkpoints"
_STATE = "state.json"
_WRITING = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, and ``state``, whatever JSON the loop put there (``step`` among it)."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])


def save_checkpoint(out: Path, parts: Mapping[str, Part], state: Mapping[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint of ``state["step"]`` and remove all but the last ``keep``; returns its folder.

    Every rank calls this with its own parts. Raises OutputError when it can't be written; earlier checkpoints are then
    as they were.
    """
    folder = out / FOLDER / f"step-{state['step']:09d}"
    temporary = folder.with_name(f"{_WRITING}{folder.name}")
    with output_errors(folder):
        if ranks.rank == 0:
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ranks.wait()
        try:
            if ranks.rank < ranks.writers:
                _write_part(temporary, parts, ranks)
            if ranks.rank == 0:
                file = temporary / _STATE
                file.write_text(json.dumps({**state, "parts": ranks.writers}, indent=2) + "\n")
                sync(file)
            ranks.wait()
            if ranks.rank == 0:
                _put_in_place(temporary, folder)
                _remove_old(folder, keep)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        ranks.wait()
    return folder


def _write_part(folder: Path, parts: Mapping[str, Part], ranks: Ranks) -> None:
    file = folder / f"part-{ranks.rank + 1:05d}-of-{ranks.writers:05d}.safetensors"
    places = {name: [part.start, part.rows] for name, part in parts.items()}
    tensors = {name: part.tensor.detach().cpu().contiguous() for name, part in parts.items()}
    save_file(tensors, file, metadata={"format": "pt", "rows": json.dumps(places)})
    sync(file)


def _put_in_place(temporary: Path, folder: Path) -> None:
    sync(temporary)
    if folder.exists():  # of this very step: the run came here before, and went back
        old = folder.with_name(f"{_WRITING}old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def _remove_old(newest: Path, keep: int) -> None:
    """Remove what is older than the last ``keep``, what a killed process left, and steps that were gone back from."""
    present = sorted(newest.parent.glob("step-*"))
    ahead = [folder for folder in present if folder.name > newest.name]
    behind = [folder for folder in present if folder.name <= newest.name]
    for folder in [*ahead, *behind[: -max(1, keep)], *newest.parent.glob(f"{_WRITING}*")]:
        # First out of sight, so that no half of it is ever found.
        hidden = folder.with_name(f"{_WRITING}gone-{folder.name.removeprefix(_WRITING)}")
        with contextlib.suppress(OSError):
            if not folder.name.startswith(_WRITING):
                folder.rename(hidden)
                folder = hidden
            shutil.rmtree(folder, ignore_errors=True)


def checkpoints(out: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a run that can be read, the newest first. One that is damaged is passed over."""
    for folder in sorted((out / FOLDER).glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / _STATE).read_text())
            _read_places(folder, int(state["parts"]))
            int(state["step"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
        yield Checkpoint(folder, state)


def remove_checkpoints(out: Path) -> None:
    """Remove every checkpoint, for a run that begins anew. Raises OutputError when one would stay."""
    if (out / FOLDER).exists():
        with output_errors(out / FOLDER):
            shutil.rmtree(out / FOLDER)


def load_checkpoint(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
    """Fill this rank's parts, in place, from a checkpoint of any number of ranks.

    Raises CorruptError when tensors are missing, left over, of another shape, or can't be read.
    """
    try:
        places = _read_places(checkpoint.folder, int(checkpoint.state["parts"]))
        _compare(checkpoint.folder, set(places), set(parts))
        for name, part in parts.items():
            _fill(name, part, places[name])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CorruptError(f"{checkpoint.folder} can't be read: {error}", "remove it and resume again") from None


def _read_places(folder: Path, count: int) -> dict[str, list[tuple[Path, int, int]]]:
    """For each tensor the files that hold some of it, with the first row there and the rows in all."""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for number in range(count):
        file = folder / f"part-{number + 1:05d}-of-{count:05d}.safetensors"
        with safe_open(file, framework="pt", device="cpu") as stream:
            for name, (start, rows) in json.loads(stream.metadata()["rows"]).items():
                found.setdefault(name, []).append((file, start, rows))
    return found


def _compare(folder: Path, stored: set[str], wanted: set[str]) -> None:
    if stored != wanted:
        names = ", ".join(sorted(stored ^ wanted)[:5])
        raise CorruptError(f"{folder} does not belong to this model: {names}", "resume with the options it began with")


def _fill(name: str, part: Part, places: list[tuple[Path, int, int]]) -> None:
    missing = torch.ones(len(part.tensor) if part.tensor.dim() else 1, dtype=torch.bool)
    for file, start, rows in places:
        if rows != part.rows:
            raise CorruptError(f"{file}: {name} has {rows} rows, not {part.rows}", "it belongs to another model")
        with safe_open(file, framework="pt", device="cpu") as stream:
            if part.tensor.dim() == 0:
                part.tensor.copy_(stream.get_tensor(name))
                missing[:] = False
                continue
            held = stream.get_slice(name)
            first = max(start, part.start)
            last = min(start + held.get_shape()[0], part.start + len(part.tensor))
            if first < last:
                here = slice(first - part.start, last - part.start)
                part.tensor[here].copy_(held[first - start : last - start])
                missing[here] = False
    if missing.any():
        raise CorruptError(f"rows of {name} are missing from the checkpoint", "remove it and resume again")


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` that come after ``step``, and a last line cut short; atomically."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
    with output_errors(file):
        beside = file.with_name(f"{_WRITING}{file.name}")
        beside.write_text("".join(kept))
        sync(beside)
        os.replace(beside, file)
