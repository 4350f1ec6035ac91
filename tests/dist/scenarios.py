"""Runs of the training loop, and the process that makes them as one rank of several.

``python -m tests.dist.scenarios FOLDER`` makes the runs of ``FOLDER/scenarios.json`` one after the other; each writes
a model folder and what every rank was told, ``NAME/rank-R.json``. Processes start once for many runs, since most of
their time goes into importing torch.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptcli.__main__ import end
from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.spec.config import ModelConfig
from gptcli.train import loop
from gptcli.train.data import Corpus
from gptcli.train.loop import Plan, train
from gptcli.train.ranks import Ranks, join
from gptcli.train.state import checkpoints

# Nothing divides by four but the width: positions leave one of four ranks without a row.
VOCAB, CONTEXT, WIDTH, ROWS, STEPS = 283, 6, 24, 8, 6


@dataclass(frozen=True)
class Scenario:
    """A run; ``resume`` names another, to go on from its checkpoint of step 3."""

    name: str
    kind: str = "none"
    optimizer: str = "muon"
    dtype: str = "float32"
    tied: bool = True
    checkpointing: bool = False
    resume: str | None = None
    interrupted: bool = False  # rank 1 gets SIGTERM after its first step
    spoiled: bool = False  # in the second step rank 1's gradient is NaN
    by_clock: bool = False  # one minute, by clocks that go ever faster the higher the rank


def config(tied: bool) -> ModelConfig:
    return ModelConfig("gpt2", VOCAB, CONTEXT, 2, WIDTH, 3, 3, 8, 4 * WIDTH, tied=tied)


def fresh(scenario: Scenario) -> Transformer:
    return random_model(config(scenario.tied), 1)


def corpus(name: str, length: int, seed: int) -> Corpus:
    """Words of three tokens in a random order, of which one token in five is not to be learnt."""
    random = np.random.default_rng(seed)
    tokens = (random.integers(0, VOCAB // 3, -(-length // 3))[:, None] * 3 + np.arange(3)).ravel()[:length]
    return Corpus(name, tokens.astype(np.uint16), 1, 3 * length, learnt=random.random(length) > 0.2)


def plan(scenario: Scenario) -> Plan:
    return Plan(
        batch_tokens=ROWS * CONTEXT,
        lr=0.01,
        steps=None if scenario.by_clock else STEPS,
        minutes=1.0 if scenario.by_clock else None,
        optimizer="muon" if scenario.optimizer == "muon" else "adamw",
        eval_every=3,
        save_every=3,
        dtype=getattr(torch, scenario.dtype),
        micro_batch=1,
        checkpoint_activations=scenario.checkpointing,
    )


def sample(model: Transformer, step: int) -> dict[str, Any]:
    """What only a whole model can say."""
    with torch.no_grad():
        logits = model(torch.arange(4)[None])
    return {"prompt": "", "text": f"{logits.float().logsumexp(-1).sum().item()}", "seed": 0}


def make(scenario: Scenario, folder: Path, ranks: Ranks) -> list[dict[str, Any]]:
    """Make a run in ``folder/NAME``; its events, and at last ``{"event": "interrupted"}`` if it was."""
    out = folder / scenario.name
    if ranks.rank == 0:
        out.mkdir(parents=True)
    ranks.wait()
    ranks = ranks.share(scenario.kind, getattr(torch, scenario.dtype))
    model = fresh(scenario)
    resume = None
    if scenario.resume:
        resume = next(found for found in checkpoints(folder / scenario.resume) if found.step == 3)
    if scenario.spoiled and ranks.rank == 1:
        passes = itertools.count()
        # One pass a micro-batch, four a step.
        model.norm.weight.register_hook(lambda gradient: gradient * (math.nan if next(passes) == 6 else 1))
    real = loop.time.perf_counter
    if scenario.by_clock:
        looks = itertools.count()
        loop.time.perf_counter = lambda: (1 + 5 * ranks.rank) * next(looks)  # type: ignore[assignment]
    told = []
    try:
        for event in train(
            model, corpus("text", 3000, 0), [corpus("held out", 207, 1)], plan(scenario), out, {},
            sampler=sample, resume=resume, ranks=ranks,
        ):  # fmt: skip
            told.append(event)
            if scenario.interrupted and ranks.rank == 1 and event["event"] == "step" and event["step"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        told.append({"event": "interrupted"})
    finally:
        loop.time.perf_counter = real  # type: ignore[assignment]
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
    return told


def write(folder: Path, scenarios: list[Scenario]) -> None:
    (folder / "scenarios.json").write_text(json.dumps([asdict(scenario) for scenario in scenarios]))


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = join("cpu")
    for scenario in json.loads((folder / "scenarios.json").read_text()):
        make(Scenario(**scenario), folder, ranks)
    ranks.leave()
    end(0)


if __name__ == "__main__":
    main()
