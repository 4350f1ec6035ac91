"""Make the golden files: tiny random models of every family written by transformers, with its logits and greedy text.

Run it with an interpreter that has transformers: ``python tests/data/golden/make.py [NAME...]``, without names for all.
It writes a folder a model:

    config.json, model.safetensors (or shards with their index)   as save_pretrained wrote them; ``old`` is rewritten
    logits.safetensors    ids [B, T] int64 and logits [B, T, V] float32
    greedy.json           a prompt, the ids that follow greedily (200, or to the context's end), and the smallest gap
                          between the two best logits on the way
    made.json             the versions that made them, and how many parameters the model has

The weights are random but large enough (standard deviation 0.2, biases and norms too) for logits of visible size, and
the seed is the first from which no greedy choice is close: a gap far above rounding, so that the ids hold anywhere.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
GREEDY = 200
SMALLEST_GAP = 5e-3

# Of every model, unless its own settings say otherwise; a class takes those that it knows.
COMMON: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
GPT2: dict[str, Any] = {"vocab_size": 300, "n_positions": 256}
LLAMA: dict[str, Any] = {
    "vocab_size": 150,
    "max_position_embeddings": 96,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
NEOX = {**LLAMA, "hidden_size": 32, "num_attention_heads": 2}
del NEOX["num_key_value_heads"]
OPT = {"vocab_size": 150, "max_position_embeddings": 96, "hidden_size": 24, "num_hidden_layers": 2}


def stretched(kind: str, factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, "factor": factor, **more}}


# A name, the model's class (before ``Config``), its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("GPT2", {**GPT2, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 72}),
    "untied": (
        "GPT2",
        {
            **GPT2,
            "n_layer": 3,
            "n_embd": 32,
            "n_head": 2,
            "n_inner": 48,
            "vocab_size": 257,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "sharded": ("GPT2", {**GPT2, "n_layer": 2, "n_embd": 32, "n_head": 8, "activation_function": "gelu"}),
    "old": ("GPT2", {**GPT2, "n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 64}),
    "neox": ("GPTNeoX", {**NEOX, "rotary_pct": 0.25}),
    "neox-serial": (
        "GPTNeoX",
        {
            **NEOX,
            "hidden_act": "gelu_new",
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "layer_norm_eps": 1e-3,
            **stretched("linear", 2.0, partial_rotary_factor=1.0),
        },
    ),
    "opt": ("OPT", {**OPT, "num_attention_heads": 3, "ffn_dim": 60}),
    "opt-bare": (
        "OPT",
        {
            **OPT,
            "num_attention_heads": 2,
            "ffn_dim": 30,
            "activation_function": "gelu",
            "enable_bias": False,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("Llama", {**LLAMA, "rms_norm_eps": 1e-3}),
    "llama-biased": (
        "Llama",
        {
            **LLAMA,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
        },
    ),
    # Contexts of so few tokens that the text of the test is far beyond; heads of 16, so that some turns are slow.
    "llama3": (
        "Llama",
        {
            **LLAMA,
            "head_dim": 16,
            "tie_word_embeddings": True,
            **stretched("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "llama-dynamic": ("Llama", {**LLAMA, "max_position_embeddings": 32, "head_dim": 16, **stretched("dynamic", 3.0)}),
    "llama-yarn": (
        "Llama",
        {**LLAMA, "head_dim": 16, **stretched("yarn", 8.0, original_max_position_embeddings=32, beta_fast=4.0)},
    ),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 1, "head_dim": 10, "sliding_window": 7}),
    "qwen2": (
        "Qwen2",
        {
            **LLAMA,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16, "rms_norm_eps": 1e-2}),
    "qwen3-biased": (
        "Qwen3",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            **stretched("yarn", 4.0, original_max_position_embeddings=24, attention_factor=1.5, truncate=False),
        },
    ),
    "smollm3": ("SmolLM3", {**LLAMA, "num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3-windows": (
        "SmolLM3",
        {
            **LLAMA,
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "olmo2": ("Olmo2", {**LLAMA, "rms_norm_eps": 1e-3}),
    "phi3": (
        "Phi3",
        {
            **LLAMA,
            "sliding_window": 9,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        },
    ),
}


def make_model(kind: str, settings: dict[str, Any], seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    # A model's config may keep a table that it was given.
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**COMMON, **settings}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name or "ln_" in name
            centre = float(parameter.dim() < 2 and is_scale and name.endswith("weight"))
            # Blocks that add more than the embedding holds: without places of their own, texts soon go in circles.
            parameter.normal_(centre, 0.35 if parameter.dim() > 1 and kind != "GPT2" and "layers" in name else 0.2)
    return model


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """The ids after the prompt, and the smallest gap between the two best logits.

    By full recomputation; but with dynamic rotary positions, which depend on when a token came, by steps with a cache.
    """
    ids, gaps = list(prompt), []
    rope = getattr(model.config, "rope_parameters", None) or {}
    dynamic = rope.get("rope_type") == "dynamic"
    context = getattr(model.config, "n_positions", None) or model.config.max_position_embeddings
    cache, new = None, list(prompt)
    # The context's last position still gives one more token.
    context = int(context * rope["factor"]) if dynamic else context
    for _ in range(min(GREEDY, context - len(prompt) + 1)):
        if dynamic:
            out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        else:
            out = model(torch.tensor([ids]), use_cache=False)
        best = out.logits[0, -1].topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        if gaps[-1] < SMALLEST_GAP:
            break
        ids.append(int(best.indices[0]))
        new = ids[-1:]
    return ids[len(prompt) :], min(gaps)


def make_folder(name: str) -> None:
    kind, settings = MODELS[name]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(1000):
        model = make_model(kind, settings, seed)
        ids = torch.randint(model.config.vocab_size, (2, 16))
        made, gap = greedy(model, ids[0].tolist())
        if gap > SMALLEST_GAP and len(set(made)) > (20 if kind == "GPT2" else 15):
            break
    else:
        raise SystemExit(f"no seed gives {name} a clear greedy text")
    model.save_pretrained(folder, max_shard_size="50KB" if name == "sharded" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "old":
        make_old(folder, model.config)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    save_file({"ids": ids, "logits": logits}, folder / "logits.safetensors")
    text = {"prompt": ids[0].tolist(), "ids": made, "smallest_gap": gap}
    (folder / "greedy.json").write_text(json.dumps(text) + "\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "seed": seed}
    (folder / "made.json").write_text(json.dumps({**versions, "parameters": parameters}) + "\n")
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
    for name in sys.argv[1:] or MODELS:
        make_folder(name)
