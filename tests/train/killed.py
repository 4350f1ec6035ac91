"""Runs that are killed, each in a process of its own, and what they leave; ``test_resume.py`` reads the answer.

    python -m tests.train.killed resume FOLDER
    python -m tests.train.killed saves FOLDER SEED KILLS

One line of JSON is printed. Processes are forked from this one, which has loaded torch and computed nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptcli.core import runtime
from gptcli.core.build import new_transformer
from gptcli.core.checkpoint import load_weights
from gptcli.core.model import Transformer
from gptcli.errors import GptcliError
from gptcli.spec.config import read_config
from gptcli.spec.match import match_folder
from gptcli.train.data import Corpus
from gptcli.train.loop import Plan, train
from gptcli.train.state import checkpoints
from tests.train.small import CONTEXT, VOCAB, corpus, model, newest, run, stored, stored_weights


def in_a_process(work: Callable[[], Any]) -> int:
    """Do work in a fork of this process; how that ended, as ``os.waitpid`` has it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            sys.stderr.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def digest(tensors: dict[str, Tensor]) -> str:
    """The same for the same bits."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(tensor.detach().contiguous().numpy().tobytes())
    return made.hexdigest()


# --- Exact resume

STEPS, SAVED, KILLED = 8, 4, 6


def packed() -> Corpus:
    """Short documents, many in a window, parted by token 0."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, 400).astype(np.uint16)
    tokens[::5] = 0
    return Corpus("packed", tokens, 80, 1200)


def sampler(one: Transformer, step: int) -> dict[str, Any]:
    """Spends random numbers, and leaves the model in another mode."""
    drawn = torch.randint(VOCAB, (1, CONTEXT))
    with torch.no_grad():
        return {"prompt": "", "text": str(one.eval()(drawn).argmax().item()), "seed": int(np.random.randint(9))}


def scenario(out: Path, optimizer: str, *, busy: bool, kill: bool = False) -> None:
    """Train, or go on, until the end or until killed; ``busy`` evaluates and samples at each step."""
    plan = Plan(
        batch_tokens=7 * CONTEXT,
        lr=0.01,
        steps=STEPS,
        optimizer=optimizer,  # type: ignore[arg-type]
        micro_batch=3,
        mask_documents=True,
        save_every=SAVED,
        eval_every=1 if busy else 0,
    )
    resume = next(checkpoints(out), None)
    valid = [corpus(50)] if busy else []
    events = train(model(), packed(), valid, plan, out, {}, sampler=sampler if busy else None, resume=resume)
    for event in events:
        if kill and event["event"] == "step" and event["step"] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def losses(out: Path) -> list[Any]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    keys = ("step", "tokens", "loss", "lr", "grad_norm", "skipped")
    return [[event[key] for key in keys] for event in events if event["event"] == "step"]


def evaluations(out: Path) -> list[Any]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [[event["step"], event["loss"], event["best"]] for event in events if event["event"] == "eval"]


def resumed(folder: Path) -> dict[str, Any]:
    """For each optimizer three runs that should be one: straight through, straight but busy, and killed and busy."""
    told: dict[str, Any] = {}
    for optimizer in ("muon", "adamw"):
        told[optimizer] = {}
        for name, busy, kill in (("whole", False, False), ("busy", True, False), ("killed", True, True)):
            out = folder / f"{optimizer}-{name}"
            ends = []
            if kill:
                ends.append(in_a_process(partial(scenario, out, optimizer, busy=busy, kill=True)))
            at = [checkpoint.step for checkpoint in checkpoints(out)]
            ends.append(in_a_process(partial(scenario, out, optimizer, busy=busy)))
            told[optimizer][name] = {
                "ends": ends,
                "resumed_at": at,
                "tensors": digest(stored(newest(out))),
                "step": newest(out).step,
                "losses": losses(out),
                "evaluations": evaluations(out),
            }
    return told


# --- Killed while saving

MOST_KILLS = 200
LONG = {"steps": 2000, "warmup": 0.001, "save_every": 1, "keep": 2}


def saving(out: Path, pipe: int) -> None:
    """Go on from the newest checkpoint, saving after each step and telling it."""
    for event in run(out, resume=next(checkpoints(out), None), **LONG):
        if event["event"] == "save":
            os.write(pipe, struct.pack("<I", event["step"]))


def killed_once(out: Path, moment: random.Random) -> dict[str, Any]:
    """Let a run save a few times, kill it at a random moment of the save that follows; what was told, what is left."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            saving(out, writer)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    os.close(writer)
    last, times = 0, []
    for _ in range(moment.randint(2, 4)):
        data = os.read(reader, 4)
        if len(data) < 4:
            raise RuntimeError("the run ended by itself")
        (last,), now = struct.unpack("<I", data), time.monotonic()
        times.append(now)
    # The moment itself: somewhere in the step and the save that follow, which take about as long as the last.
    time.sleep(moment.random() * 1.2 * (times[-1] - times[-2]))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while data := os.read(reader, 4):  # told before the end
        (last,) = struct.unpack("<I", data)
    os.close(reader)
    return {
        "told": last,
        "found": [[checkpoint.step, digest(stored(checkpoint))] for checkpoint in checkpoints(out)],
        "folder": opened(out),
        "left": len(list(out.rglob(".writing-*"))),
    }


def opened(out: Path) -> str:
    """The weights of a model folder, or how it is refused."""
    try:
        config = read_config(out)
        with torch.device("meta"):
            one = new_transformer(config)
        load_weights(one, match_folder(out, config), device=torch.device("cpu"), dtype=torch.float32)
        return digest(dict(one.named_parameters()))
    except GptcliError as error:
        return f"refused: {error.message}"


def killed(folder: Path, seed: int, kills: int) -> dict[str, Any]:
    """Kill a run again and again; and beside it the same run, which nothing befell."""
    moment = random.Random(seed)
    out = folder / "killed"
    out.mkdir()
    told: list[dict[str, Any]] = []
    # A kill that strikes a save leaves something of it. As many kills as asked for, and more until one has.
    while len(told) < kills or (len(told) < MOST_KILLS and not any(each["left"] for each in told)):
        told.append(killed_once(out, moment))
    last = max(step for each in told for step, _ in each["found"])
    truth = folder / "truth.json"

    def undisturbed() -> None:
        made = {}
        for event in run(folder / "whole", **LONG):
            if event["event"] == "save":
                checkpoint = newest(folder / "whole")
                made[event["step"]] = [digest(stored(checkpoint)), digest(stored_weights(checkpoint))]
                if event["step"] == last:
                    break
        truth.write_text(json.dumps(made))

    assert in_a_process(undisturbed) == 0
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {
        "kills": told,
        "truth": json.loads(truth.read_text()),
        "log": [e["step"] for e in log if e["event"] == "step"],
    }


def main(what: str, folder: str, *numbers: str) -> None:
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # an optimizer's first step loads it, which takes a second: once for all
    runtime.measured_flops = lambda device, dtype: 1e12  # type: ignore[assignment]
    made = resumed(Path(folder)) if what == "resume" else killed(Path(folder), *(int(number) for number in numbers))
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
