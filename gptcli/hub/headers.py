"""A remote model's tensors, from the headers of its safetensors files alone: range requests of some kilobytes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from gptcli.hub.choose import Read, read_config_of, shards_by_tensor, weights
from gptcli.hub.reach import Hub, Listing
from gptcli.spec.config import ModelConfig
from gptcli.spec.index import INDEX_NAME, TensorInfo, header_length, join_shards, parse_header

# A first request of this many bytes holds the 8 of the length, and most headers whole.
_FIRST_BYTES = 1 << 16
_AT_ONCE = 8


def read_remote(hub: Hub, listing: Listing) -> tuple[ModelConfig, dict[str, TensorInfo]]:
    """The configuration and all tensors of a model on the Hub; raises as ``read_config`` and ``read_folder`` do."""

    @cache
    def read(name: str) -> bytes:
        return hub.read(listing, name)[0]

    config = read_config_of(listing, read)
    return config, read_tensors(hub, listing, read)


def read_tensors(hub: Hub, listing: Listing, read: Read) -> dict[str, TensorInfo]:
    """All tensors of a model on the Hub: one or two requests a file, several files at once."""
    names = weights(listing, read)
    shards = [name for name in names if name != INDEX_NAME]
    pool = ThreadPoolExecutor(min(_AT_ONCE, len(shards)))
    try:
        headers: Mapping[str, dict[str, TensorInfo]] = dict(
            zip(shards, pool.map(lambda shard: _header(hub, listing, shard), shards), strict=True)
        )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # the first failure is told at once
    if INDEX_NAME not in names:
        return headers[shards[0]]
    return join_shards(Path(f"{listing.name}/{INDEX_NAME}"), shards_by_tensor(listing, read), headers)


def _header(hub: Hub, listing: Listing, shard: str) -> dict[str, TensorInfo]:
    where = Path(f"{listing.name}/{shard}")
    first, size = hub.read(listing, shard, 0, _FIRST_BYTES)
    end = 8 + header_length(where, first, size)
    if end > len(first):
        first += hub.read(listing, shard, len(first), end)[0]
    return parse_header(where, first[8:end], size)
