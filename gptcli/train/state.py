"""Checkpoints of a training run: tensors as safetensors, the rest as JSON; no pickle is written or read.

``checkpoints/step-000001000/`` holds ``state.json`` and one ``part-00001-of-00001.safetensors`` for each rank that has
something of its own. Each tensor is stored with the rows that the rank held, so that any number of ranks can go on from
what any other number wrote. A checkpoint is written into a folder beside, synced, and renamed: it is there whole or not
at all. Where that step has a checkpoint already, the earlier one is called ``.old`` for the moment that both are there.
"""

from __future__ import annotations

import contextlib
import itertools
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

from gptcli.core.files import output_errors, sync
from gptcli.errors import CorruptError
from gptcli.train.ranks import Part, Ranks

FOLDER = "checkpoints"
_STATE = "state.json"
_WRITING = ".writing-"
_OLD = ".old"

# What reading a file raises that is not what was written.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


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
            sync(out)
            _remove_leftovers(out)
            _remove_leftovers(folder.parent)
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
    if folder.exists():  # of this very step: the run went on from here, or came here again
        old = folder.with_name(folder.name + _OLD)
        _remove(old)
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)


def _remove_old(newest: Path, keep: int) -> None:
    """Remove all but the last ``keep`` that can be read: older ones, damaged ones, steps that were gone back from."""
    earlier = (each.folder for each in checkpoints(newest.parent.parent) if each.folder.name < newest.name)
    kept = {newest, *itertools.islice(earlier, max(1, keep) - 1)}
    for folder in set(newest.parent.glob("step-*")) - kept:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint if it is there: first out of sight, so that no half of it is ever found."""
    if folder.exists():
        hidden = folder.with_name(f"{_WRITING}gone-{folder.name}")
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed was about to write, or to remove, in a folder."""
    for path in folder.glob(f"{_WRITING}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def checkpoints(out: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a run that can be read, the newest first. One that is damaged is passed over."""

    def age(folder: Path) -> tuple[str, bool]:
        return folder.name.removesuffix(_OLD), not folder.name.endswith(_OLD)

    for folder in sorted((out / FOLDER).glob("step-*"), key=age, reverse=True):
        try:
            state = json.loads((folder / _STATE).read_text())
            _read_places(folder, int(state["parts"]))
            int(state["step"])
        except _DAMAGE:
            continue
        yield Checkpoint(folder, state)


def remove_checkpoints(out: Path) -> None:
    """Remove every checkpoint, for a run that begins anew. Raises OutputError when one would stay."""
    if (out / FOLDER).exists():
        with output_errors(out / FOLDER):
            shutil.rmtree(out / FOLDER)


def what_differs(checkpoint: Checkpoint) -> list[str]:
    """What a run to the bit needs and is not as it was when the checkpoint was written, in words."""
    now = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    before = {name: checkpoint.state.get(name) for name in now}
    return [f"{name} {before[name]} (now {now[name]})" for name in now if before[name] not in (None, now[name])]


def load_checkpoint(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> None:
    """Fill this rank's parts, in place, from a checkpoint of any number of ranks.

    Raises CorruptError when tensors are missing, left over, of another shape, or can't be read.
    """
    try:
        places = _read_places(checkpoint.folder, int(checkpoint.state["parts"]))
        _compare(checkpoint.folder, set(places), set(parts))
        for name, part in parts.items():
            _fill(name, part, places[name])
    except _DAMAGE as error:
        raise CorruptError(f"{checkpoint.folder} can't be read: {error}", "remove it and resume again") from None


def _read_places(folder: Path, count: int) -> dict[str, list[tuple[Path, int, int]]]:
    """For each tensor the files that hold some of it, with the first row there and the rows in all."""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    if count < 1:
        raise ValueError(f"{count} parts")
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
        with safe_open(file, framework="pt", device="cpu") as stream:
            held = stream.get_slice(name)
            shape, wanted = held.get_shape(), list(part.tensor.shape)
            whole, expected = [rows, *shape[1:]], [part.rows, *wanted[1:]]
            if 0 in (*shape[:1], *wanted[:1]):  # where there are more ranks than rows
                whole, expected = whole[:1], expected[:1]
            if whole != expected:
                raise CorruptError(f"{file}: {name} is {whole}, not {expected}", "it belongs to another model")
            if not shape:
                part.tensor.copy_(stream.get_tensor(name))
                missing[:] = False
                continue
            first = max(start, part.start)
            last = min(start + shape[0], part.start + len(part.tensor))
            if first < last:
                here = slice(first - part.start, last - part.start)
                part.tensor[here].copy_(held[first - start : last - start])
                missing[here] = False
    if missing.any():
        raise CorruptError(f"rows of {name} are missing from the checkpoint", "remove it and resume again")


def keep_metrics_until(file: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` behind the last one of ``step``, and any that is cut short; atomically.

    What stands before is kept, steps that were gone back from too: so it happened.
    """
    if not file.exists():
        return
    with output_errors(file):
        lines: list[str] = []
        end = 0
        for line in file.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                reached = json.loads(line).get("step", 0)
                end = len(lines) + 1 if reached <= step else end
                lines.append(line + "\n")
        beside = file.with_name(f"{_WRITING}{file.name}")
        beside.write_text("".join(lines[:end]))
        sync(beside)
        os.replace(beside, file)
