"""Where a model's tensors would be before any is loaded: what each card holds of it, and whether that fits.

Dealt out over ``tp`` cards as ``spec/split.py`` says, and so to the byte what loading makes of it; or on one card with
the layers on the host (``core/offload.py``). What lives while it answers, keys and values and the workspace, is added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.errors import UsageError
from gptcli.spec.cards import Holding
from gptcli.spec.config import ModelConfig
from gptcli.spec.memory import Storage, held, number_bytes, tensor_bytes
from gptcli.spec.params import Tensor
from gptcli.spec.plan import COMMUNICATION_BYTES, CONTEXT_BYTES, FRAGMENTATION
from gptcli.spec.split import Share, Slice, check_split, split_sizes

_PLACES = 2  # of blocks on a card whose layers are on the host
_WAYS = {
    "heads": "by heads",
    "kv_heads": "by key-value heads",
    "hidden": "by hidden numbers",
    "vocabulary": "by tokens",
    "first": "on rank 0",
    "whole": "whole",
}


@dataclass(frozen=True)
class Placed:
    """Tensors alike in all layers, on one rank.

    Attributes:
        name: ours, with ``*`` for the layer; ``count`` how many there are.
        whole, part: the shape in the model, and here.
        how: what it is dealt out by.
        bytes: of all of them here.
    """

    name: str
    count: int
    whole: tuple[int, ...]
    part: tuple[int, ...]
    how: str
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        shapes = {"shape": list(self.whole), "part": list(self.part)}
        return {"name": self.name, "count": self.count, **shapes, "dealt_out": self.how, "bytes": self.bytes}


@dataclass(frozen=True)
class Placing:
    """The answer of a plan; ``card_bytes`` is None where the card's size is not known, and so ``fits``.

    ``ranks`` are what each card holds; ``tensors`` what rank 0 does; ``host_bytes`` what stays on the host.
    """

    config: ModelConfig
    cards: int
    card_bytes: int | None
    tp: int
    storage: Storage
    offload: bool
    context: int
    sequences: int
    ranks: tuple[Holding, ...]
    tensors: tuple[Placed, ...]
    host_bytes: int
    fewest: int | None  # the fewest such cards over which it fits; None: no number, or the size is not known

    @property
    def fits(self) -> bool | None:
        return None if self.card_bytes is None else self.fullest.total <= self.card_bytes

    @property
    def fullest(self) -> Holding:
        return max(self.ranks, key=lambda holding: holding.total)

    def to_dict(self) -> dict[str, Any]:
        """For JSON output; units stand in the names."""
        spare = None if self.card_bytes is None else [self.card_bytes - each.total for each in self.ranks]
        return {
            "cards": self.cards,
            "card_bytes": self.card_bytes,
            "tp": self.tp,
            "storage": self.storage,
            "offload": self.offload,
            "context": self.context,
            "sequences": self.sequences,
            "ranks": [
                {"rank": rank, **each.to_dict(), "spare_bytes": None if spare is None else spare[rank]}
                for rank, each in enumerate(self.ranks)
            ],
            "host_bytes": self.host_bytes,
            "tensors": [each.to_dict() for each in self.tensors],
            "fits": self.fits,
            "fewest_cards": self.fewest,
        }


def plan_placing(
    config: ModelConfig,
    storage: Storage,
    *,
    cards: int,
    card_bytes: int | None,
    tp: int | None = None,
    offload: bool = False,
    context: int,
    sequences: int = 1,
) -> Placing:
    """What each of ``cards`` cards would hold of a model that answers ``sequences`` texts of ``context`` tokens.

    ``tp`` None takes the fewest cards over which it fits, or where none does as many as there are heads for. Raises
    UsageError for a ``tp`` beyond the cards or with ``offload``, and as ``check_split``.
    """
    if offload and (tp or 1) > 1:
        raise UsageError("--tp and --offload do not go together", "leave out one")
    check_split(config, tp or 1)
    if tp is not None and tp > cards:
        raise UsageError(
            f"--tp {tp} takes {tp} cards, and there are {cards}", f"use --gpus {tp}x..., or a smaller --tp"
        )

    def fullest(ranks: int) -> int:
        share = Share(config, 0, ranks)  # which has the biases and the logits, but of an uneven rest perhaps one less
        return max(
            holding(each, storage, context, sequences).total for each in (share, Share(config, ranks - 1, ranks))
        )

    sizes = split_sizes(config)
    fitting = [n for n in sizes if card_bytes is not None and fullest(n) <= card_bytes]
    if tp is None:
        there = [n for n in sizes if n <= cards]
        tp = 1 if offload else next((n for n in fitting if n <= cards), 1 if card_bytes is None else there[-1])
    shares = [Share(config, rank, tp) for rank in range(tp)]
    host, ranks = 0, tuple(holding(share, storage, context, sequences) for share in shares)
    if offload:
        host, moved = _offloaded(shares[0], storage)
        only = ranks[0]
        ranks = (Holding(only.weights - host + moved, only.kv_cache, only.workspace, only.overhead),)
    return Placing(
        config,
        cards,
        card_bytes,
        tp,
        storage,
        offload,
        context,
        sequences,
        ranks,
        tuple(_placed(shares[0], storage)),
        host,
        fitting[0] if fitting else None,
    )


def holding(share: Share, storage: Storage, context: int, sequences: int) -> Holding:
    """What one rank holds while whole prompts go through."""
    part, number = share.part, number_bytes(storage)
    cache = 2 * part.layers * part.kv_heads * part.head_dim * number * context * sequences
    widest = max((2 * part.heads + 2 * part.kv_heads) * part.head_dim, (3 if part.gated else 2) * part.mlp_width)
    start, stop = share.span("vocabulary")
    logits = 4 * sequences * (stop - start + (part.vocab_size if share.rank == 0 and share.ranks > 1 else 0))
    workspace = context * sequences * (2 * part.width + widest) * number + logits
    overhead = CONTEXT_BYTES + (COMMUNICATION_BYTES if share.ranks > 1 else 0) + round(FRAGMENTATION * workspace)
    return Holding(weights_bytes(share, storage), cache, workspace, overhead)


def weights_bytes(share: Share, storage: Storage) -> int:
    """Of the tensors of one rank, as ``core.build.open_part`` leaves them."""
    return sum(count * _bytes(tensor, share.slice(tensor.name), storage) for tensor, count in _held(share, storage))


def _held(share: Share, storage: Storage) -> Sequence[tuple[Tensor, int]]:
    return [each for each in held(share.config, storage).items() if not share.slice(each[0].name).empty]


def _bytes(tensor: Tensor, slice_: Slice, storage: Storage) -> int:
    return tensor_bytes(tensor, slice_.shape(tensor.shape), storage)


def _placed(share: Share, storage: Storage) -> list[Placed]:
    found = []
    for tensor, count in _held(share, storage):
        slice_ = share.slice(tensor.name)
        name = re.sub(r"^blocks\.\d+\.", "blocks.*.", tensor.name)
        size = count * _bytes(tensor, slice_, storage)
        found.append(Placed(name, count, tensor.shape, slice_.shape(tensor.shape), _WAYS[slice_.by], size))
    return found


def _offloaded(share: Share, storage: Storage) -> tuple[int, int]:
    """Bytes of all blocks, which are on the host, and of those that have a place on the card."""
    every = [(tensor, count) for tensor, count in _held(share, storage) if tensor.layer is not None]
    block = sum(_bytes(tensor, share.slice(tensor.name), storage) for tensor, _ in every)
    layers = share.config.layers
    return layers * block, min(_PLACES, layers) * block


def storage_of(dtype: str, quantize: str, stored: str | None) -> Storage:
    """How weights would be kept: quantized, or in the type that is asked for; auto is the file's own, or bfloat16."""
    kinds: dict[str, Storage] = {"int8": "int8", "int4": "int4", "float32": "float32"}
    if quantize != "none":
        return kinds[quantize]
    wanted = (stored or "bfloat16") if dtype == "auto" else dtype
    return kinds.get(wanted, "bfloat16")
