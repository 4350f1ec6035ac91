"""``gptcli models export``: folders and GGUF files that hold the model, and what is told where they can't."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run

gguf: Any = pytest.importorskip("gguf", reason="needs the extra 'gguf'")


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with all that may stand in one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# tiny\n")
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "x": 1}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "notes.txt").write_text("mine")
    return folder


def facts(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def test_a_folder_is_exported_with_what_belongs_to_it(run: Run, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    done = run("models", "export", model, "--to", "hf", "-o", target, "--json")
    assert (done.code, done.err) == (0, b"")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE"):
        assert (target / file).read_bytes() == (model / file).read_bytes()
    assert not (target / "notes.txt").exists()
    before, after = load_file(model / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((target / "generation_config.json").read_text()) == {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    report = done.json
    assert (report["model"], report["to"], report["output"], report["dtype"]) == ("model", "hf", str(target), "float32")
    assert (report["architecture"], report["tensors"], report["notes"]) == ("GPT2LMHeadModel", len(before), [])
    assert {each["name"]: each["bytes"] for each in report["files"]} == {
        file.name: file.stat().st_size for file in target.iterdir()
    }
    assert report["bytes"] == sum(each["bytes"] for each in report["files"])
    prompt = ("generate", "Once upon", "-t", "0", "-n", "8", "-m")
    assert run(*prompt, target).out == run(*prompt, model).out != b""


def test_a_folder_in_another_type(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("models", "export", model, "--to", "hf", "-o", tmp_path / "half", "--dtype", "f16").code == 0
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(before[name].half(), after[name]) for name in before)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    # What is stored in float16 goes on as it is, and is not refused for what a CPU can't compute in.
    again = run("models", "export", tmp_path / "half", "--to", "hf", "-o", tmp_path / "again", "--json")
    assert again.json["dtype"] == "float16"
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert weights[0] == weights[1]


def test_of_several_types_none_is_rounded_on_the_way(run: Run, model: Path, tmp_path: Path) -> None:
    """Norms in float32 beside matrices in bfloat16, as some programs save them."""
    weights = load_file(model / "model.safetensors")
    mixed = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor + 1e-4 for name, tensor in weights.items()}
    save_file(mixed, model / "model.safetensors", metadata={"format": "pt"})
    done = run("models", "export", model, "--to", "gguf", "-o", tmp_path / "a.gguf", "--json")
    assert done.json["dtype"] == "bf16"  # that of most
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    norm = torch.from_numpy(tensors["output_norm.weight"].data.copy())
    assert torch.equal(norm, mixed["transformer.ln_f.weight"])
    assert tensors["token_embd.weight"].tensor_type.name == "BF16"


def test_what_a_bare_folder_lacks_is_written_or_told(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    done = run("models", "export", bare, "--to", "hf", "-o", tmp_path / "out")
    assert b"no card" in done.err
    assert b"license is that of the model" in (tmp_path / "out" / "README.md").read_bytes()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["eos_token"] == "<|endoftext|>"
    assert settings["model_max_length"] == 64
    (bare / "tokenizer.json").unlink()
    done = run("models", "export", bare, "--to", "hf", "-o", tmp_path / "mute")
    assert done.code == 0
    assert b"no tokenizer files" in done.err


def test_a_gguf_holds_model_and_words(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    done = run("models", "export", model, "--to", "gguf", "-o", file, "--json")
    assert (done.code, done.err) == (0, b"")
    report = done.json
    assert (report["architecture"], report["dtype"], report["tensors"]) == ("gpt2", "f32", 28)
    assert report["files"] == [{"name": "tiny.gguf", "bytes": file.stat().st_size}]
    found = facts(file)
    assert found["general.name"] == "model"
    assert found["general.license"] == "apache-2.0"
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(found["tokenizer.ggml.tokens"]) == 300
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "tiny.gguf"]


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_types_have_two_spellings(run: Run, tiny_folder: Path, tmp_path: Path, spelling: str) -> None:
    file = tmp_path / "a.gguf"
    done = run("models", "export", tiny_folder, "--to", "gguf", "-o", file, "--dtype", spelling)
    assert done.out.decode().startswith(f"tiny: {file} (gpt2, bf16, 28 tensors, ")
    assert facts(file)["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16


def test_what_is_there_stays_without_force(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.gguf", tmp_path / "folder"
    file.write_bytes(b"old")
    folder.mkdir()
    assert run("models", "export", tiny_folder, "--to", "hf", "-o", folder).code == 0  # an empty one may be filled
    for to, path in (("gguf", file), ("hf", folder)):
        before = sorted((each.name, each.stat().st_mtime_ns) for each in tmp_path.rglob("*"))
        done = run("models", "export", tiny_folder, "--to", to, "-o", path)
        assert done.code == 2
        assert b"is there already" in done.err
        assert b"--force" in done.err
        assert sorted((each.name, each.stat().st_mtime_ns) for each in tmp_path.rglob("*")) == before
        assert run("models", "export", tiny_folder, "--to", to, "-o", path, "--force").code == 0
    assert file.read_bytes().startswith(b"GGUF")


def test_a_model_may_be_written_over_itself(run: Run, model: Path) -> None:
    wanted = load_file(model / "model.safetensors")
    assert run("models", "export", model, "--to", "hf", "-o", model, "--force", "--dtype", "f32").code == 0
    assert all(torch.equal(wanted[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())
    assert (model / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--to is missing"),
        (("--to", "onnx", "-o", "x"), "--to 'onnx' is not a choice"),
        (("--to", "hf"), "-o is missing"),
        (("--to", "hf", "-o", "x", "--dtype", "q8_0"), "--dtype 'q8_0' is not a choice"),
        (("--to", "gguf", "-o", "x", "--dtype", "q4_0"), "use auto, f32, bf16, f16, q8_0"),
        (("--to", "gguf", "-o", "."), "is a folder"),
        (("--to", "hf", "-o", "here"), "is a file"),
        (("--to", "gguf", "-o", "/dev/null", "--force"), "is not a file"),
    ],
)
def test_wrong_use(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").write_text("")
    done = run("models", "export", tiny_folder, *args)
    assert done.code == 2
    assert said in done.err.decode()
    assert done.out == b""


def test_without_the_package(run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    done = run("models", "export", tiny_folder, "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert done.code == 3
    assert b"hint: pip install 'gptcli[gguf]'" in done.err
    assert run("models", "export", tiny_folder, "--to", "hf", "-o", tmp_path / "folder").code == 0


def test_a_model_that_llama_cpp_lacks(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_folder, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    done = run("models", "export", odd, "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert done.code == 3
    assert b"activation = 'relu'" in done.err
    assert not (tmp_path / "a.gguf").exists()


def test_a_model_without_a_tokenizer(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute"
    shutil.copytree(tiny_folder, mute)
    (mute / "tokenizer.json").unlink()
    done = run("models", "export", mute, "--to", "gguf", "-o", tmp_path / "a.gguf")
    assert done.code == 3
    assert b"no tokenizer.json" in done.err


def test_a_place_that_can_not_be_written(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for to in ("hf", "gguf"):
        done = run("models", "export", tiny_folder, "--to", to, "-o", tmp_path / "file" / "below")
        assert done.code == 1
        assert b"could not be written" in done.err
