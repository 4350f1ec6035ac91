"""A plain GPT-2 and a plain training loop in the manner of nanoGPT: what gptcli's training is measured against.

It has what a careful person writes in an afternoon and no more: one fused matrix for query, key and value, torch's own
causal attention, a tied head, all logits at once, fused AdamW with decay on matrices only, a warm-up and a cosine,
clipped gradients, windows from random places of one token stream, bf16 by autocast, ``torch.compile`` if asked.
It is no strawman: nothing waits for the device between two steps, and the loss is inside what is compiled.

    model = make_model(Size(...), seed=0, device="cpu")
    for loss in train_steps(model, tokens, Recipe(steps=1000)): ...
    nats, count = evaluate(model, held_out_tokens, context=256)
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """A GPT-2 of any size; heads are ``width / heads`` wide and the MLP four times the width."""

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are nanoGPT's for small models (its train_shakespeare_char.py), without dropout.

    Of ``steps`` and ``minutes`` one is set; ``minutes`` are of the wall, whatever happens between two steps included.
    """

    steps: int | None = None
    minutes: float | None = None
    rows: int = 16  # windows a step
    micro_rows: int | None = None  # windows a forward pass; gradients of several are added up. None: all rows
    lr: float = 1e-3
    final_lr: float = 0.1  # part of lr that is left at the end
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: torch.dtype = torch.float32  # bfloat16: by autocast, the weights stay float32
    compile: bool = False
    seed: int = 0


class GPT(nn.Module):
    """GPT-2: pre-norm blocks, learned positions, biases everywhere, the head tied to the embedding."""

    def __init__(self, size: Size, dropout: float = 0.0) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of ids ``[B, T]``; with targets ``[B, T]`` their mean cross entropy in nats."""
        x = self.drop(self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    def __init__(self, size: Size, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = size.heads, dropout
        self.attention_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.gathered = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, T, C]``."""
        rows, length, width = x.shape
        parts = self.qkv(self.attention_norm(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.gathered(mixed.transpose(1, 2).reshape(rows, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")))


def make_model(size: Size, *, seed: int = 0, device: str | torch.device = "cpu", dropout: float = 0.0) -> GPT:
    """A float32 model with GPT-2's initial weights: normal(0, 0.02), what adds to the stream scaled by 1/sqrt(2L)."""
    torch.manual_seed(seed)
    model = GPT(size, dropout)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            into_stream = name.endswith(("gathered.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers) if into_stream else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.to(device)


def train_steps(model: nn.Module, tokens: Any, recipe: Recipe) -> Iterator[Tensor]:
    """Train in place; yields each step's mean loss (nats a token, before the update) as a tensor on the device.

    Args:
        model: called as ``model(ids, targets)``, returns the mean loss: ``GPT``, or another behind that signature.
        tokens: ``[N]`` ids, an array (a memory map too).

    The schedule follows the steps, or the clock where ``minutes`` are given. Reading the yielded tensor waits for the
    device; leaving it alone does not.
    """
    if (recipe.steps is None) == (recipe.minutes is None):
        raise ValueError("give either steps or minutes")
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as nanoGPT sets it
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    forward = torch.compile(model) if recipe.compile else model
    random = np.random.default_rng(recipe.seed)
    context, micro = model.size.context, recipe.micro_rows or recipe.rows
    model.train()
    began, step, cosine_from = time.perf_counter(), 0, 0.0
    while (progress := _progress(recipe, step, began)) < 1.0:
        if step == recipe.warmup_steps:
            cosine_from = progress
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step, progress, cosine_from)
        ids, targets = _batch(tokens, recipe.rows, context, random, device)
        total = torch.zeros((), device=device)
        for first in range(0, recipe.rows, micro):
            part = slice(first, first + micro)
            with torch.autocast(device.type, recipe.dtype, enabled=recipe.dtype is not torch.float32):
                loss = forward(ids[part], targets[part]) * (len(ids[part]) / recipe.rows)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield total


def _progress(recipe: Recipe, step: int, began: float) -> float:
    if recipe.steps is not None:
        return step / recipe.steps
    return (time.perf_counter() - began) / (60 * (recipe.minutes or 1))


def _learning_rate(recipe: Recipe, step: int, progress: float, cosine_from: float) -> float:
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    done = (progress - cosine_from) / (1 - cosine_from)
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def _batch(
    tokens: Any, rows: int, context: int, random: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    starts = random.integers(len(tokens) - context, size=rows)
    windows = torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))
    if device.type == "cuda":
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@torch.no_grad()
def evaluate(
    model: nn.Module, tokens: Any, context: int, *, rows: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[float, int]:
    """Total cross entropy (nats) of a stream ``[N]`` and how many tokens were predicted: all but the first, once each.

    Windows stand side by side, the last may be shorter, and none knows of the one before. Of a single document this is
    the sum that gptcli's ``corpus_nats`` gives; of several that one begins a window at each. The model is anything that
    makes logits of ids, gptcli's Transformer too; so that both are measured alike it is float32, whatever they train
    in, unless ``dtype`` says otherwise.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    stream = torch.from_numpy(np.asarray(tokens[:]).astype(np.int64))
    inputs, targets = stream[:-1].split(context), stream[1:].split(context)
    whole = len(inputs) if len(inputs[-1]) == context else len(inputs) - 1
    total = 0.0
    for first, last in [(i, min(i + rows, whole)) for i in range(0, whole, rows)] + [(whole, len(inputs))]:
        if first == last:
            continue
        ids, wanted = torch.stack(inputs[first:last]).to(device), torch.stack(targets[first:last]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            logits = model(ids)
        total += F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum").item()
    model.train(was_training)
    return total, len(stream) - 1
