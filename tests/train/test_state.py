"""Checkpoints: whole or not there, at whatever moment a process ends or the disk is full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.core.checkpoint import save_folder
from gptcli.errors import CorruptError, OutputError
from gptcli.spec.match import match_folder
from gptcli.train import state
from gptcli.train.ranks import Part, Ranks
from gptcli.train.state import Checkpoint, checkpoints, keep_metrics_until, load_checkpoint, save_checkpoint
from tests.conftest import PATIENCE
from tests.train.small import model, newest, same, stored

SHAPES = {"model.a": (7, 3), "model.b": (2,), "optimizer.a.exp_avg": (7, 3), "optimizer.a.step": ()}


def some(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def nothing() -> dict[str, Tensor]:
    return {name: torch.full(shape, 99.0) for name, shape in SHAPES.items()}


class FakeRanks(Ranks):
    """One of several ranks, each a thread."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.count, self.writers, self.barrier = rank, barrier.parties, barrier.parties, barrier

    def wait(self) -> None:
        self.barrier.wait(PATIENCE)

    def part(self, tensor: Tensor) -> Part:
        if not tensor.dim():
            return Part(tensor, 0, 1)
        size = -(-len(tensor) // self.count)
        start = min(size * self.rank, len(tensor))
        return Part(tensor[start : start + size], start, len(tensor))


def parts(tensors: dict[str, Tensor], ranks: Ranks | None = None) -> dict[str, Part]:
    return {name: (ranks or Ranks()).part(tensor) for name, tensor in tensors.items()}


def save(out: Path, tensors: dict[str, Tensor], step: int, keep: int = 2, **more: Any) -> Path:
    return save_checkpoint(out, parts(tensors), {"step": step, **more}, Ranks(), keep)


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of so many ranks, side by side, makes of ``work``."""
    barrier = threading.Barrier(count)
    made: dict[int, Any] = {}

    def one(rank: int) -> None:
        try:
            made[rank] = work(FakeRanks(rank, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == count
    return [made[rank] for rank in range(count)]


def steps(out: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(out)]


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob(".writing-*"))


# --- Written and read


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, some(), 8, best=0.1, options={"lr": 1e-3, "names": ["é"]})
    assert folder == tmp_path / "checkpoints" / "step-000000008"
    checkpoint = newest(tmp_path)
    assert (checkpoint.folder, checkpoint.step) == (folder, 8)
    assert checkpoint.state == {"step": 8, "best": 0.1, "options": {"lr": 1e-3, "names": ["é"]}, "parts": 1}
    read = nothing()
    load_checkpoint(checkpoint, parts(read))
    assert same(read, some())
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert leftovers(tmp_path) == []


def test_the_last_are_kept(tmp_path: Path) -> None:
    kept = []
    for step in (2, 4, 10, 1000, 1_000_000_000):
        save(tmp_path, some(step), step, keep=3)
        kept.append(steps(tmp_path))
    assert kept == [[2], [4, 2], [10, 4, 2], [1000, 10, 4], [1_000_000_000, 1000, 10]]
    for checkpoint in checkpoints(tmp_path):
        assert same(stored(checkpoint), some(checkpoint.step))


@pytest.mark.parametrize("keep", [0, 1])
def test_one_is_always_kept(tmp_path: Path, keep: int) -> None:
    for step in (1, 2):
        save(tmp_path, some(), step, keep=keep)
        assert steps(tmp_path) == [step]


def test_steps_that_were_gone_back_from_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6, 3):
        save(tmp_path, some(step), step, keep=9)
    assert steps(tmp_path) == [3, 2]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, some(1), 2)
    save(tmp_path, some(2), 4)
    save(tmp_path, some(3), 4)
    assert steps(tmp_path) == [4, 2]
    assert same(stored(newest(tmp_path)), some(3))


@pytest.mark.parametrize("written", [1, 2, 3])
@pytest.mark.parametrize("read", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, written: int, read: int) -> None:
    """Of ``model.b`` there are fewer rows than ranks."""
    whole = some()
    on_ranks(written, lambda ranks: save_checkpoint(tmp_path, parts(whole, ranks), {"step": 1}, ranks, 2))
    checkpoint = newest(tmp_path)
    assert len(list(checkpoint.folder.glob("part-*"))) == written
    made = nothing()
    on_ranks(read, lambda ranks: load_checkpoint(checkpoint, parts(made, ranks)))
    assert same(made, whole)


# --- Damage


def cut_short(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def without_header(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(b"")


def without_part(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.unlink()


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def said(text: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "state.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def with_rows(rows: str | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        state.save_file({"model.a": torch.zeros(1)}, file, metadata=None if rows is None else {"rows": rows})

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a part cut short": cut_short,
    "an empty part": without_header,
    "no part": without_part,
    "no state": lambda folder: (folder / "state.json").unlink(),
    "empty state": said(""),
    "state cut short": said('{"step": 4, "parts": 1'),
    "state of bytes": said(b"\xff\xfe"),
    "state that is a list": said("[4, 1]"),
    "state without a step": said('{"parts": 1}'),
    "state without parts": said('{"step": 4}'),
    "more parts than there are": said('{"step": 4, "parts": 2}'),
    "no parts at all": said('{"step": 4, "parts": 0}'),
    "a step that is no number": said('{"step": "x", "parts": 1}'),
    "no rows": with_rows(None),
    "rows that are a list": with_rows("[1]"),
    "rows of one number": with_rows('{"model.a": 1}'),
    "empty folder": emptied,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, some(2), 2)
    DAMAGE[damage](save(tmp_path, some(4), 4))
    assert steps(tmp_path) == [2]
    assert same(stored(newest(tmp_path)), some(2))


def test_a_damaged_checkpoint_is_not_kept_in_place_of_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, some(2), 2)
    cut_short(save(tmp_path, some(4), 4))
    save(tmp_path, some(6), 6)
    assert steps(tmp_path) == [6, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert steps(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000000001").write_text("a file")
    assert steps(tmp_path) == []


@pytest.mark.parametrize("damage", [name for name in DAMAGE if not {"state", "step", "parts"} & set(name.split())])
def test_damage_after_a_checkpoint_was_found_is_said(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, some(), 4)
    checkpoint = newest(tmp_path)
    DAMAGE[damage](folder)
    with pytest.raises(CorruptError, match="step-000000004") as caught:
        load_checkpoint(checkpoint, parts(nothing()))
    assert caught.value.hint


# --- Another model


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model.a": (8, 3)}, r"model\.a is \[7, 3\], not \[8, 3\]"),
        ({"model.a": (7, 4)}, r"model\.a is \[7, 3\], not \[7, 4\]"),
        ({"model.a": (7, 1)}, r"model\.a is \[7, 3\], not \[7, 1\]"),
        ({"model.a": (7,)}, r"model\.a is \[7, 3\], not \[7\]"),
        ({"model.b": (2, 3)}, r"model\.b is \[2\], not \[2, 3\]"),
        ({"model.b": ()}, r"model\.b is \[2\], not"),
        ({"model.c": (2,)}, r"model\.c"),
        ({"model.b": None}, r"model\.b"),
        ({"optimizer.a.exp_avg": None, "optimizer.a.momentum_buffer": (7, 3)}, r"exp_avg, optimizer\.a\.momentum"),
    ],
)
def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    save(tmp_path, some(), 4)
    shapes = {name: shape for name, shape in {**SHAPES, **changed}.items() if shape is not None}
    with pytest.raises(CorruptError, match=named) as caught:
        load_checkpoint(newest(tmp_path), parts({name: torch.zeros(shape) for name, shape in shapes.items()}))
    assert caught.value.hint


def test_rows_that_no_part_holds_are_named(tmp_path: Path) -> None:
    tensors = some()
    held = parts(tensors)
    held["model.a"] = Part(tensors["model.a"][:4], 0, 7)
    save_checkpoint(tmp_path, held, {"step": 1}, Ranks(), 2)
    with pytest.raises(CorruptError, match=r"rows of model\.a are missing"):
        load_checkpoint(newest(tmp_path), parts(nothing()))


# --- Ended in the middle


class EndedError(BaseException):
    """The process is no more: whatever it would do to the disk does not happen."""


def write_half(file: Path, write: Callable[[], Any]) -> None:
    write()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@contextlib.contextmanager
def disk(number: int, failure: Callable[[], BaseException], *, for_good: bool) -> Iterator[list[str]]:
    """Within, what the ``number``-th call would do to the disk is done by half, or not at all, and it raises.

    ``for_good``: so do all later ones. Yields the names of the calls so far.
    """
    calls: list[str] = []
    real = {
        "save_file": state.save_file,
        "sync": state.sync,
        "rmtree": shutil.rmtree,
        "replace": os.replace,
        **{name: getattr(Path, name) for name in ("mkdir", "rename", "unlink", "write_text")},
    }

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(name)
            if len(calls) < number or (len(calls) > number and not for_good):
                return real[name](*args, **more)
            if len(calls) == number and name == "save_file":
                write_half(Path(args[1]), lambda: real[name](*args, **more))
            if len(calls) == number and name == "write_text":
                Path(args[0]).write_bytes(args[1][: len(args[1]) // 2].encode())
            if len(calls) == number and name == "rmtree" and (held := sorted(Path(args[0]).glob("*"))):
                os.unlink(held[0])
            if name == "rmtree" and more.get("ignore_errors") and not for_good:
                return None
            raise failure()

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save_file", watched("save_file"))
        patch.setattr(state, "sync", watched("sync"))
        patch.setattr(shutil, "rmtree", watched("rmtree"))
        patch.setattr(os, "replace", watched("replace"))
        for name in ("mkdir", "rename", "unlink", "write_text"):
            patch.setattr(Path, name, watched(name))
        yield calls


# What is there before, and the step that is then written: anew, the first, one that is there, behind one.
SITUATIONS: dict[str, tuple[list[int], int, int]] = {
    "the first": ([], 2, 1),
    "one more": ([2, 4], 6, 2),
    "the only one anew": ([4], 4, 1),
    "gone back": ([2, 4], 3, 2),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_ended_at_any_moment_of_a_save_a_whole_checkpoint_is_left(tmp_path: Path, situation: str) -> None:
    before, step, keep = SITUATIONS[situation]
    done = False
    for number in range(1, 100):
        out = tmp_path / str(number)
        out.mkdir()
        for earlier in before:
            save(out, some(earlier), earlier, keep)
        (out / ".writing-abc").mkdir()  # of a model folder, by an earlier one that was killed
        with disk(number, EndedError, for_good=True) as calls:
            try:
                save(out, some(100), step, keep)
                done = len(calls) < number
            except EndedError:
                assert len(calls) >= number
        found = list(checkpoints(out))
        assert not done or found[0].step == step
        assert len(found) >= min(len(before), 1)
        for checkpoint in found:
            held = stored(checkpoint)
            old = checkpoint.step in before and same(held, some(checkpoint.step))
            assert old or (checkpoint.step == step and same(held, some(100)))
        # The next save removes what was left.
        save(out, some(7), 7, keep=1)
        assert steps(out) == [7]
        assert leftovers(out) == []
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000007"]
        if done:
            break
    assert number > 8


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_disk_that_is_full_at_any_moment_is_an_output_error(tmp_path: Path, situation: str) -> None:
    """Or none at all, where it only keeps something from being removed."""
    before, step, keep = SITUATIONS[situation]
    refused: list[OutputError] = []
    for number in range(1, 100):
        out = tmp_path / str(number)
        out.mkdir()
        for earlier in before:
            save(out, some(earlier), earlier, keep)
        with disk(number, full, for_good=False) as calls:
            try:
                save(out, some(100), step, keep)
            except OutputError as error:
                refused.append(error)
        found = list(checkpoints(out))
        assert len(found) >= min(len(before), 1)
        for checkpoint in found:
            held = stored(checkpoint)
            old = checkpoint.step in before and same(held, some(checkpoint.step))
            assert old or (checkpoint.step == step and same(held, some(100)))
        save(out, some(7), 7, keep=1)
        assert leftovers(out) == []
        assert steps(out) == [7]
        if len(calls) < number:
            break
    assert len(refused) >= 7
    assert all("No space left" in error.message and "make room" in error.hint for error in refused)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within, no file of this process can grow beyond ``size`` bytes: what a full disk looks like to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 50, 1000, 4000])
def test_a_file_that_does_not_fit_is_an_output_error(tmp_path: Path, size: int) -> None:
    tensors = {"model.a": torch.randn(40, 30)}
    save(tmp_path, tensors, 2)
    with files_up_to(size), pytest.raises(OutputError, match=r"step-000000004 could not be written: .*too large"):
        save(tmp_path, {"model.a": torch.zeros(40, 30)}, 4)
    assert steps(tmp_path) == [2]
    assert same(stored(newest(tmp_path)), tensors)
    assert leftovers(tmp_path) == []


def test_a_model_folder_that_does_not_fit_is_an_output_error(tmp_path: Path) -> None:
    one = model()
    save_folder(one, tmp_path, dtype=torch.float32)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for size in (0, 100, 20_000):
        with files_up_to(size), pytest.raises(OutputError):
            save_folder(model(2), tmp_path, dtype=torch.float32)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert match_folder(tmp_path, one.config)


# --- The log of events


def logged(file: Path, *events: dict[str, Any], end: str = "") -> None:
    file.write_text("".join(json.dumps(event) + "\n" for event in events) + end)


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, **more}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_log_is_cut_behind_the_step_gone_back_to(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    events = [{"event": "start", "step": 0}, step(1), step(2), {"event": "save", "step": 2}, step(3)]
    logged(file, *events, end='{"event": "step", "st')
    keep_metrics_until(file, 2)
    assert read(file) == events[:-1]
    keep_metrics_until(file, 2)
    assert read(file) == events[:-1]
    keep_metrics_until(file, 0)
    assert read(file) == events[:1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_steps_that_a_run_went_back_from_stay_in_the_log(tmp_path: Path) -> None:
    """The checkpoint is of the second time that it came to step 6, and knows that it went back."""
    file = tmp_path / "metrics.jsonl"
    first = [step(4), {"event": "save", "step": 4}, *(step(i, skipped=True) for i in (5, 6, 7, 8))]
    again = [{"event": "rollback", "step": 8, "to_step": 4}, step(5), step(6), {"event": "save", "step": 6}]
    logged(file, *first, *again, step(7))
    keep_metrics_until(file, 6)
    assert read(file) == [*first, *again]
    keep_metrics_until(file, 4)
    assert read(file) == first[:2]


@pytest.mark.parametrize("line", ["null", "[1]", "7", '{"step": "x"}', "\x00\x00", "é"])
def test_what_is_no_event_is_dropped_from_the_log(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    logged(file, step(1), end=line + "\n" + json.dumps(step(2)) + "\n")
    keep_metrics_until(file, 2)
    assert read(file) == [step(1), step(2)]


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    keep_metrics_until(tmp_path / "metrics.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_knows_its_step() -> None:
    assert Checkpoint(Path("x"), {"step": 3}).step == 3
