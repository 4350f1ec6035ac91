"""Safetensors headers and shard indexes, read with the standard library: names, dtypes, shapes, offsets; no tensor.

The format: 8 bytes of header length (little-endian), that many bytes of JSON, then the data. Every number of a file
is checked before it is used: a bad file is a CorruptError that says what is wrong, never a crash or a huge allocation.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gptcli.errors import CorruptError, NotFoundError

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_AGAIN = "download or save the file again"
_MOST_DIMENSIONS = 16
_MOST_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

# Bits, since sub-byte types exist; only the first three are types that a model here is computed in.
DTYPE_BITS = {
    "F32": 32, "BF16": 16, "F16": 16, "F64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64,
}  # fmt: skip
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; ``begin`` and ``end`` are byte offsets into ``file``."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: Path

    @property
    def parameters(self) -> int:
        return prod(self.shape)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that one safetensors file declares, in the file's order.

    Raises NotFoundError without a file and CorruptError for anything that is not a whole, well-formed safetensors
    file: a Git LFS pointer, a pickle, a header past the end, offsets that overlap, leave the file or contradict
    dtype and shape, a name that stands twice, a file cut short.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = stream.read(header_length(file, stream.read(8), size))
    except FileNotFoundError:
        raise NotFoundError(f"there is no {file}", "a model folder holds model.safetensors or its shards") from None
    except OSError as error:
        raise CorruptError(f"{file} can't be read: {error.strerror}", "check the file") from None
    return parse_header(file, raw, size)


def header_length(file: Path, start: bytes, size: int) -> int:
    """The bytes of a header, from the first 8 of a file of ``size`` bytes; raises like ``read_header``."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
        _refuse_other_formats(file, start)
    if len(start) < 8:
        raise CorruptError(f"{file} has {size} bytes: too short for a safetensors file", _AGAIN)
    if length > min(size - 8, _MOST_HEADER_BYTES):
        message = f"{file} declares a header of {length:,} bytes, but the file has {size:,}"
        raise CorruptError(message, f"it is cut short or not a safetensors file: {_AGAIN}")
    return length


def parse_header(file: Path, raw: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors that the JSON of a header declares, of a file of ``size`` bytes; raises like ``read_header``."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateName as error:
        raise CorruptError(f"{file} declares {error} twice", _AGAIN) from None
    except (ValueError, RecursionError):
        raise CorruptError(f"the header of {file} is not JSON", _AGAIN) from None
    if not isinstance(header, dict):
        raise CorruptError(f"the header of {file} is not an object", _AGAIN)
    header.pop("__metadata__", None)
    base = 8 + len(raw)
    tensors = {name: _tensor_info(file, name, entry, base) for name, entry in header.items()}
    _check_layout(file, tensors, base, size)
    return tensors


def read_folder(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a model folder: of ``model.safetensors``, or of the shards that the index names.

    The index, not a glob, says which files belong. Raises like ``read_header``, and CorruptError when index and
    shards contradict each other.
    """
    if not (folder / INDEX_NAME).exists():
        if not (folder / FILE_NAME).exists() and _only_pickles(folder):
            message = f"{folder} holds its weights as a pickle, which can run code and is never read"
            raise NotFoundError(message, "get the model's safetensors revision, or convert it with transformers")
        if not (folder / FILE_NAME).exists() and any(folder.glob("model-*-of-*.safetensors")):
            message = f"{folder} holds shards of a model, but no {INDEX_NAME}, which says what is in them"
            raise NotFoundError(message, "get that file too: models pull, or a copy from where the shards are from")
        return read_header(folder / FILE_NAME)
    return read_index(folder / INDEX_NAME)


def read_index(index: Path) -> dict[str, TensorInfo]:
    """The tensors of the shards that an ``index.json`` names; raises like ``read_folder``."""
    try:
        raw = index.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"there is no {index}", "check the path") from None
    except OSError:
        raise CorruptError(f"{index} is not an index with a weight_map", _AGAIN) from None
    files = parse_index(index, raw)
    shards = list(dict.fromkeys(files.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        message = f"{index.parent} lacks {len(missing)} of {len(shards)} shards that its index names: {missing[0]}"
        more = " and others" if len(missing) > 1 else ""
        raise NotFoundError(message + more, "get or copy the model again; models pull goes on where it stopped")
    return join_shards(index, files, {shard: read_header(index.parent / shard) for shard in shards})


def parse_index(index: Path, raw: bytes) -> dict[str, str]:
    """The shard of each tensor, from an index's JSON. Raises CorruptError, also for a shard that is not beside it."""
    try:
        files = {str(name): str(shard) for name, shard in json.loads(raw)["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CorruptError(f"{index} is not an index with a weight_map", _AGAIN) from None
    for shard in dict.fromkeys(files.values()):
        if Path(shard).name != shard or not shard.isprintable():
            raise CorruptError(f"{index} names {shard!r}, which is not beside it", _AGAIN)
    return files


def join_shards(
    index: Path, files: Mapping[str, str], headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all shards. Raises CorruptError where the index and a shard's header do not agree."""
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        promised = {name for name, file in files.items() if file == shard}
        if promised != header.keys():
            names = ", ".join(sorted(promised ^ header.keys())[:5])
            raise CorruptError(f"{index.name} and {shard} do not agree on {names}", _AGAIN)
        tensors.update(header)
    return tensors


class _DuplicateName(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise _DuplicateName(name)
        result[name] = value
    return result


def _refuse_other_formats(file: Path, start: bytes) -> None:
    if start.startswith(b"version "):
        raise CorruptError(f"{file} is a Git LFS pointer, not the weights", "run `git lfs pull` in its repository")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise CorruptError(f"{file} is a pickle, which can run code and is never read", "get the safetensors file")
    if start.startswith(b"GGUF"):
        raise CorruptError(f"{file} is a GGUF file", "get the model as safetensors")
    if start.lstrip()[:1] == b"<":
        raise CorruptError(f"{file} is a web page, not the weights", _AGAIN)


def _only_pickles(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def _tensor_info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        begin, end = offsets
    except (TypeError, KeyError, ValueError):
        raise CorruptError(f"{file}: the entry of {name} lacks dtype, shape or data_offsets", _AGAIN) from None
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > _MOST_DIMENSIONS:
        raise CorruptError(f"{file}: the shape or offsets of {name} are not sizes in a list", _AGAIN)
    if any(type(number) is not int or not 0 <= number < 2**63 for number in [*shape, begin, end]):
        raise CorruptError(f"{file}: the shape or offsets of {name} are not sizes", _AGAIN)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CorruptError(f"{file}: {name} has the unknown dtype {dtype!r}", _AGAIN)
    size = (prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    if end - begin != size:
        message = f"{file}: {name} of dtype {dtype} and shape {list(shape)} needs {size:,} bytes, not {end - begin:,}"
        raise CorruptError(message, _AGAIN)
    return TensorInfo(dtype, tuple(shape), base + begin, base + end, file)


def _check_layout(file: Path, tensors: dict[str, TensorInfo], base: int, size: int) -> None:
    position = base
    previous = "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.end > size:
            message = f"{file} ends at byte {size:,}, but {name} reaches to {info.end:,}"
            raise CorruptError(message, f"the download is not complete: {_AGAIN}")
        if info.begin < position:
            raise CorruptError(f"{file}: {previous} and {name} overlap", _AGAIN)
        if info.begin > position:
            raise CorruptError(f"{file}: there is a hole between {previous} and {name}", _AGAIN)
        position, previous = info.end, name
    if position != size:
        raise CorruptError(f"{file} has {size - position:,} bytes after its last tensor", _AGAIN)
