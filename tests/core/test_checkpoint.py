"""Model folders: what is saved comes back, what does not fit is named, and a failed save leaves what was there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptcli.core import checkpoint
from gptcli.core.build import open_model, random_model
from gptcli.core.checkpoint import save_folder, written_folder
from gptcli.core.model import Transformer
from gptcli.errors import CorruptError, NotFoundError, OutputError
from gptcli.spec.config import from_hf, read_config
from gptcli.spec.index import FILE_NAME, INDEX_NAME
from tests.conftest import PATIENCE

RAW: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 60,
    "n_positions": 16,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 40,
}


def new_model(seed: int = 0, **changes: Any) -> Transformer:
    """Every parameter random, so that no two can be mistaken for each other."""
    model = random_model(from_hf({**RAW, **changes}), seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def load(folder: Path, dtype: str = "float32") -> Transformer:
    return open_model(folder, None, device="cpu", dtype=dtype).transformer  # type: ignore[arg-type]


def parameters(model: Transformer) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def assert_same(got: Transformer, wanted: Transformer, dtype: torch.dtype = torch.float32) -> None:
    ours, theirs = parameters(got), parameters(wanted)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name].to(dtype).to(value.dtype)), name


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "mine"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 12_000, 1])
def test_saved_and_opened_is_the_same(folder: Path, tied: bool, shard_bytes: int) -> None:
    model = new_model(tie_word_embeddings=tied)
    save_folder(model, folder, dtype=torch.float32, shard_bytes=shard_bytes)
    back = load(folder)
    assert_same(back, model)
    assert (back.unembedding.weight is back.embedding.weight) == tied
    assert read_config(folder).tied == tied
    assert all(parameter.device.type == "cpu" and not parameter.requires_grad for parameter in back.parameters())
    assert not back.training
    ids = torch.arange(12)[None]
    torch.testing.assert_close(back(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(folder: Path, dtype: torch.dtype) -> None:
    model = new_model()
    save_folder(model, folder, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(folder / FILE_NAME).values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_same(load(folder), model, dtype)
    for name, value in parameters(load(folder)).items():
        assert not torch.equal(value, parameters(model)[name])
        torch.testing.assert_close(value, parameters(model)[name], atol=1e-6, rtol=2**-8)


def test_loading_in_another_type(folder: Path) -> None:
    model = new_model()
    save_folder(model, folder, dtype=torch.float32)
    back = load(folder, "bfloat16")
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert_same(back, model, torch.bfloat16)


def test_shards_hold_what_the_single_file_holds(tmp_path: Path) -> None:
    model = new_model()
    save_folder(model, tmp_path / "one", dtype=torch.float32)
    save_folder(model, tmp_path / "many", dtype=torch.float32, shard_bytes=12_000)
    whole = load_file(tmp_path / "one" / FILE_NAME)
    index = json.loads((tmp_path / "many" / INDEX_NAME).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert names(tmp_path / "many") == {*shards, INDEX_NAME, "config.json"}
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    parts: dict[str, Tensor] = {}
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        assert all(index["weight_map"][name] == shard for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
        parts.update(tensors)
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_names_and_layout_on_disk_are_hugging_faces(folder: Path) -> None:
    model = new_model()
    save_folder(model, folder, dtype=torch.float32)
    disk = load_file(folder / FILE_NAME)
    assert len(disk) == 2 + 2 * 12 + 2
    assert "lm_head.weight" not in disk
    ours = parameters(model)
    joined = torch.cat([ours[f"blocks.1.attention.{part}.weight"] for part in ("query", "key", "value")])
    assert torch.equal(disk["transformer.h.1.attn.c_attn.weight"], joined.t())
    assert torch.equal(disk["transformer.h.0.mlp.c_fc.weight"], ours["blocks.0.mlp.up.weight"].t())
    assert torch.equal(disk["transformer.wte.weight"], ours["embedding.weight"])
    assert read_config(folder).mlp_width == 40


def test_other_files_are_written_and_those_of_others_stay(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "tokenizer.json").write_text("old")
    save_folder(new_model(), folder, dtype=torch.float32, files={"tokenizer.json": b"{}", "README.md": b"# x\n"})
    assert names(folder) == {"config.json", FILE_NAME, "tokenizer.json", "README.md", "notes.txt"}
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert (folder / "notes.txt").read_text() == "mine"


def test_files_may_be_read_by_whom_the_umask_lets(folder: Path) -> None:
    mask = os.umask(0o027)
    try:
        save_folder(new_model(), folder, dtype=torch.float32)
    finally:
        assert os.umask(mask) == 0o027  # and the mask itself is left alone
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("before", [10**9, 12_000, 8_000])
@pytest.mark.parametrize("after", [10**9, 12_000, 8_000])
def test_saving_anew_removes_the_files_of_the_save_before(folder: Path, before: int, after: int) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32, shard_bytes=before)
    save_folder(new_model(2), folder, dtype=torch.float32, shard_bytes=after)
    assert_same(load(folder), new_model(2))
    fresh = folder.with_name("fresh")
    save_folder(new_model(2), fresh, dtype=torch.float32, shard_bytes=after)
    assert contents(folder) == contents(fresh)


def test_a_model_may_be_saved_over_the_file_that_it_is_mapped_from(folder: Path) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32)
    model = load(folder)
    save_folder(model, folder, dtype=torch.float32)
    assert_same(load(folder), new_model(1))
    save_folder(new_model(2), folder, dtype=torch.float32)
    assert_same(model, new_model(1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_of_the_right_type_stay_mapped_from_the_file(folder: Path) -> None:
    """No tensor is allocated: all of them lie where the file is mapped."""
    save_folder(new_model(), folder, dtype=torch.float32)
    model = load(folder)
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / FILE_NAME)):
            first, last = line.split()[0].split("-")
            ranges.append((int(first, 16), int(last, 16)))
    assert ranges
    for name, parameter in model.named_parameters():
        assert any(first <= parameter.data_ptr() < last for first, last in ranges), name


# Loading is strict.


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    save_folder(new_model(), folder, dtype=torch.float32)
    tensors = load_file(folder / FILE_NAME)
    change(tensors)
    save_file(tensors, folder / FILE_NAME)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), r"missing: h\.1\.ln_2\.bias"),
        (lambda t: t.update(extra=torch.zeros(2)), r"left over: extra"),
        (lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(16)}), r"left over: transformer\.h\.2\.ln_1"),
        (lambda t: t.update({"wte.weight": torch.zeros(60, 16)}), r"left over: (transformer\.)?wte\.weight"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.zeros(8, 16)}),
            r"transformer\.wpe\.weight is \[8, 16\].*wants \[16, 16\]",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(40, 16)}),
            r"c_fc\.weight is \[40, 16\].*wants \[16, 40\]",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16, dtype=torch.int32)}),
            r"ln_f\.bias is of type I32",
        ),
    ],
    ids=["missing", "left over", "a third layer", "twice", "short", "turned", "integers"],
)
def test_what_does_not_fit_is_named(folder: Path, change: Callable[[dict[str, Tensor]], None], says: str) -> None:
    with pytest.raises(CorruptError, match=says) as caught:
        load(rewritten(folder, change))
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_an_untied_model_needs_its_unembedding(folder: Path) -> None:
    save_folder(new_model(tie_word_embeddings=True), folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(CorruptError, match=r"missing: lm_head\.weight"):
        load(folder)


def test_a_tied_model_may_repeat_its_unembedding_and_old_files_their_masks(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)

    assert_same(load(rewritten(folder, change)), new_model())


def test_files_that_are_cut_short_or_not_there(folder: Path) -> None:
    save_folder(new_model(), folder, dtype=torch.float32)
    whole = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(whole[:-4])
    with pytest.raises(CorruptError, match="ends at byte"):
        load(folder)
    (folder / FILE_NAME).unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("length", [0x10280, 0x10480, 0x1013C, 0x13C20], ids=hex)
def test_no_length_of_a_header_is_taken_for_another_format(folder: Path, length: int) -> None:
    """A file begins with its header's length, whose bytes may look like a pickle's first two or like a blank and <."""
    save_folder(new_model(), folder, dtype=torch.float32)
    data = (folder / FILE_NAME).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip().ljust(length)
    (folder / FILE_NAME).write_bytes(length.to_bytes(8, "little") + header + data[end:])
    assert_same(load(folder), new_model())


def test_no_more_than_a_shard_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    written: list[str] = []

    def counted(model: Transformer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in real_tensors(model, dtype):
            made.append(name)
            yield name, tensor

    def saved(shard: dict[str, Tensor], file: Path, **more: Any) -> None:
        written.extend(shard)
        assert written == made
        save_file(shard, file, **more)

    real_tensors = checkpoint.disk_tensors
    monkeypatch.setattr(checkpoint, "disk_tensors", counted)
    monkeypatch.setattr(checkpoint, "save_file", saved)
    save_folder(new_model(), tmp_path / "many", dtype=torch.float32, shard_bytes=12_000)
    assert_same(load(tmp_path / "many"), new_model())


def test_a_shard_that_is_not_there(folder: Path) -> None:
    save_folder(new_model(), folder, dtype=torch.float32, shard_bytes=12_000)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(NotFoundError, match="model-00002-of"):
        load(folder)


# A save that fails leaves what was there.

_SAVE = """
import resource, signal, sys
from pathlib import Path
import torch
from gptcli.core.build import random_model
from gptcli.core.checkpoint import save_folder
from gptcli.errors import OutputError
from gptcli.spec.config import from_hf

folder, limit, shard_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
model = random_model(from_hf(eval(sys.argv[4])), 5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_folder(model, folder, dtype=torch.float32, shard_bytes=shard_bytes)
except OutputError as error:
    print(error.message, "|", error.hint)
    raise SystemExit(7)
"""


def save_with_little_room(folder: Path, limit: int, shard_bytes: int) -> subprocess.CompletedProcess[str]:
    root = Path(checkpoint.__file__).parent.parent.parent
    command = [sys.executable, "-c", _SAVE, str(folder), str(limit), str(shard_bytes), repr(RAW)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(root)}
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("limit", "shard_bytes"), [(100, 10**9), (10_000, 10**9), (7_000, 8_000)], ids=["config", "weights", "a shard"]
)
def test_a_full_disk_is_told_and_the_old_folder_stays_whole(folder: Path, limit: int, shard_bytes: int) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32, files={"tokenizer.json": b"{}"})
    before = contents(folder)
    done = save_with_little_room(folder, limit, shard_bytes)
    assert done.returncode == 7, done.stderr
    assert f"{folder} could not be written" in done.stdout
    assert "make room on the disk" in done.stdout
    assert contents(folder) == before  # no temporary file either
    assert_same(load(folder), new_model(1))


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_with_room_the_same_save_succeeds(folder: Path) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32)
    done = save_with_little_room(folder, 10**6, 10**9)
    assert done.returncode == 0, done.stderr
    assert_same(load(folder), random_model(from_hf(RAW), 5))


def test_a_failure_while_syncing_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32)
    before = contents(folder)

    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        save_folder(new_model(2), folder, dtype=torch.float32, shard_bytes=12_000)
    assert contents(folder) == before


@pytest.mark.parametrize(("before", "after"), [(10**9, 12_000), (12_000, 10**9), (12_000, 8_000)])
def test_stopped_at_any_rename_or_removal_the_folder_is_the_old_or_the_new(
    folder: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the machine had stopped there: whichever set of weights is found, it is whole."""

    class Stopped(BaseException):
        pass

    replace, unlink = os.replace, Path.unlink
    for stop_at in range(100):
        target = folder.with_name(f"stop-{stop_at}")
        save_folder(new_model(1), target, dtype=torch.float32, shard_bytes=before)
        left = stop_at

        def count() -> None:
            nonlocal left
            if left == 0:
                raise Stopped
            left -= 1

        def counted_replace(source: Path, place: Path) -> None:
            count()
            replace(source, place)

        def counted_unlink(path: Path, missing_ok: bool = False) -> None:
            count()
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted_replace)
            patch.setattr(Path, "unlink", counted_unlink)
            try:
                save_folder(new_model(2), target, dtype=torch.float32, shard_bytes=after)
                stopped = False
            except Stopped:
                stopped = True
        found = parameters(load(target))
        is_old, is_new = (
            all(torch.equal(found[name], value) for name, value in parameters(new_model(seed)).items())
            for seed in (1, 2)
        )
        assert is_new or (stopped and is_old)
        if not stopped:
            break
    assert 3 < stop_at < 99


def test_an_error_of_the_callers_own_is_not_dressed_up(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_folder(folder):
        _ = 1 // 0
    assert contents(folder) == {}


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match="could not be written"):
        save_folder(new_model(), tmp_path / "file" / "model", dtype=torch.float32)
    with pytest.raises(OutputError, match="could not be written"):
        save_folder(new_model(), tmp_path / "file", dtype=torch.float32)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(folder: Path) -> None:
    save_folder(new_model(1), folder, dtype=torch.float32)
    before = contents(folder)
    folder.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="ermission") as caught:
            save_folder(new_model(2), folder, dtype=torch.float32)
        assert "check that the folder can be written" in caught.value.hint
        assert contents(folder) == before
    finally:
        folder.chmod(0o755)


def test_a_tokenizer_takes_the_chat_template_of_the_one_before_with_it(folder: Path) -> None:
    model = new_model()
    mine = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}
    save_folder(model, folder, files=mine, dtype=torch.float32)
    assert names(folder) >= set(mine)
    save_folder(model, folder, files={"tokenizer.json": b"{}"}, dtype=torch.float32)
    assert names(folder) & set(mine) == {"tokenizer.json"}
