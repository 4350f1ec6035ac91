"""Model folders, read and written: safetensors in, safetensors out, strict both ways on tensors.

Load maps the file and hands each tensor to the model without a copy where the type is right: peak memory is the
weights once. Save writes beside, syncs, and renames file by file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptcli.core import runtime
from gptcli.core.files import output_errors, read_ahead, sync, umask
from gptcli.core.model import Transformer
from gptcli.errors import CorruptError
from gptcli.spec.config import to_hf
from gptcli.spec.files import BESIDE, UNREAD, VOCABULARY
from gptcli.spec.index import FILE_NAME, INDEX_NAME
from gptcli.spec.match import DiskTensor, Matched, disk_layout, written_name
from gptcli.spec.split import Share

SHARD_BYTES = 5_000_000_000
# Smaller files are there before a thread is.
_WORTH_AHEAD = 1 << 26
_TOKENIZER_FILES = (*VOCABULARY, *UNREAD, *BESIDE)


def load_weights(
    model: Transformer,
    matched: Matched,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    share: Share | None = None,
) -> int:
    """Fill a model built on the meta device from the files of a matched folder, tensor by tensor.

    A tensor already of ``dtype`` and bound for the CPU stays mapped from the file; None leaves all in the types of the
    file. With a ``share`` only its slices are read. Returns how many bytes of the files were taken. Raises CorruptError
    when a file can't be read.
    """
    layout = disk_layout(share.config if share else model.config)
    taken = 0
    by_file: dict[Path, list[str]] = {}
    for name, (_, info) in matched.items():
        by_file.setdefault(info.file, []).append(name)
    size = sum(info.end - info.begin for _, info in matched.values())
    if share is None and _WORTH_AHEAD < size < (runtime.free_memory_bytes() or 0):
        read_ahead(by_file)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                for name in names:
                    if share is not None:
                        for ours, part, size in _slices(stream.get_slice(matched[name][0]), layout[name], share):
                            taken += size
                            assign(model, ours, part.to(device=device, dtype=dtype or part.dtype).contiguous())
                        continue
                    tensor = stream.get_tensor(matched[name][0])
                    taken += tensor.nbytes
                    # On a device, move first: the transposed view then copies there and not here.
                    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype)
                    for ours, part in our_parts(tensor, layout[name]):
                        assign(model, ours, part)
        except (SafetensorError, OSError) as error:
            raise CorruptError(f"{file} can't be read: {error}", "download or save the file again") from None
    model.tie()
    return taken


def _slices(stored: Any, entry: DiskTensor, share: Share) -> Iterator[tuple[str, Tensor, int]]:
    """What a rank holds of one tensor on disk (``get_slice``): our names, slices, and the bytes that were looked at.

    Of what stands by turns, the turns that hold some of it are.
    """
    heights = entry.rows()
    turn, above = sum(heights), 0
    for (ours, rows), height in zip(entry.parts, heights, strict=True):
        slice_ = share.slice(ours)
        start, stop = (slice_.start, slice_.stop) if slice_.dim == 0 else (0, rows)
        first, end = start // height, -(-stop // height)  # turns
        if entry.turns == 1:
            ranges = [slice(above + start, above + stop)]
        else:
            ranges = [slice(first * turn, end * turn)]
        ranges += [slice(None)] * (len(entry.shape) - 1)
        if slice_.dim == 1:
            ranges[1] = slice(slice_.start, slice_.stop)
        if not slice_.empty:
            tensor = stored[tuple(ranges[::-1] if entry.transpose else ranges)]
            taken = tensor.nbytes
            tensor = tensor.t() if entry.transpose else tensor
            if entry.turns > 1:
                own = tensor.unflatten(0, (end - first, turn))[:, above : above + height].flatten(0, 1)
                tensor = own[start - first * height : stop - first * height]
            yield ours, tensor, taken
        above += height


def our_parts(tensor: Tensor, entry: DiskTensor) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, by name, that one on disk holds: views of it, but for rows that come by turns, which are copied."""
    if entry.transpose:
        tensor = tensor.t()
    turns = tensor.unflatten(0, (entry.turns, -1))  # [turns, rows of one, ...]
    for (ours, _), part in zip(entry.parts, turns.split(entry.rows(), dim=1), strict=True):
        yield ours, part.flatten(0, 1)


def disk_tensor(parts: Sequence[Tensor], entry: DiskTensor) -> Tensor:
    """The tensor on disk that holds ours, contiguous; the inverse of ``our_parts``."""
    turns = [part.unflatten(0, (entry.turns, -1)) for part in parts]
    tensor = torch.cat(turns, dim=1).flatten(0, 1)
    return (tensor.t() if entry.transpose else tensor).contiguous()


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the parameter of this name, whose module has to be there."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def disk_tensors(model: Transformer, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as its family keeps them on disk, on the CPU, in ``dtype``, one at a time."""
    ours = dict(model.named_parameters())
    for name, entry in disk_layout(model.config).items():
        parts = [ours[part].detach().to("cpu", dtype) for part, _ in entry.parts]
        yield written_name(model.config, name), disk_tensor(parts, entry)


def save_folder(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder that ``transformers`` opens: config.json, model.safetensors or shards, and ``files``.

    Raises OutputError when it can't be written (a full disk, no permission); what stood there before is then whole.
    """
    name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {**to_hf(model.config), "torch_dtype": name}
    texts = {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **(files or {})}
    with written_folder(folder) as temporary:
        for file, data in texts.items():
            (temporary / file).write_bytes(data)
        _write_weights(model, temporary, dtype, shard_bytes)


def _write_weights(model: Transformer, folder: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """One file, or shards with their index; no more than a shard is in memory at a time."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, entry in disk_layout(model.config).items():
        nbytes = math.prod(entry.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(written_name(model.config, name))
        size += nbytes
        total += nbytes
    tensors = disk_tensors(model, dtype)
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = FILE_NAME if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(islice(tensors, len(names)))
        assert list(shard) == names
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``; on leaving, its files are synced and renamed into ``folder``.

    A failure leaves ``folder`` as it was and is raised as OutputError. Each file is replaced whole. A model of the same
    shape is whole at any moment; a stop between two renames to another shape leaves what loading refuses by name.
    """
    temporary = None
    with output_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
            yield temporary
            written = sorted(temporary.iterdir())
            for file in written:
                file.chmod(0o666 & ~umask())  # some are made readable to their owner alone
                sync(file)
            stale = _stale(folder, {file.name for file in written})
            # The weights go first, the index behind its shards, the configuration last.
            for file in sorted(written, key=lambda file: (file.name == "config.json", file.name == INDEX_NAME)):
                os.replace(file, folder / file.name)
            for file in stale:
                file.unlink(missing_ok=True)
            sync(folder)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _stale(folder: Path, written: set[str]) -> list[Path]:
    """Files of an earlier save that would count before the new: other shards, another kind of tokenizer."""
    if not written & {FILE_NAME, INDEX_NAME}:
        return []
    # The index first: without it the new single file counts, with it the shards that are about to go.
    old = [folder / INDEX_NAME, *folder.glob("model-*-of-*.safetensors"), folder / FILE_NAME]
    if written & set(_TOKENIZER_FILES):
        old += [folder / name for name in _TOKENIZER_FILES]
    return [file for file in old if file.exists() and file.name not in written]
