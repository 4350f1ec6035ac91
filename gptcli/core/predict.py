"""What comes next: the distribution that softmax makes of the last logits, and how likely whole continuations are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptcli.core.build import Model
from gptcli.core.decode import Decoder, padded
from gptcli.core.distribution import Candidate, Continuation, Distribution, check_lengths
from gptcli.core.generate import check_finite, check_prompt

# Memory for the keys, values and logits of rows that are computed together; more rows wait for their turn.
_ROOM_BYTES = 1 << 30
# Tokens that a row may always be padded with; beyond, to twice its length.
_PADDING = 16


def next_logits(model: Model, ids: Sequence[int]) -> Tensor:
    """The logits ``[V]`` of the token after ``ids``, on the model's device and in its dtype.

    Raises LimitError for more ids than the context, UsageError for an id that the model does not have, CorruptError
    for weights whose logits are not finite.
    """
    return next_logits_batch(model, [ids])[0]


@torch.inference_mode()
def next_logits_batch(model: Model, prompts: Sequence[Sequence[int]]) -> Tensor:
    """``next_logits`` of several prompts, ``[B, V]``, as many of them together as the memory set aside allows."""
    for ids in prompts:
        check_prompt(model, ids)
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for rows in _batches(model, [len(ids) for ids in prompts], copies=1, logits=1):
        lengths = [len(prompts[row]) for row in rows]
        batch = torch.tensor(padded([prompts[row] for row in rows]), device=model.device)
        logits = model.transformer(batch, last=torch.tensor(lengths, device=model.device) - 1)  # [B, V]
        check_finite(model, logits)
        for row, each in zip(rows, logits, strict=True):
            found[row] = each
    return torch.stack(found)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of ``logits / temperature`` over the last axis, in float64 on the host, whatever the logits are in.

    Temperature 0 is its limit: all on the likeliest token, the first of several with the same logit.
    """
    wide = logits.float().cpu().double()
    if temperature == 0:
        return torch.nn.functional.one_hot(wide.argmax(-1), wide.shape[-1]).double()
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)


def distribution(logits: Tensor, temperature: float = 1.0, top: int = 10) -> Distribution:
    """The distribution over the next token that logits ``[V]`` give at a temperature, and its ``top`` likeliest tokens.

    The order is that of the logits, so it is the same at every temperature. The entropy is of the whole vocabulary, in
    bits.
    """
    chances = probabilities(logits, temperature)
    nats = -torch.special.xlogy(chances, chances).sum()
    best = logits.float().cpu().sort(descending=True, stable=True)
    ids, rest = best.indices[:top], best.indices[top:]
    candidates = zip(ids.tolist(), best.values[:top].tolist(), chances[ids].tolist(), strict=True)
    return Distribution(
        temperature,
        max(0.0, nats.item() / math.log(2)),
        tuple(Candidate(*each) for each in candidates),
        chances[rest].sum().item(),
    )


def check_continuations(model: Model, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> None:
    """Raise LimitError where a prompt and a choice exceed the context, UsageError for ids that are not there.

    A choice's last token is predicted, never read, so it may stand one past the context.
    """
    check_lengths(prompt, choices, model.config.context, model.name)
    for ids in (prompt, *choices):
        check_prompt(model, ids)


@torch.inference_mode()
def score_continuations(
    model: Model, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
) -> list[list[Continuation]]:
    """How likely each choice is after each prompt: for each prompt its choices, in their order.

    A prompt is computed once for all choices, and as many rows go together as the memory set aside allows. Neither
    prompts nor choices may be empty. Raises what ``check_continuations`` does, and CorruptError for weights whose
    logits are not finite.
    """
    for prompt in prompts:
        check_continuations(model, prompt, choices)
    found: list[list[Continuation]] = [[]] * len(prompts)
    longest = max(map(len, choices))
    lengths = [len(prompt) + longest - 1 for prompt in prompts]
    for rows in _batches(model, lengths, copies=1 + len(choices), logits=longest):
        together = _score_together(model, [prompts[row] for row in rows], choices)
        for row, scored in zip(rows, together, strict=True):
            found[row] = scored
    return found


def _score_together(
    model: Model, prompts: Sequence[Sequence[int]], choices: Sequence[Sequence[int]]
) -> list[list[Continuation]]:
    """``score_continuations`` with one fill of the cache; the choices go on from copies of it."""
    longest = max(map(len, choices))
    decoder = Decoder(model.transformer)
    capacity = max(map(len, prompts)) + longest - 1
    logits = decoder.prefill(prompts, capacity)
    check_finite(model, logits)
    first = _logprobs(logits)  # [B, V]
    found = [[Continuation(tuple(ids), (each[ids[0]].item(),)) for ids in choices] for each in first]
    more = [number for number, ids in enumerate(choices) if len(ids) > 1]
    for part in _batches(model, [capacity] * len(more), copies=len(prompts), logits=longest):
        numbers = [more[place] for place in part]
        assert decoder.cache is not None
        cache = copy.copy(decoder.cache)  # the tensors are replaced next, not written
        cache.select([row for row in range(len(prompts)) for _ in numbers])
        ids = torch.tensor(padded([choices[number][:-1] for number in numbers]), device=model.device)
        logits = model.transformer(ids.repeat(len(prompts), 1), cache)  # [B * choices, T, V]
        pairs = [(row, number) for row in range(len(prompts)) for number in numbers]
        for (row, number), each in zip(pairs, logits, strict=True):
            rest = choices[number][1:]
            check_finite(model, each[: len(rest)])
            logprobs = _logprobs(each[: len(rest)])  # [T, V]
            chosen = logprobs.gather(1, torch.tensor(rest)[:, None])[:, 0].tolist()
            before = found[row][number]
            found[row][number] = Continuation(before.ids, (*before.logprobs, *chosen))
    return found


def _logprobs(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis, as exact as ``probabilities``."""
    return logits.float().cpu().double().log_softmax(-1)


def _batches(model: Model, lengths: Sequence[int], *, copies: int, logits: int) -> Iterator[list[int]]:
    """Row numbers that go together: of like length, so that little is padded, and at least one at a time.

    Each row stands for ``copies`` rows of the cache, of its length in tokens, and for so many times ``logits`` logits.
    """
    config = model.config
    token = 2 * config.layers * config.kv_heads * config.head_dim * model.dtype.itemsize
    most = _ROOM_BYTES // copies
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        each = lengths[row] * token + logits * config.vocab_size * 4
        if rows and ((len(rows) + 1) * each > most or lengths[row] > 2 * lengths[rows[0]] + _PADDING):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
