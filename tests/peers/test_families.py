"""Every family and transformers, live: it opens what gptcli writes, and fills in a configuration as gptcli does.

Measured on a CPU: float32 logits differ by at most 5e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptcli.core.build import open_model, random_model
from gptcli.core.checkpoint import save_folder
from gptcli.spec.config import from_hf, read_config, to_hf
from gptcli.spec.params import count_params
from gptcli.spec.presets import NAMES, read_preset
from tests.conftest import ROOT
from tests.spec.families.published import ALL
from tests.spec.families.test_published import CASES, DEFAULTS

transformers: Any = pytest.importorskip("transformers", reason="compares with transformers: install the extra 'peers'")
pytestmark = pytest.mark.peer

GOLDEN = ROOT / "tests" / "data" / "golden"
MODELS = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
TOLERANCE = 1e-5


def filled_in(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys as transformers understands them: defaults filled in, and the newest spelling."""
    filled: dict[str, Any] = transformers.AutoConfig.for_model(**raw).to_dict()
    return filled


@pytest.mark.parametrize("name", MODELS)
def test_it_opens_what_we_save(name: str, tmp_path: Path) -> None:
    ours = open_model(GOLDEN / name, None, device="cpu").transformer  # type: ignore[arg-type]
    save_folder(ours, tmp_path, dtype=torch.float32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    golden = load_file(GOLDEN / name / "logits.safetensors")
    with torch.no_grad():
        logits = theirs.eval()(golden["ids"], use_cache=False).logits
    assert float((logits - golden["logits"]).abs().max()) <= TOLERANCE
    again = tmp_path / "again"
    theirs.save_pretrained(again)
    assert read_config(again) == read_config(tmp_path)
    for file in again.glob("*.safetensors"):
        assert all(torch.equal(tensor, load_file(tmp_path / file.name)[key]) for key, tensor in load_file(file).items())


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL)
def test_a_published_configuration_means_the_same_to_both(raw: dict[str, Any]) -> None:
    assert from_hf(filled_in(raw)) == from_hf(raw)
    assert from_hf(filled_in(to_hf(from_hf(raw)))) == from_hf(raw)


@pytest.mark.parametrize(("raw", "keys"), [(raw, keys) for raw, keys, _ in CASES])
def test_keys_mean_the_same_to_both(raw: dict[str, Any], keys: dict[str, Any]) -> None:
    null = {name for name in ("head_dim", "num_key_value_heads") if name in keys and keys[name] is None}
    if null and raw["model_type"] in ("qwen3", "mistral"):
        pytest.skip("the newest one wants a number there, and older ones took null")
    assert from_hf(filled_in({**raw, **keys})) == from_hf({**raw, **keys})


@pytest.mark.parametrize(("raw", "keys"), DEFAULTS)
def test_what_is_left_out_means_the_same_to_both(raw: dict[str, Any], keys: dict[str, Any]) -> None:
    without = {name: value for name, value in raw.items() if name not in keys}
    for name in ("num_attention_heads", "hidden_size"):
        if name in keys or name not in without:
            without[name] = {"num_attention_heads": 32, "hidden_size": 1024}[name]
    assert from_hf(filled_in(without)) == from_hf(without)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("gpt1", "gpt3"))])
def test_the_parameters_of_presets_are_as_many_as_it_makes(name: str) -> None:
    config = read_preset(name)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**to_hf(config)))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count_params(config).total_stored


@pytest.mark.parametrize("raw", ALL.values(), ids=ALL)
def test_a_model_of_ours_from_nothing_opens_there(raw: dict[str, Any], tmp_path: Path) -> None:
    """Of a small vocabulary: no id that a class takes by itself may lie beyond it."""
    layered = {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0]}
    small = {name: value for name, value in raw.items() if not name.endswith("_token_id")}
    small |= {name: value for name, value in layered.items() if name in small}
    sizes = {
        "hidden_size": 32,
        "n_embd": 32,
        "num_attention_heads": 4,
        "n_head": 4,
        "num_hidden_layers": 2,
        "n_layer": 2,
    }
    sizes |= {"intermediate_size": 40, "n_inner": 40, "ffn_dim": 40, "word_embed_proj_dim": 32, "head_dim": 8}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "n_positions": 64}
    small |= {name: value for name, value in sizes.items() if name in small}
    config = from_hf({**small, "vocab_size": 50})
    save_folder(random_model(config, 0), tmp_path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = open_model(tmp_path, None, device="cpu").transformer  # type: ignore[arg-type]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert float((theirs(ids, use_cache=False).logits - ours(ids)).abs().max()) <= TOLERANCE
