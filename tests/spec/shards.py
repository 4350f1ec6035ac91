"""A folder of many shards whose tensors are holes: whole headers, no data on the disk."""

from __future__ import annotations

import json
from itertools import count
from math import prod
from pathlib import Path

from gptcli.spec.config import ModelConfig, to_hf
from gptcli.spec.index import DTYPE_BITS, INDEX_NAME
from gptcli.spec.match import disk_layout, written_name


def hollow_folder(folder: Path, config: ModelConfig, shards: int, dtype: str = "BF16") -> int:
    """Write ``shards`` files with an index and a config.json; returns the bytes of all headers, lengths included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    tensors = [(written_name(config, name), disk.shape) for name, disk in disk_layout(config).items()]
    files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    weight_map: dict[str, str] = {}
    headers = 0
    for number, file in zip(count(), files):
        mine, position = {}, 0
        for name, shape in tensors[number::shards]:
            end = position + prod(shape) * DTYPE_BITS[dtype] // 8
            mine[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
            weight_map[name] = file
        header = json.dumps(mine).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + position)
        headers += 8 + len(header)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return headers
