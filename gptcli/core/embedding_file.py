"""Vectors written to a file: .npy or .safetensors, whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from gptcli.core.embedding import Vector
from gptcli.core.files import write_whole

SUFFIXES = (".npy", ".safetensors")


def save_vectors(file: Path, vectors: Sequence[Vector], metadata: Mapping[str, str]) -> None:
    """Write N vectors into a ``.npy`` or ``.safetensors`` file, by its ending.

    ``.npy`` is one float32 array ``[N, C]``; with one vector a token all tokens' rows, text after text.
    ``.safetensors`` has that as ``vectors``, beside it ``lengths`` ``[N]`` (tokens a text) and ``tokens`` (all ids, one
    after the other), both int64, and the metadata. Raises OutputError.
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
