"""Make the golden files: tiny random GPT-2 models written by transformers, with its logits and its greedy text.

Run it with an interpreter that has transformers: ``python tests/data/golden/make.py``. It writes a folder a model:

    config.json, model.safetensors (or shards with their index)   as save_pretrained wrote them; ``old`` is rewritten
    logits.safetensors    ids [B, T] int64 and logits [B, T, V] float32
    greedy.json           a prompt, the ids that follow greedily (200, or to the context's end), and the smallest gap
                          between the two best logits on the way
    made.json             the versions that made them

The weights are random but large enough (standard deviation 0.2, biases and norms too) for logits of visible size, and
the seed is the first from which no greedy choice is close: a gap far above rounding, so that the ids hold anywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
GREEDY = 200
SMALLEST_GAP = 5e-3

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 72},
    "untied": {
        "n_layer": 3,
        "n_embd": 32,
        "n_head": 2,
        "n_inner": 48,
        "vocab_size": 257,
        "activation_function": "relu",
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
    },
    "sharded": {"n_layer": 2, "n_embd": 32, "n_head": 8, "activation_function": "gelu"},
    "old": {"n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 64},
}


def make_model(settings: dict[str, Any], seed: int) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(seed)
    defaults = {"vocab_size": 300, "n_positions": 256, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**{**defaults, **settings})
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(float("ln_" in name and name.endswith("weight")), 0.2)
    return model


@torch.no_grad()
def greedy(model: transformers.GPT2LMHeadModel, prompt: list[int]) -> tuple[list[int], float]:
    """The ids after the prompt by full recomputation, and the smallest gap between the two best logits."""
    ids, gaps = list(prompt), []
    # The context's last position still gives one more token.
    for _ in range(min(GREEDY, model.config.n_positions - len(prompt) + 1)):
        best = model(torch.tensor([ids])).logits[0, -1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :], min(gaps)


def make_folder(name: str, settings: dict[str, Any]) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(1000):
        model = make_model(settings, seed)
        ids = torch.randint(model.config.vocab_size, (2, 16))
        made, gap = greedy(model, ids[0].tolist())
        if gap > SMALLEST_GAP and len(set(made)) > 20:
            break
    else:
        raise SystemExit(f"no seed gives {name} a clear greedy text")
    model.save_pretrained(folder, max_shard_size="50KB" if name == "sharded" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "old":
        make_old(folder, model.config)
    with torch.no_grad():
        logits = model(ids).logits
    save_file({"ids": ids, "logits": logits}, folder / "logits.safetensors")
    text = {"prompt": ids[0].tolist(), "ids": made, "smallest_gap": gap}
    (folder / "greedy.json").write_text(json.dumps(text) + "\n")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": seed}
    (folder / "made.json").write_text(json.dumps(versions) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    print(name, "seed", seed, "gap", gap, "distinct", len(set(made)), "logits", float(logits.std()))


def make_old(folder: Path, config: transformers.GPT2Config) -> None:
    """Rewrite a file as the first GPT-2 uploads were: no prefix, and the causal mask stored with every layer."""
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    size = config.n_positions
    for layer in range(config.n_layer):
        mask = torch.ones(size, size, dtype=torch.uint8).tril()[None, None]
        tensors[f"h.{layer}.attn.bias"] = mask.contiguous()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    for name, settings in MODELS.items():
        make_folder(name, settings)
