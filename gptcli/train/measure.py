"""How fast a model learns on this machine: whole steps of the training loop; the rest is in ``core/measure.py``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from gptcli.core import runtime
from gptcli.core.build import learnable, open_model
from gptcli.core.measure import Figure, repeated
from gptcli.core.model import Transformer
from gptcli.errors import ResourceError
from gptcli.spec.config import ModelConfig
from gptcli.spec.flops import flops_per_token
from gptcli.spec.params import count_params
from gptcli.text.tokenizer import Tokenizer
from gptcli.train.data import Corpus
from gptcli.train.loop import Plan, train

# Tokens a step, about: enough to keep the device busy, few enough to wait for.
_TOKENS = {"cpu": 2048}
_TOKENS_ELSEWHERE = 16_384
# Weights, their gradients and two moments, in float32; Muon keeps one moment less of most.
_BYTES_A_PARAMETER = 16


def measure_train(folder: Path, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype, rounds: int) -> Figure:
    """Training steps of the model in a folder: batch, forward, backward, clipping and update, nothing compiled.

    The data are tokens drawn at random, and nothing is kept. Raises ResourceError where there is not enough memory.
    """
    opened = open_model(folder, tokenizer, device="cpu", dtype="float32")
    config = opened.config
    needed = _BYTES_A_PARAMETER * count_params(config).total_stored
    free = runtime.memory_bytes(device) if device.type == "cuda" else runtime.free_memory_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"training {opened.name} takes at least {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            "measure a smaller model, or leave training out with --only",
        )
    rows = max(1, _TOKENS.get(device.type, _TOKENS_ELSEWHERE) // config.context)
    tokens = rows * config.context
    with tempfile.TemporaryDirectory(prefix="gptcli-") as out:
        try:
            with closing(_steps(learnable(opened.transformer).to(device), config, tokens, dtype, Path(out))) as steps:
                seconds = repeated(lambda: next(steps), rounds)
        except torch.OutOfMemoryError:
            raise ResourceError(
                f"there is not enough memory to train {opened.name}", "measure a smaller model"
            ) from None
    flops = tokens * flops_per_token(config)
    return Figure("train", {"batch_tokens": tokens}, seconds, tokens=tokens, flops=flops)


def _steps(
    transformer: Transformer, config: ModelConfig, tokens: int, dtype: torch.dtype, out: Path
) -> Generator[float, None, None]:
    """Seconds of one step after the other, without end."""
    spread = np.random.default_rng(0).random(max(1 << 18, 8 * tokens))
    ids = (config.vocab_size**spread - 1).astype(np.uint32)  # often few, seldom many, as words are
    corpus = Corpus("drawn at random", ids, documents=1, text_bytes=len(ids))
    plan = Plan(
        batch_tokens=tokens,
        steps=1_000_000,
        eval_every=0,
        save_every=0,
        dtype=torch.float32 if dtype is torch.float32 else torch.bfloat16,
        compile=False,
    )
    device = transformer.embedding.weight.device
    events = (event for event in train(transformer, corpus, [], plan, out, {}) if event["event"] == "step")
    while True:
        start = time.perf_counter()
        next(events)
        runtime.synchronize(device)
        yield time.perf_counter() - start
