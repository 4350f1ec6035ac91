"""GGUF files read back by the gguf package: tensors, types, facts, words; and what can't be written."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptcli.core.gguf import KINDS, beside, write_gguf
from gptcli.core.model import Transformer
from gptcli.core.quantize import QuantizedLinear, quantize_
from gptcli.core.rope import rotate, rotation
from gptcli.errors import CorruptError, OutputError, UnsupportedError
from gptcli.spec.config import RopeScaling
from gptcli.text.gguf_words import GgufWords, read_gguf_words
from tests.conftest import ROOT
from tests.core.gguf_models import GPT2, LLAMA, random_weights

gguf: Any = pytest.importorskip("gguf", reason="needs the extra 'gguf'")


class Opened:
    """A GGUF as its own package reads it."""

    def __init__(self, file: Path) -> None:
        reader = gguf.GGUFReader(file)
        self.facts = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
            for tensor in reader.tensors
        }


def written(tmp_path: Path, model: Transformer, kind: str = "f32", **more: Any) -> Opened:
    write_gguf(model, tmp_path / "a.gguf", kind=kind, name="small", **more)
    return Opened(tmp_path / "a.gguf")


@pytest.fixture
def gpt2() -> Transformer:
    return random_weights(GPT2)


def parameter(model: Transformer, name: str) -> Tensor:
    return model.get_parameter(name).detach()


def test_gpt2_in_float32_is_the_model_to_the_bit(tmp_path: Path, gpt2: Transformer) -> None:
    found = written(tmp_path, gpt2)
    assert set(found.kinds.values()) == {"F32"}
    assert torch.equal(found.tensors["token_embd.weight"], parameter(gpt2, "embedding.weight"))
    assert torch.equal(found.tensors["position_embd.weight"], parameter(gpt2, "positions.weight"))
    assert torch.equal(found.tensors["output_norm.bias"], parameter(gpt2, "norm.bias"))
    assert "output.weight" not in found.tensors  # tied
    for kind in ("weight", "bias"):
        joined = [parameter(gpt2, f"blocks.1.attention.{name}.{kind}") for name in ("query", "key", "value")]
        assert torch.equal(found.tensors[f"blk.1.attn_qkv.{kind}"], torch.cat(joined))
        for theirs, ours in {
            "attn_norm": "attention_norm",
            "attn_output": "attention.output",
            "ffn_norm": "mlp_norm",
            "ffn_up": "mlp.up",
            "ffn_down": "mlp.down",
        }.items():
            assert torch.equal(found.tensors[f"blk.0.{theirs}.{kind}"], parameter(gpt2, f"blocks.0.{ours}.{kind}"))
    assert len(found.tensors) == 2 + 2 + 2 * 12


def test_the_facts_of_gpt2(tmp_path: Path, gpt2: Transformer) -> None:
    facts = written(tmp_path, gpt2, license="apache-2.0").facts
    assert facts.pop("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert facts == {
        "general.architecture": "gpt2",
        "general.type": "model",
        "general.name": "small",
        "general.license": "apache-2.0",
        "general.file_type": 0,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 64,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 96,
        "gpt2.attention.head_count": 4,
        "gpt2.attention.head_count_kv": 4,
        "gpt2.vocab_size": 300,
        "tokenizer.ggml.model": "no_vocab",
    }


@pytest.mark.parametrize(("kind", "stored", "bound"), [("bf16", "BF16", 2**-8), ("f16", "F16", 2**-11)])
def test_a_smaller_type_holds_the_matrices_alone(
    tmp_path: Path, gpt2: Transformer, kind: str, stored: str, bound: float
) -> None:
    found = written(tmp_path, gpt2, kind)
    for name, tensor in found.tensors.items():
        exact = tensor.dim() == 1 or name == "position_embd.weight"
        assert found.kinds[name] == ("F32" if exact else stored)
    wanted = parameter(gpt2, "blocks.0.mlp.up.weight")
    torch.testing.assert_close(found.tensors["blk.0.ffn_up.weight"], wanted, rtol=bound, atol=1e-7)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    assert torch.equal(found.tensors["blk.0.ffn_up.weight"], wanted.to(dtype).float())
    assert torch.equal(found.tensors["position_embd.weight"], parameter(gpt2, "positions.weight"))
    assert found.facts["general.file_type"] == gguf.LlamaFileType[KINDS[kind]]


def test_q8_0_keeps_blocks_of_32_and_what_has_none_in_float16(tmp_path: Path) -> None:
    model = random_weights(replace(GPT2, mlp_width=72))
    done = write_gguf(model, tmp_path / "a.gguf", kind="q8_0", name="small")
    found = Opened(tmp_path / "a.gguf")
    assert found.kinds["blk.0.ffn_down.weight"] == "F16"  # its rows are 72 numbers long
    assert found.kinds["blk.0.ffn_up.weight"] == found.kinds["token_embd.weight"] == "Q8_0"
    assert "2 matrices whose rows are no multiple of 32" in done.notes[0]
    wanted = parameter(model, "blocks.0.mlp.up.weight")
    largest = wanted.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True)
    off = (found.tensors["blk.0.ffn_up.weight"] - wanted).unflatten(1, (-1, 32)).abs()
    assert (off <= largest * (0.5 / 127 + 2**-10)).all()
    assert off.max() > 0
    assert found.facts["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_pieces_of_a_matrix_are_written_one_after_the_other(
    tmp_path: Path, gpt2: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        write_gguf(gpt2, tmp_path / "whole.gguf", kind=kind, name="small")
        with monkeypatch.context() as patch:
            patch.setattr("gptcli.core.gguf._CHUNK", 200)
            write_gguf(gpt2, tmp_path / "pieces.gguf", kind=kind, name="small")
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_stored_types_are_widened_without_a_change(tmp_path: Path, gpt2: Transformer) -> None:
    rounded = gpt2.to(torch.bfloat16)
    found = written(tmp_path, rounded)
    assert torch.equal(found.tensors["blk.1.ffn_up.weight"], parameter(rounded, "blocks.1.mlp.up.weight").float())


def test_matrices_in_few_bits_are_written_as_what_they_stand_for(tmp_path: Path) -> None:
    model = quantize_(random_weights(replace(GPT2, tied=False)), "int8")
    found = written(tmp_path, model)
    for theirs, ours in {"output": "unembedding", "blk.0.ffn_up": "blocks.0.mlp.up"}.items():
        layer = model.get_submodule(ours)
        assert isinstance(layer, QuantizedLinear)
        assert torch.equal(found.tensors[f"{theirs}.weight"], layer.dequantized())


def test_llamas_queries_and_keys_stand_pair_by_pair(tmp_path: Path) -> None:
    model = random_weights(LLAMA)
    found = written(tmp_path, model)
    query, key = (parameter(model, f"blocks.0.attention.{name}.weight") for name in ("query", "key"))
    theirs = found.tensors["blk.0.attn_q.weight"]
    assert torch.equal(theirs[16 + 2 * 3], query[16 + 3])  # of head 1, the first of pair 3
    assert torch.equal(theirs[16 + 2 * 3 + 1], query[16 + 8 + 3])  # and the second
    assert torch.equal(found.tensors["blk.0.attn_k.weight"][2 * 5 + 1], key[8 + 5])
    assert torch.equal(found.tensors["blk.0.attn_v.weight"], parameter(model, "blocks.0.attention.value.weight"))
    assert torch.equal(found.tensors["output.weight"], parameter(model, "unembedding.weight"))
    assert found.facts["llama.rope.dimension_count"] == found.facts["llama.attention.key_length"] == 16
    assert found.facts["llama.attention.head_count_kv"] == 2
    assert found.facts["llama.rope.freq_base"] == 10_000.0
    assert found.facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert found.facts["tokenizer.ggml.model"] == "no_vocab"


def test_turning_neighbours_is_turning_halves() -> None:
    """What llama.cpp does with permuted rows gives the same products as what we do with ours."""
    heads, size, length = 3, 8, 5
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(heads * size, 20, generator=generator) for _ in range(2))
    x = torch.randn(length, 20, generator=generator)
    turn = rotation(torch.arange(length)[None], size, 10_000.0, torch.float32)

    def halves(matrix: Tensor) -> Tensor:
        return rotate((x @ matrix.t()).view(1, length, heads, size).transpose(1, 2), turn)

    def neighbours(matrix: Tensor) -> Tensor:
        made = (x @ beside(matrix, heads).t()).view(1, length, heads, size // 2, 2).transpose(1, 2)
        cos, sin = (part[..., : size // 2] for part in turn)
        first, second = made.unbind(-1)
        return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)

    ours = halves(query) @ halves(key).transpose(2, 3)
    torch.testing.assert_close(neighbours(query) @ neighbours(key).transpose(2, 3), ours)


def test_biases_are_permuted_with_their_rows(tmp_path: Path) -> None:
    model = random_weights(replace(LLAMA, qkv_bias=True))
    found = written(tmp_path, model)
    assert torch.equal(found.tensors["blk.1.attn_q.bias"], beside(parameter(model, "blocks.1.attention.query.bias"), 4))
    assert torch.equal(found.tensors["blk.1.attn_v.bias"], parameter(model, "blocks.1.attention.value.bias"))


def test_scalings_are_facts_and_llama_3s_a_tensor(tmp_path: Path) -> None:
    yarn = written(tmp_path, random_weights(replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 16)))).facts
    scaling = {key.removeprefix("llama.rope.scaling."): value for key, value in yarn.items() if "scaling" in key}
    assert scaling == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 16,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }
    config = replace(LLAMA, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 8.0, 8192))
    found = written(tmp_path, random_weights(config))
    factors = found.tensors["rope_freqs.weight"]
    assert factors.shape == (8,)
    assert (factors[0], factors[-1]) == (1, 8)
    assert torch.equal(found.tensors["token_embd.weight"][:2], random_weights(config).embedding.weight[:2])


def test_words_are_those_of_the_tokenizer(tmp_path: Path, tiny_folder: Path) -> None:
    words = read_gguf_words(tiny_folder, 300, start_id=0, end_ids=(0,))
    found = written(tmp_path, random_weights(GPT2), words=words, template="{{ messages }}").facts
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert tuple(found["tokenizer.ggml.tokens"]) == words.tokens
    assert tuple(found["tokenizer.ggml.token_type"]) == words.kinds
    assert tuple(found["tokenizer.ggml.merges"]) == words.merges
    assert found["tokenizer.ggml.bos_token_id"] == found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert "tokenizer.ggml.scores" not in found


def test_pieces_have_scores_and_roles(tmp_path: Path) -> None:
    ids = {"bos": 1, "eos": 2, "eot": 3, "unknown": 0, "padding": 4}
    texts = tuple(f"w{i}" for i in range(300))
    scores = tuple(float(-i) for i in range(300))
    words = GgufWords("llama", "default", texts, (1,) * 300, (), scores, ids, True, True, ("a note",))
    done = write_gguf(random_weights(GPT2), tmp_path / "a.gguf", kind="f32", name="small", words=words)
    facts = Opened(tmp_path / "a.gguf").facts
    assert done.notes == ("a note",)
    assert tuple(facts["tokenizer.ggml.scores"]) == scores
    named = {"bos": "bos", "eos": "eos", "eot": "eot", "unknown": "unknown", "padding": "padding"}
    assert {role: facts[f"tokenizer.ggml.{name}_token_id"] for role, name in named.items()} == ids
    assert facts["tokenizer.ggml.add_bos_token"] is facts["tokenizer.ggml.add_space_prefix"] is True


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, gpt2: Transformer) -> None:
    gpt2.get_parameter("blocks.1.mlp.up.weight")[3, 3] = torch.nan
    with pytest.raises(CorruptError, match=r"blk\.1\.ffn_up\.weight holds values that are not finite"):
        write_gguf(gpt2, tmp_path / "a.gguf", kind="q8_0", name="small")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused(tmp_path: Path, gpt2: Transformer) -> None:
    gpt2.get_parameter("blocks.1.mlp.up.weight")[3, 3] = 1e5
    with pytest.raises(CorruptError, match="beyond what float16 holds") as caught:
        write_gguf(gpt2, tmp_path / "a.gguf", kind="f16", name="small")
    assert "bf16" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within, no file of this process can grow beyond ``size`` bytes: what a full disk looks like to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 500, 100_000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, gpt2: Transformer, size: int) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"old")
    with files_up_to(size), pytest.raises(OutputError, match=r"a\.gguf could not be written") as caught:
        write_gguf(gpt2, file, kind="f32", name="small")
    assert "make room" in caught.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
    assert file.read_bytes() == b"old"


def test_a_folder_that_is_not_there(tmp_path: Path, gpt2: Transformer) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_gguf(gpt2, tmp_path / "no" / "a.gguf", kind="f32", name="small")


def test_without_the_package_the_install_line_is_told(
    tmp_path: Path, gpt2: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="needs the gguf package") as caught:
        write_gguf(gpt2, tmp_path / "a.gguf", kind="f32", name="small")
    assert caught.value.hint == "pip install 'gptcli[gguf]'"


_LARGE = """
import resource, sys, torch
from pathlib import Path
from gptcli.core.build import new_transformer
from gptcli.core.gguf import write_gguf
from gptcli.spec.config import ModelConfig
import gguf

config = ModelConfig("gpt2", 8_000, 64, 8, 512, 8, 8, 64, 2048)
with torch.device("meta"):
    model = new_transformer(config)
for module in list(model.modules()):
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:  # as large as it is, and a number's memory
            value = torch.zeros(1, dtype=torch.bfloat16).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
model.tie()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_gguf(model, Path(sys.argv[1]), kind="f32", name="large")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """The file is several times larger than what it takes to write it."""
    file = tmp_path / "large.gguf"
    done = subprocess.run(
        [sys.executable, "-c", _LARGE, str(file)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    size = file.stat().st_size
    assert size > 100e6
    assert int(done.stdout) < size / 2
