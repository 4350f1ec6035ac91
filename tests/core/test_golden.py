"""gptcli against logits and greedy text that transformers gave once (``tests/data/golden``); needs no transformers.

Measured on a CPU: float32 logits, whose standard deviation is 1, differ by at most 5e-6 on the 21 models; bfloat16
logits by at most 0.06 on GPT-2's, and 0.51 on the others, whose blocks are made to add more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptcli.core.build import Model, open_model
from gptcli.core.cache import KVCache
from gptcli.core.checkpoint import save_folder
from gptcli.core.decode import Decoder
from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from gptcli.errors import CorruptError
from gptcli.spec.config import read_config
from gptcli.spec.index import FILE_NAME, INDEX_NAME, read_folder
from gptcli.spec.match import match_folder
from gptcli.spec.names import FAMILIES
from gptcli.spec.params import count_params
from gptcli.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
GPT2 = ["old", "plain", "sharded", "untied"]
MODELS = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
# Whether a token was there when another was turned counts in these; see ``core/rope.py``.
DYNAMIC = "llama-dynamic"
FLOAT32_TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.1
BFLOAT16_TOLERANCE_OF_LOUD_BLOCKS = 0.6


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def opened(name: str, tokenizer: Tokenizer, dtype: str = "float32") -> Model:
    return open_model(GOLDEN / name, tokenizer, device="cpu", dtype=dtype)


def greedy_text(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "greedy.json").read_text())


def golden_difference(name: str, model: Model) -> float:
    golden = load_file(GOLDEN / name / "logits.safetensors")
    with torch.inference_mode():
        logits = model.transformer(golden["ids"])
    assert logits.shape == golden["logits"].shape
    assert golden["logits"].std() > 0.5  # or any model would do
    return float((logits.float() - golden["logits"]).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, tokenizer: Tokenizer) -> None:
    assert golden_difference(name, opened(name, tokenizer)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_logits_stay_close(name: str, tokenizer: Tokenizer) -> None:
    difference = golden_difference(name, opened(name, tokenizer, "bfloat16"))
    assert 0 < difference <= (BFLOAT16_TOLERANCE if name in GPT2 else BFLOAT16_TOLERANCE_OF_LOUD_BLOCKS)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_equals_transformers(name: str, tokenizer: Tokenizer) -> None:
    golden = greedy_text(name)
    model = opened(name, tokenizer)
    decoder = Decoder(model.transformer)
    logits = decoder.prefill([golden["prompt"]], len(golden["prompt"]) + 8)
    made = []
    for _ in golden["ids"]:
        made.append(int(logits.argmax(-1)))
        if len(made) < len(golden["ids"]):
            logits = decoder.step(torch.tensor(made[-1:]))
    assert made == golden["ids"]
    assert len(made) == min(200, model.config.context + 1 - len(golden["prompt"]))


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_over_the_text_chooses_the_same(name: str, tokenizer: Tokenizer) -> None:
    """Without a cache, every token of the text at once; and in pieces of a few tokens."""
    golden = greedy_text(name)
    model = opened(name, tokenizer)
    # Up to there a dynamic model is a plain one.
    length = model.config.rope_scaling.original_context if name == DYNAMIC and model.config.rope_scaling else 1_000
    ids = (golden["prompt"] + golden["ids"])[: min(length, model.config.context)]
    prompt = len(golden["prompt"])
    with torch.inference_mode():
        whole = model.transformer(torch.tensor([ids]))[0]
        cache = KVCache(model.config, 1, len(ids), device=model.device, dtype=model.dtype)
        pieces = torch.tensor([ids]).split(7, dim=1)
        parts = torch.cat([model.transformer(piece, cache) for piece in pieces], dim=1)[0]
    chosen = golden["ids"][: len(ids) - prompt + 1]
    assert whole[prompt - 1 :].argmax(-1).tolist()[: len(chosen)] == chosen
    assert float((parts - whole).abs().max()) <= 2 * FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_text(name: str, tokenizer: Tokenizer) -> None:
    golden = greedy_text(name)
    request = Request(golden["prompt"], seed=0, max_tokens=200, ignore_eos=True)
    steps = list(generate(opened(name, tokenizer), [request], Sampling(temperature=0)))
    assert [step.token for step in steps] == golden["ids"]
    assert steps[-1].finish == ("length" if len(golden["ids"]) == 200 else "context")


def test_the_golden_files_are_of_the_kinds_they_should_be() -> None:
    assert (GOLDEN / "sharded" / INDEX_NAME).is_file()
    assert len({info.file for info in read_folder(GOLDEN / "sharded").values()}) > 1
    old = read_folder(GOLDEN / "old")
    assert {"wte.weight", "h.0.attn.bias", "h.1.attn.masked_bias"} <= old.keys()
    assert "lm_head.weight" in read_folder(GOLDEN / "untied")
    assert "lm_head.weight" not in read_folder(GOLDEN / "plain")


@pytest.mark.parametrize("name", MODELS)
def test_golden_greedy_choices_are_clear(name: str) -> None:
    """The gap between the two best logits is hundreds of times the tolerance, so equal text is no accident."""
    assert greedy_text(name)["smallest_gap"] > 100 * FLOAT32_TOLERANCE


# --- what is saved is what transformers saved -------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "old"])
def test_a_saved_folder_holds_the_same_names_shapes_and_bytes(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = opened(name, tokenizer)
    save_folder(model.transformer, tmp_path, dtype=torch.float32)
    theirs, ours = tensors_of(GOLDEN / name), tensors_of(tmp_path)
    assert ours.keys() == theirs.keys()
    for tensor in theirs:
        assert torch.equal(ours[tensor], theirs[tensor]), tensor
    if name != "sharded":
        assert (tmp_path / FILE_NAME).read_bytes() == (GOLDEN / name / FILE_NAME).read_bytes()
    assert read_config(tmp_path) == model.config == read_config(GOLDEN / name)
    assert golden_difference(name, open_model(tmp_path, tokenizer, device="cpu")) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_as_many_as_transformers_counts(name: str) -> None:
    config = read_config(GOLDEN / name)
    stored = count_params(config).total_stored
    assert stored == sum(info.parameters for _, info in match_folder(GOLDEN / name, config).values())
    if name not in GPT2:  # made before the script told how many
        assert stored == json.loads((GOLDEN / name / "made.json").read_text())["parameters"]


def test_joined_rows_are_views_and_rows_by_turns_are_copied_once(tokenizer: Tokenizer) -> None:
    def storages(name: str) -> list[int]:
        attention = opened(name, tokenizer).transformer.blocks[0].attention
        return [getattr(attention, part).weight.untyped_storage().data_ptr() for part in ("query", "key", "value")]

    assert len(set(storages("phi3"))) == 1
    assert len(set(storages("neox"))) == 3


def copied(name: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A golden folder whose tensors were changed."""
    tensors = tensors_of(GOLDEN / name)
    change(tensors)
    save_file(tensors, folder / FILE_NAME)
    (folder / "config.json").write_bytes((GOLDEN / name / "config.json").read_bytes())
    return folder


CHANGES: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("neox", lambda t: t.pop("embed_out.weight"), r"missing: embed_out\.weight"),
    ("neox", lambda t: t.pop("gpt_neox.layers.1.attention.query_key_value.bias"), r"missing: layers\.1\.attention\.q"),
    ("qwen3", lambda t: t.pop("model.layers.1.self_attn.q_norm.weight"), r"missing: layers\.1\.self_attn\.q_norm"),
    ("qwen2", lambda t: t.pop("model.layers.2.self_attn.v_proj.bias"), r"missing: layers\.2\.self_attn\.v_proj\.bias"),
    (
        "llama",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(24)}),
        r"left over: .*q_proj",
    ),
    ("phi3", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(1)}), r"left over: .*mlp\.up_proj"),
    ("mistral", lambda t: t.update({"model.layers.2.mlp.x": torch.ones(1)}), r"left over: model\.layers\.2\.mlp\.x"),
    ("opt", lambda t: t.update({"model.decoder.embed_positions.weight": torch.ones(96, 24)}), r"\[98, 24\]"),
    ("olmo2", lambda t: t.update({"model.layers.0.self_attn.k_norm.weight": torch.ones(6)}), r"k_norm.*\[12\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES)
def test_what_is_missing_left_over_or_misshapen_is_named(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(CorruptError, match=message):
        open_model(copied(name, tmp_path, change), tokenizer, device="cpu")


BUFFERS = {
    "neox": ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"],
    "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    "mistral": ["model.rotary_emb.inv_freq"],
    "neox-serial": ["gpt_neox.layers.1.attention.rotary_emb.inv_freq", "embed_out.weight"],
    "qwen2": ["lm_head.weight"],
    "opt": ["lm_head.weight", "decoder.version"],
}


@pytest.mark.parametrize("name", BUFFERS)
def test_old_buffers_and_repeated_heads_change_nothing(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = copied(name, tmp_path, lambda t: t.update({buffer: torch.ones(3) for buffer in BUFFERS[name]}))
    assert golden_difference(name, open_model(folder, tokenizer, device="cpu")) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("name", "prefix"), [("opt", "model."), ("neox", "gpt_neox."), ("qwen3", "model.")])
def test_files_of_the_bare_model_are_read(name: str, prefix: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in list(tensors):
            tensors[tensor.removeprefix(prefix)] = tensors.pop(tensor)

    folder = copied(name, tmp_path, strip)
    assert golden_difference(name, open_model(folder, tokenizer, device="cpu")) <= FLOAT32_TOLERANCE


def test_every_family_that_runs_has_a_golden_model() -> None:
    assert {read_config(GOLDEN / name).family for name in MODELS} == FAMILIES.keys() - {"openai-gpt"}
