"""Training on paper: what each rank holds at the fullest moment of a step, whether that fits, and what a step computes.

What is assumed, as the training loop does it: master weights, gradients and optimizer state in float32; bfloat16 by
autocast; fused attention (a CPU's attention in blocks keeps its patterns as well, ``B H T T / 2`` a layer); cross
entropy in chunks; nothing compiled (compiled code saves less, not more).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from math import ceil, prod
from typing import Any, Literal

from gptcli.errors import UnsupportedError, UsageError
from gptcli.spec.config import ModelConfig
from gptcli.spec.flops import flops_per_token
from gptcli.spec.params import Tensor, grouped, tensors

Parallel = Literal["none", "ddp", "fsdp"]
Optimizer = Literal["adamw", "muon"]
Dtype = Literal["float32", "bfloat16"]

# The logits of one chunk of tokens on a card, in elements; and in bytes, with their softmax or gradient, in float32.
LOGIT_CHUNK = 1 << 28
LOGIT_BYTES = 2 * 4 * LOGIT_CHUNK
# The CUDA context, the libraries' workspaces and code.
CONTEXT_BYTES = 1_000_000_000
# What NCCL keeps for its channels, where there is more than one rank.
COMMUNICATION_BYTES = 500_000_000
# Of what lives for one pass only, so much again is lost between the allocator's blocks.
FRAGMENTATION = 0.05

_FLOAT32, _BFLOAT16, _INT64 = 4, 2, 8
# A plan for more cards than this is a typing error.
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class RankMemory:
    """What the fullest rank holds, in bytes, when the backward pass begins: nothing is freed yet.

    ``activations``: what autograd saved of one micro-batch, and the largest gradients in flight. ``gathered``: with
    fsdp, whole weights brought together and gradients about to be parted; else autocast's copies of the weights.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gathered: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {f"{name}_bytes": size for name, size in asdict(self).items()} | {"total_bytes": self.total}


@dataclass(frozen=True)
class TrainingPlan:
    """The answer of a dry run. ``fits`` is None where the card's size is not known."""

    config: ModelConfig
    parameters: int
    ranks: int
    card_bytes: int | None
    parallel: Parallel
    optimizer: Optimizer
    dtype: Dtype
    checkpoint_activations: bool
    context: int  # tokens a row
    batch_tokens: int  # tokens a step, over all ranks: whole rows, as many on each rank
    micro_batch_rows: int  # rows a rank puts through at once; the last time in a step may be fewer
    accumulate: int  # how often, for one step
    rank: RankMemory
    flops_per_token: float
    # The fewest such cards that could hold it, sharded, with checkpointing and one row at a time; None: no number can,
    # or the card's size is not known.
    least_ranks: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.card_bytes is None else self.rank.total <= self.card_bytes

    @property
    def spare_bytes(self) -> int | None:
        """What is left of the card; negative is what is missing."""
        return None if self.card_bytes is None else self.card_bytes - self.rank.total

    def to_dict(self) -> dict[str, Any]:
        """For JSON output; units stand in the names."""
        return {
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "ranks": self.ranks,
            "card_bytes": self.card_bytes,
            "parallel": self.parallel,
            "optimizer": self.optimizer,
            "dtype": self.dtype,
            "checkpoint_activations": self.checkpoint_activations,
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "micro_batch": self.micro_batch_rows,
            "accumulate": self.accumulate,
            "rank": self.rank.to_dict(),
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "least_ranks": self.least_ranks,
            "flops_per_token": self.flops_per_token,
            "flops_per_step": self.flops_per_token * self.batch_tokens,
        }


def plan_training(
    config: ModelConfig,
    *,
    ranks: int,
    card_bytes: int | None,
    batch_tokens: int,
    micro_batch_rows: int | None = None,
    optimizer: Optimizer = "adamw",
    dtype: Dtype = "bfloat16",
    parallel: Parallel | Literal["auto"] = "auto",
    checkpoint_activations: bool | None = None,
    context: int | None = None,
) -> TrainingPlan:
    """What training a model would hold on each of ``ranks`` cards.

    Args:
        card_bytes: memory of one card; None where it is not known, and then nothing is said of fitting.
        batch_tokens: tokens a step over all ranks; at least one row on each rank, whatever it says.
        micro_batch_rows: rows a rank puts through at once; None is the most that fit, and at least 1.
        parallel: ``auto`` is ``choose_parallel``'s answer.
        checkpoint_activations: None is only where not even one row fits without.
        context: tokens a row; None is the model's.

    Raises UsageError for counts below 1 and for several ranks without a way to share, UnsupportedError for a model
    that can't be trained here.
    """
    context = config.context if context is None else context
    counts = {"ranks": ranks, "batch tokens": batch_tokens, "context": context, "memory of a card": card_bytes}
    for name, count in {**counts, "micro-batch": micro_batch_rows}.items():
        if count is not None and count < 1:
            raise UsageError(f"a plan with {name} of {count} means nothing", "give a number of at least 1")
    if ranks > _MOST_RANKS:
        raise UsageError(f"{ranks:,} cards are more than can be planned for", f"at most {_MOST_RANKS:,}")
    if parallel == "none" and ranks > 1:
        raise UsageError(f"{ranks} ranks can't work without sharing", "use ddp or fsdp")
    if not config.norm_first:
        raise UnsupportedError(f"the family {config.family} is here for counting only", "use a GPT-2 model")

    kind = choose_parallel(config, ranks, card_bytes, optimizer) if parallel == "auto" else parallel
    rows = max(1, round(batch_tokens / (context * ranks)))
    state = State.of(config, ranks, kind, optimizer, dtype)
    for checkpoint in (False, True) if checkpoint_activations is None else (checkpoint_activations,):
        if micro_batch_rows is None:
            most = _most_rows(state, rows, context, checkpoint, card_bytes)
            micro = ceil(rows / ceil(rows / most))  # as even as it goes
        else:
            micro = min(micro_batch_rows, rows)
        memory = state.with_rows(micro, context, checkpoint)
        if card_bytes is None or memory.total <= card_bytes:
            break
    return TrainingPlan(
        config=config,
        parameters=sum(tensor.parameters for tensor in tensors(config)),
        ranks=ranks,
        card_bytes=card_bytes,
        parallel=kind,
        optimizer=optimizer,
        dtype=dtype,
        checkpoint_activations=checkpoint,
        context=context,
        batch_tokens=rows * ranks * context,
        micro_batch_rows=micro,
        accumulate=ceil(rows / micro),
        rank=memory,
        flops_per_token=flops_per_token(config, context),
        least_ranks=None if card_bytes is None else _least_ranks(config, card_bytes, optimizer, dtype, context),
    )


def choose_parallel(
    config: ModelConfig, ranks: int, card_bytes: int | None, optimizer: Optimizer = "adamw"
) -> Parallel:
    """How ranks share the work: ``none`` alone; ``ddp`` where a whole copy of weights, gradients and optimizer state
    takes at most half a card, or the card's size is not known; else ``fsdp``.
    """
    if ranks == 1:
        return "none"
    copy = sum(2 * _FLOAT32 * tensor.parameters + _optimizer_bytes(tensor, optimizer) for tensor in tensors(config))
    return "ddp" if card_bytes is None or 2 * copy <= card_bytes else "fsdp"


def shard_parameters(tensor: Tensor, ranks: int) -> int:
    """The parameters of a tensor on the rank with the most: the first, whose part of dimension 0 is rounded up."""
    return ceil(tensor.shape[0] / ranks) * prod(tensor.shape[1:])


def saved_bytes(config: ModelConfig, tokens: int, dtype: Dtype, *, checkpoint: bool = False) -> int:
    """What autograd saves of a forward pass over ``tokens`` (rows x context), up to the logits and without them.

    A layer, per token: both norms' inputs (the stream, float32) and statistics; each matrix's input; query, key, value
    and what attention gathered (which is the output matrix's input), with a float32 logsumexp a head; the MLP before
    and after its activation (a ReLU keeps only the latter, a gate adds its own); norms of query and key keep their
    inputs too. In bfloat16 the stream stays float32, the rest halves, but autocast casts a matrix's input anew for each
    matrix that shares it. With checkpointing: the stream into each layer, and one layer in full. Not counted are copies
    of weights, and the masks of windows, which do not grow with the rows.
    """
    each, stream = _size(dtype), _FLOAT32 * config.width
    head = stream + _norm_bytes(config) + each * config.width + 2 * _INT64  # final norm, unembedding; ids and targets
    layers = config.layers * stream if checkpoint else config.layers * _layer_bytes(config, dtype)
    again = _layer_bytes(config, dtype) - stream if checkpoint else 0
    return tokens * (head + layers + again)


def _layer_bytes(config: ModelConfig, dtype: Dtype) -> int:
    """One layer of ``saved_bytes``, for one token."""
    each, width, wide = _size(dtype), config.width, config.mlp_width
    casts = dtype != "float32"
    # Side by side, both norms read the same stream.
    norms = (1 if config.parallel else 2) * _FLOAT32 * width + 2 * _norm_bytes(config)
    if config.qk_norm != "none":  # as any RMS norm, of each head or of all as one
        heads = config.heads + config.kv_heads
        norms += _FLOAT32 * (2 * heads * config.head_dim + (heads if config.qk_norm == "head" else 2))
    attention_in = width * (3 if casts else 1)
    attention = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    if config.rope_dim is not None or config.windows:  # what is gathered then lies head by head, and is put in order
        attention += config.heads * config.head_dim
    mlp_in = width * (2 if casts and config.gated else 1)
    mlp = (1 if config.activation == "relu" else 2) * wide + (2 * wide if config.gated else 0)
    return norms + each * (attention_in + attention + mlp_in + mlp) + _FLOAT32 * config.heads


def _norm_bytes(config: ModelConfig) -> int:
    """What a norm saves besides its input: mean and deviation, or the root and (unless fused) the normed vector."""
    return 2 * _FLOAT32 if config.norm == "layernorm" else _FLOAT32 + _FLOAT32 * config.width


def _gradient_bytes(config: ModelConfig, tokens: int, dtype: Dtype) -> int:
    """The gradients of activations in flight at their most: the stream's and the MLP's.

    What is saved is freed as it is used, so that no more than these stand at once beside what is left of it; a ReLU's
    output serves twice, and waits.
    """
    hidden = (2 if config.gated or config.activation == "relu" else 1) * config.mlp_width
    return tokens * (_FLOAT32 * config.width + _size(dtype) * hidden)


@dataclass(frozen=True)
class State:
    """What a rank holds whatever it is fed."""

    config: ModelConfig
    dtype: Dtype
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int

    @classmethod
    def of(cls, config: ModelConfig, ranks: int, parallel: Parallel, optimizer: Optimizer, dtype: Dtype) -> State:
        parts = ranks if parallel == "fsdp" else 1
        held = moments = 0
        for tensor, count in grouped(config).items():
            part = shard_parameters(tensor, parts)
            held += count * part
            moments += count * _optimizer_bytes(tensor, optimizer, part)
        gathered = _gathered_bytes(config, dtype) if parallel == "fsdp" else _cast_bytes(config, dtype)
        return cls(config, dtype, ranks, _FLOAT32 * held, _FLOAT32 * held, moments, gathered)

    def with_rows(self, rows: int, context: int, checkpoint: bool) -> RankMemory:
        tokens = rows * context
        activations = saved_bytes(self.config, tokens, self.dtype, checkpoint=checkpoint)
        activations += _gradient_bytes(self.config, tokens, self.dtype)
        logits = min(LOGIT_BYTES, 2 * _FLOAT32 * self.config.vocab_size * tokens)
        overhead = CONTEXT_BYTES + (COMMUNICATION_BYTES if self.ranks > 1 else 0)
        overhead += round(FRAGMENTATION * (activations + logits + self.gathered))
        return RankMemory(self.weights, self.gradients, self.optimizer, activations, logits, self.gathered, overhead)


def _optimizer_bytes(tensor: Tensor, optimizer: Optimizer, parameters: int | None = None) -> int:
    """AdamW keeps two moments a parameter, Muon one, and Muon is for the blocks' matrices alone. Float32."""
    moments = 1 if optimizer == "muon" and tensor.is_block_matrix else 2
    return moments * _FLOAT32 * (tensor.parameters if parameters is None else parameters)


def _cast_bytes(config: ModelConfig, dtype: Dtype) -> int:
    """Autocast's copies of what multiplies (matrices and their biases, the unembedding), kept for the backward pass.

    Norms and looked-up tables are not cast. In float32 there are none; with checkpointing this is an upper bound, for
    a block's are freed after the forward pass and made again. DDP's buckets are the gradients themselves
    (``gradient_as_bucket_view``) and take nothing more.
    """
    if dtype == "float32":
        return 0
    every = grouped(config).items()
    blocks = sum(count * t.parameters for t, count in every if t.layer is not None and t.category != "Norms")
    return _BFLOAT16 * (blocks + config.vocab_size * config.width)


def _gathered_bytes(config: ModelConfig, dtype: Dtype) -> int:
    """Fully sharded: the matrices of the block at work and of the next one, already on its way, whole; one block's
    gradient whole, and its float32 copy that is about to be parted. What belongs to no block, and the norms, whole
    throughout in float32, with their gradient, and the unembedding as it is multiplied.

    A rank parts its gradients after every micro-batch, so no whole set of them ever stands.
    """
    every = grouped(config)
    block = sum(t.parameters for t in every if t.layer is not None and t.category != "Norms")
    root = sum(count * t.parameters for t, count in every.items() if t.layer is None or t.category == "Norms")
    cast = 0 if dtype == "float32" else _BFLOAT16 * config.vocab_size * config.width
    return _size(dtype) * 3 * block + _FLOAT32 * (block + 2 * root) + cast


def _size(dtype: Dtype) -> int:
    return _FLOAT32 if dtype == "float32" else _BFLOAT16


def _most_rows(state: State, rows: int, context: int, checkpoint: bool, card_bytes: int | None) -> int:
    """The most rows, up to ``rows``, that fit beside the state; 1 where none does or the card is not known."""
    if card_bytes is None:
        return 1
    fits, too_many = 1, rows + 1
    while too_many - fits > 1:
        tried = (fits + too_many) // 2
        if state.with_rows(tried, context, checkpoint).total <= card_bytes:
            fits = tried
        else:
            too_many = tried
    return fits


def _least_ranks(config: ModelConfig, card_bytes: int, optimizer: Optimizer, dtype: Dtype, context: int) -> int | None:
    """The fewest cards of this size that hold one row each, everything saved that can be."""

    def fits(ranks: int) -> bool:
        state = State.of(config, ranks, "fsdp" if ranks > 1 else "none", optimizer, dtype)
        return state.with_rows(1, context, checkpoint=True).total <= card_bytes

    if fits(1):
        return 1
    short, enough = 1, 2
    while not fits(enough):
        if enough >= _MOST_RANKS:
            return None
        short, enough = enough, 2 * enough
    while enough - short > 1:  # shards only shrink as ranks are added
        tried = (short + enough) // 2
        short, enough = (short, tried) if fits(tried) else (tried, enough)
    return enough


_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_CARDS = re.compile(r"(?:([0-9]{1,7})\s*[x×*]\s*)?([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([MGT]i?B)", re.IGNORECASE)


def parse_cards(text: str) -> tuple[int, int]:
    """``8x141GB`` as (8, bytes of one card); without a count it is one card. GB is 10^9 bytes, GiB is 2^30.

    Raises UsageError for anything else.
    """
    found = _CARDS.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} names no cards", "write a count and the memory of one, as 8x141GB or 80GiB")
    count, size = int(found[1] or 1), int(Decimal(found[2]) * _UNITS[found[3].upper()])
    if not 1 <= count <= _MOST_RANKS or size < 1:
        raise UsageError(f"{text!r} is no number of cards", f"1 to {_MOST_RANKS:,} cards with some memory")
    return count, size
