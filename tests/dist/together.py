"""What a model says, whole or dealt out to ranks, and the process that is one of these ranks.

``python -m tests.dist.together FOLDER`` asks each model of ``MODELS`` on as many ranks as were started, and rank 0
writes ``FOLDER/RANKS/NAME.safetensors`` and what commands printed. Whatever is asked goes in one start of processes,
since most of their time goes into importing torch.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gptcli.__main__ import end
from gptcli.cli import main as command_line
from gptcli.core import parallel
from gptcli.core.build import Model, new_part, random_model
from gptcli.core.embedding import text_vectors
from gptcli.core.following import Leading, follow
from gptcli.core.generate import generate
from gptcli.core.group import Line, leave
from gptcli.core.model import Transformer
from gptcli.core.pool import Pool
from gptcli.core.prefixes import Prefixes
from gptcli.core.quantize import quantize_
from gptcli.core.requests import Request
from gptcli.core.runtime import is_connection_lost, rank_place
from gptcli.core.score import Mark, score
from gptcli.core.settings import Sampling
from gptcli.errors import GptcliError
from gptcli.spec.config import ModelConfig
from gptcli.spec.split import Share
from gptcli.text.tokenizer import Tokenizer

# Nothing divides evenly but the heads; of GQA four ranks share two key-value heads.
_GPT2: dict[str, Any] = {"family": "gpt2", "vocab_size": 301, "context": 24, "layers": 2, "width": 24, "mlp_width": 90}
_LLAMA: dict[str, Any] = {
    **_GPT2, "activation": "silu", "gated": True, "norm": "rmsnorm", "position": "rope",
    "qkv_bias": False, "output_bias": False, "mlp_bias": False,
}  # fmt: skip
MODELS = {
    "gpt2": ModelConfig(**_GPT2, heads=4, kv_heads=4, head_dim=6),
    "untied": ModelConfig(**_GPT2, heads=8, kv_heads=4, head_dim=4, tied=False),
    "llama": ModelConfig(**_LLAMA, heads=8, kv_heads=2, head_dim=6, tied=False),
    "one kv head": ModelConfig(**{**_LLAMA, "qkv_bias": True, "vocab_size": 303}, heads=4, kv_heads=1, head_dim=6),
}
_EACH: dict[str, Any] = {**_LLAMA, "heads": 4, "head_dim": 6}
# One forward pass each: what a block does otherwise than these.
AXES = {
    "norms of heads": ModelConfig(**_EACH, kv_heads=2, qk_norm="head", windows=(None, 3)),
    "norms of all heads": ModelConfig(**_EACH, kv_heads=2, qk_norm="whole", norm_output=True, tied=False),
    "side by side": ModelConfig(**{**_GPT2, "position": "rope"}, heads=4, kv_heads=4, head_dim=6, rope_dim=4, parallel=True),
}
PROMPTS = [[5, 9, 250, 13], [7], [5, 9, 250, 13, 17, 300, 2, 77, 1, 4, 4]]
GREEDY, WARM = Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1)


def whole(config: ModelConfig) -> Transformer:
    """Random weights in which nothing is zero, and logits far enough apart."""
    model = random_model(config, 1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=noise) * 0.2
    return model.eval().requires_grad_(False)


def part(config: ModelConfig, line: Line, quantize: str = "none") -> Transformer:
    """This rank's slices of ``whole``."""
    share = Share(config, line.rank, line.ranks)
    make: Callable[[ModelConfig], Transformer] = Transformer
    if line.rank == 0:
        make = lambda config: Leading(config, line)  # noqa: E731
    model, every = new_part(share, make), dict(whole(config).named_parameters())
    for tensor, slice_ in share.tensors():
        owner, _, leaf = tensor.name.rpartition(".")
        held = every[tensor.name]
        if slice_.dim is not None:
            held = held.narrow(slice_.dim, slice_.start, slice_.stop - slice_.start)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(held.clone(), requires_grad=False))
    model.tie()
    if quantize != "none":
        quantize_(model, quantize)
    parallel.join_ranks(model.eval(), share, line.device)
    if isinstance(model, Leading):
        model.begin()
    return model


@torch.inference_mode()
def said(transformer: Transformer, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Logits, texts, scores and vectors."""
    model = Model("model", config, transformer, tokenizer, torch.device("cpu"), torch.float32, plain="a test")
    found = {"logits": transformer(torch.tensor(PROMPTS[2:] * 2))}
    for name, sampling in (("greedy", GREEDY), ("warm", WARM)):
        requests = [Request(ids, 5, 4 + row, ignore_eos=True) for row, ids in enumerate(PROMPTS)]
        tokens: list[list[int]] = [[] for _ in requests]
        for step in generate(model, requests, sampling):
            tokens[step.row] += [] if step.token is None else [step.token]
        found |= {f"{name} {row}": torch.tensor(ids) for row, ids in enumerate(tokens)}
    found["slid"] = torch.tensor(
        [step.token or 0 for step in generate(model, [Request(PROMPTS[2] * 2, 5, 4, ignore_eos=True)], GREEDY, slide=True)]
    )
    stream = [[4, 8, 15, 16, 23, 42] * 7, Mark.END, [9] * 5, Mark.END]
    found["bits"] = torch.cat([piece.nats for piece in score(model, stream)])
    for layer in (1, 2):
        found[f"vector {layer}"] = next(text_vectors(model, PROMPTS[2:], layer=layer)).values
    found |= pooled(model)
    return found


def pooled(model: Model) -> dict[str, Tensor]:
    """What a server does: rows that come and go, and prompts that begin like earlier ones."""
    prefixes = Prefixes(1 << 20)
    pool = Pool(model.transformer, model.stepping, prefixes)
    long = list(range(100, 118))
    found = {"first": pool.enter(PROMPTS[0])[0], "second": pool.enter(long)[0]}
    found["stepped"] = pool.step([3, 4])
    pool.leave(0, PROMPTS[0] + [3])
    third, known = pool.enter([*long[:14], 7, 8])
    found |= {"third": third, "known": torch.tensor(known)}
    for _ in range(2):
        found["stepped"] = torch.cat([found["stepped"], pool.step([5] * pool.rows)])
    pool.leave(1)
    pool.leave(0)
    return found


def ask(folder: Path, line: Line) -> None:
    """All models on these ranks."""
    tokenizer = Tokenizer.from_folder(folder / "tiny")
    for name, config in MODELS.items():
        model = part(config, line)
        if line.rank == 0:
            save_file(said(model, config, tokenizer), folder / str(line.ranks) / f"{name}.safetensors")
            line.tell({"do": "end"})
        else:
            follow(model, line)
    found = {}
    for name, config in {**AXES, "int8": MODELS["llama"]}.items():
        model = part(config, line, "int8" if name == "int8" else "none")
        if line.rank:
            follow(model, line)
            continue
        with torch.inference_mode():
            found[name] = model(torch.tensor(PROMPTS[2:]))
        line.tell({"do": "end"})
    if line.rank == 0:
        save_file(found, folder / str(line.ranks) / "axes.safetensors")


def commands(folder: Path, line: Line) -> None:
    """Command lines, each as if it was started by itself, but by ranks that have met already.

    What each rank printed, and how it ended.
    """
    ranks = line.ranks
    Line.start = lambda place, device: Line(line.rank, ranks, line.device)  # type: ignore[method-assign,assignment]
    for number, args in enumerate(json.loads((folder / "commands.json").read_text())):
        out = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = command_line([*args, "--tp", str(ranks), "-m", str(folder / "tiny")])
            atexit._run_exitfuncs()
            out.flush()
        told = {"code": code, "out": out.buffer.getvalue().decode()}  # type: ignore[attr-defined]
        (folder / str(ranks) / f"command-{number}-rank-{line.rank}.json").write_text(json.dumps(told))


def lose_one(folder: Path, line: Line) -> None:
    """The last rank is killed in the middle of a forward pass; what the others come to."""
    model = part(MODELS["gpt2"], line)
    if line.rank == line.ranks - 1:
        model.blocks[1].register_forward_pre_hook(lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    came = "nothing"
    try:
        if line.rank:
            follow(model, line)
        else:
            model(torch.tensor(PROMPTS[:1]))
    except GptcliError as error:
        came = error.message
    except RuntimeError as error:
        came = "lost" if is_connection_lost(error) else str(error)
    (folder / str(line.ranks) / f"end-{line.rank}").write_text(f"{came}, {line.broken}")


def main() -> None:
    folder = Path(sys.argv[1])
    place = rank_place()
    assert place is not None
    (folder / str(place.count)).mkdir(exist_ok=True)
    line = Line.start(place, "cpu")
    ask(folder, line)
    commands(folder, line)
    if line.ranks == 4:
        lose_one(folder, line)
    else:
        leave()
    end(0)


if __name__ == "__main__":
    main()
