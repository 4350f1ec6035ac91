"""How many cards a model takes, and how it would be split over them.

The simplest split that fits comes first: one card; then tensor parallel within ``GROUP_CARDS`` cards, which talk twice
a block and want a fast link (Shoeybi et al. 2019, Megatron-LM): whole heads, rows of the up-projections, columns of the
output and down-projections, rows of the tables, norms and positions everywhere; then such groups in a pipeline, each
with some of the layers. Training here is split over data alone (``spec/plan.py``): DDP or fully sharded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gptcli.spec.config import ModelConfig
from gptcli.spec.memory import Storage, held, is_quantized, kv_bytes_per_token, number_bytes, tensor_bytes
from gptcli.spec.params import Tensor
from gptcli.spec.plan import COMMUNICATION_BYTES, CONTEXT_BYTES, FRAGMENTATION, Optimizer, TrainingPlan, plan_training

GROUP_CARDS = 8


@dataclass(frozen=True)
class Holding:
    """What one card holds of a model that answers, in bytes.

    ``workspace``: the largest values that stand at once while a whole prompt goes through, and the logits.
    """

    weights: int
    kv_cache: int
    workspace: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace + self.overhead

    def to_dict(self) -> dict[str, int]:
        return {f"{name}_bytes": size for name, size in asdict(self).items()} | {"total_bytes": self.total}


@dataclass(frozen=True)
class Split:
    """A model over ``tensor`` x ``pipeline`` cards; ``stages`` are (layers, what each card of the stage holds)."""

    tensor: int
    stages: tuple[tuple[int, Holding], ...]

    @property
    def pipeline(self) -> int:
        return len(self.stages)

    @property
    def cards(self) -> int:
        return self.tensor * self.pipeline

    @property
    def fullest(self) -> Holding:
        return max((holding for _, holding in self.stages), key=lambda holding: holding.total)


@dataclass(frozen=True)
class _Parts:
    """What tensor parallelism over ``tensor`` cards leaves on each, before layers are shared out. Bytes."""

    config: ModelConfig
    tensor: int
    before: int  # embedding, positions
    block: int
    after: int  # final norm, unembedding unless it is the table
    copy: int  # of a tied table, where its two ends are on different cards
    kv_cache: int  # of one layer
    workspace: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: Storage, tensor: int, context: int, sequences: int) -> _Parts:
        sizes = {"before": 0, "block": 0, "after": 0}
        table = 0
        for each in held(config, dtype):
            size = tensor_bytes(each, part_shape(each, tensor), dtype)
            looked_up = each.category in ("Embedding", "Positions")
            sizes["block" if each.layer is not None else "before" if looked_up else "after"] += size
            table = size if each.category == "Embedding" else table
        kv_cache = kv_bytes_per_token(config, dtype) // config.layers // tensor * context * sequences
        widest = max(
            (2 * config.heads + 2 * config.kv_heads) * config.head_dim, (3 if config.gated else 2) * config.mlp_width
        )
        values = context * sequences * (2 * config.width + -(-widest // tensor))
        logits = 4 * sequences * -(-config.vocab_size // tensor)
        workspace = values * number_bytes(dtype) + logits
        copy = table if config.tied and not is_quantized(dtype) else 0
        return cls(config, tensor, **sizes, copy=copy, kv_cache=kv_cache, workspace=workspace)

    def stage(self, number: int, pipeline: int) -> tuple[int, Holding]:
        """The layers of a stage of the pipeline, and what each of its cards holds.

        Layers that are left over go to the stages behind the first, which has the tables.
        """
        layers, more = divmod(self.config.layers, pipeline)
        layers += 1 <= number <= more
        weights = layers * self.block
        if number == 0:
            weights += self.before
        if number == pipeline - 1:
            weights += self.after + (self.copy if pipeline > 1 else 0)
        overhead = CONTEXT_BYTES + (COMMUNICATION_BYTES if self.tensor * pipeline > 1 else 0)
        overhead += round(FRAGMENTATION * self.workspace)
        return layers, Holding(weights, layers * self.kv_cache, self.workspace, overhead)

    def fits(self, pipeline: int, card_bytes: int) -> bool:
        """Looks at the stages that may be the fullest: the first, the next, the last."""
        stages = {0, min(1, pipeline - 1), pipeline - 1}
        return all(self.stage(number, pipeline)[1].total <= card_bytes for number in stages)

    def split(self, pipeline: int) -> Split:
        return Split(self.tensor, tuple(self.stage(number, pipeline) for number in range(pipeline)))


def part_shape(tensor: Tensor, cards: int) -> tuple[int, ...]:
    """The part of a tensor on the fullest of some tensor-parallel cards."""
    if tensor.category in ("Norms", "Positions"):
        return tensor.shape
    if ".attention.output." in tensor.name or ".mlp.down." in tensor.name:
        # Each card adds up what its columns give; the bias is added once, and takes next to nothing everywhere.
        return (tensor.shape[0], -(-tensor.shape[1] // cards)) if tensor.is_block_matrix else tensor.shape
    return (-(-tensor.shape[0] // cards), *tensor.shape[1:])


def tensor_parallel_sizes(config: ModelConfig) -> list[int]:
    """Over how many cards of a group whole heads can be dealt out evenly."""
    return [n for n in range(1, GROUP_CARDS + 1) if config.heads % n == 0 and config.kv_heads % n == 0]


def split_model(config: ModelConfig, dtype: Storage, tensor: int, pipeline: int, context: int, sequences: int) -> Split:
    """What each card holds of a model that answers ``sequences`` texts of ``context`` tokens at once."""
    return _Parts.of(config, dtype, tensor, context, sequences).split(pipeline)


def fit_inference(
    config: ModelConfig, dtype: Storage, card_bytes: int, *, context: int, sequences: int = 1
) -> tuple[Split, Split] | None:
    """The simplest split that fits cards of ``card_bytes``, and the one over the fewest; None where none does.

    They differ where whole heads can't be dealt out over few cards, yet a pipeline does with fewer.
    """
    found: dict[int, tuple[_Parts, int]] = {}
    for tensor in tensor_parallel_sizes(config):
        parts = _Parts.of(config, dtype, tensor, context, sequences)
        pipeline = next((n for n in range(1, config.layers + 1) if parts.fits(n, card_bytes)), None)
        if pipeline is not None:
            found[tensor] = parts, pipeline
        if pipeline == 1:
            break  # more cards in the group are not simpler
    if not found:
        return None
    fewest = min(found, key=lambda tensor: (tensor * found[tensor][1], -tensor))
    simplest = next((tensor for tensor, (_, pipeline) in found.items() if pipeline == 1), fewest)
    first, least = (found[tensor][0].split(found[tensor][1]) for tensor in (simplest, fewest))
    return first, least


def fit_training(config: ModelConfig, optimizer: Optimizer, card_bytes: int, context: int) -> TrainingPlan | None:
    """The plan of training on the fewest cards that hold it, one row of ``context`` tokens on each, in bfloat16.

    None where no number of cards does: one block and its activations are too large for one.
    """

    def plan(ranks: int) -> TrainingPlan:
        return plan_training(
            config,
            ranks=ranks,
            card_bytes=card_bytes,
            batch_tokens=ranks * context,
            micro_batch_rows=1,
            optimizer=optimizer,
            parallel="fsdp" if ranks > 1 else "none",
            context=context,
        )

    least = plan(1).least_ranks
    return None if least is None else plan(least)


def inference_dict(dtype: Storage, fit: tuple[Split, Split] | None, count: int | None) -> dict[str, Any]:
    """An answer of ``fit_inference`` for JSON output; ``count`` cards that are there hold ``data`` copies."""
    if fit is None:
        names = ("cards", "tensor", "pipeline", "fewest_cards", "card", "stages")
        return {"dtype": dtype, **dict.fromkeys(names), "data": None if count is None else 0}
    split, fewest = fit
    return {
        "dtype": dtype,
        "cards": split.cards,
        "tensor": split.tensor,
        "pipeline": split.pipeline,
        "fewest_cards": fewest.cards,
        "card": split.fullest.to_dict(),
        "stages": [{"layers": layers, **holding.to_dict()} for layers, holding in split.stages],
        "data": None if count is None else count // split.cards,
    }
