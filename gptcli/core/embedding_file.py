"""Vectors written to a file: .npy or .safetensors, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from gptcli.core.embedding import Vector

SUFFIXES = (".npy", ".safetensors")


def save_vectors(file: Path, vectors: Sequence[Vector], metadata: Mapping[str, str]) -> None:
    """Write N vectors into a ``.npy`` or ``.safetensors`` file, by its ending.

    ``.npy`` is one float32 array ``[N, C]``; with one vector a token all tokens' rows, text after text.
    ``.safetensors`` has that as ``vectors``, beside it ``lengths`` ``[N]`` (tokens a text) and ``tokens`` (all ids, one
    after the other), both int64, and the metadata. Raises OSError.
    """
    rows = torch.cat([vector.values.reshape(-1, vector.values.shape[-1]) for vector in vectors])
    if file.suffix.lower() == ".npy":
        made = io.BytesIO()
        np.lib.format.write_array(made, rows.numpy().astype("<f4", copy=False), allow_pickle=False)
        write_whole(file, made.getbuffer())
        return
    tensors = {
        "vectors": rows,
        "lengths": torch.tensor([len(vector.ids) for vector in vectors]),
        "tokens": torch.tensor([id_ for vector in vectors for id_ in vector.ids]),
    }
    write_whole(file, save(tensors, dict(metadata)))


def write_whole(file: Path, data: bytes | memoryview) -> None:
    """Write beside, sync, rename: whoever looks finds what was there before, or all of the new. Raises OSError."""
    if file.exists() and not file.is_file():  # a device or a pipe can't be replaced
        file.write_bytes(data)
        return
    target = file.resolve()  # a link stays one
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
