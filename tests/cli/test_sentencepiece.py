"""A model whose tokenizer puts a space before every text, as Llama 2's does: no text gains one, none loses one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Run
from tests.text.families import sentencepiece

TEXT = "the quick brown fox isn't lazy 日本 😀\n  and the other"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of GPT-2's shape with a tokenizer of Llama 2's kind, whose ``<s>`` starts a text."""
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import from_hf

    raw = {"model_type": "gpt2", "vocab_size": 720, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path_factory.mktemp("models") / "spaced"
    files = {"tokenizer.json": json.dumps(sentencepiece()).encode()}
    save_folder(random_model(from_hf(raw | ends), seed=7), folder, dtype=DTYPES["float32"], files=files)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def good(done: Done) -> bytes:
    assert (done.code, done.err) == (0, b"")
    return done.out


def objects(done: Done) -> list[dict[str, Any]]:
    return [json.loads(line) for line in good(done).splitlines()]


def test_tokenize_there_and_back(run: Run, folder: Path, ours: Tokenizer) -> None:
    ids = good(run("tokenize", "-m", folder, TEXT)).decode()
    assert [int(id_) for id_ in ids.split()] == ours.encode(TEXT)
    assert good(run("tokenize", "-m", folder, "--decode", ids)) == TEXT.encode()
    assert good(run("tokenize", "-m", folder, "--count", TEXT)) == f"{len(ids.split())}\n".encode()
    (told,) = objects(run("tokenize", "-m", folder, "--json", TEXT))
    assert b"".join(bytes.fromhex(token["bytes"]) for token in told["tokens"]) == TEXT.encode()
    assert told["tokens"][0]["text"] == "the"
    assert told["tokens"][-1]["end"] == len(TEXT.encode())
    pieces = good(run("tokenize", "-m", folder, "--pieces", "the fox")).decode().splitlines()
    assert pieces[0].split("\t")[1] == "the"


def test_what_does_the_work_is_told_when_asked(run: Run, folder: Path, tiny_folder: Path) -> None:
    assert b"tokenizers library: it is not of byte-level BPE" in run("tokenize", "-m", folder, "-v", "a").err
    assert b"library" not in run("tokenize", "-m", tiny_folder, "-v", "a").err


def test_tokenize_cuts_text(run: Run, folder: Path, ours: Tokenizer) -> None:
    for size in (1, 3, 8, 500):
        head = good(run("tokenize", "-m", folder, "--truncate", str(size), TEXT)).decode()
        assert TEXT.startswith(head)
        assert len(ours.encode(head)) <= size
        tail = good(run("tokenize", "-m", folder, "--truncate", str(size), "--keep", "tail", TEXT)).decode()
        assert TEXT.endswith(tail)
        assert len(ours.encode(tail)) <= size
    pieces = [told["text"] for told in objects(run("tokenize", "-m", folder, "--split", "8", "--json", TEXT))]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 3


def test_a_long_stream_is_counted_in_pieces(run: Run, folder: Path, ours: Tokenizer, tmp_path: Path) -> None:
    text = "the quick brown fox isn't lazy\n" * 20_000
    (tmp_path / "long.txt").write_text(text)
    count = int(good(run("tokenize", "-m", folder, "--count", "-f", tmp_path / "long.txt")))
    assert count == len(ours.encode(text))


def test_generate_goes_on_from_the_start_token(run: Run, folder: Path, ours: Tokenizer) -> None:
    (told,) = objects(run("generate", "-m", folder, "the fox", "-n", "12", "--seed", "3", "--json"))
    assert told["usage"]["prompt_tokens"] == 1 + len(ours.encode("the fox"))
    # A continuation starts with its space, if its first token has one.
    assert told["text"] == b"".join(map(ours.token_bytes, told["tokens"])).decode("utf-8", "replace")
    (parsed,) = objects(
        run("generate", "-m", folder, "<s>the fox", "--special", "parse", "-n", "12", "--seed", "3", "--json")
    )
    assert parsed["tokens"] == told["tokens"]
    assert parsed["usage"] == told["usage"]


def test_a_continuation_keeps_its_space(run: Run, folder: Path, ours: Tokenizer) -> None:
    """Whatever the weights say: the token that is wanted is the only one left."""
    (word,) = ours.encode(" fox", follows=True)
    assert ours.token_text(word) == " fox"
    done = run("generate", "-m", folder, "the", "-n", "2", "--logit-bias", f"{word}:100", "-t", "0", "--no-echo")
    assert good(done) == b" fox fox"


def test_choices_and_words_go_on(run: Run, folder: Path, ours: Tokenizer) -> None:
    (told,) = objects(run("predict", "-m", folder, "the", "--choose", " fox", "--choose", "re", "--json"))
    assert [len(choice["tokens"]) for choice in told["choices"]] == [1, len(ours.encode("re", follows=True))]
    assert told["choices"][0]["tokens"] == ours.encode(" fox", follows=True)
    (near,) = objects(run("embed", "-m", folder, "--expression", '" fox" - " the"', "--json"))
    assert near["excluded"] == [*ours.encode(" fox", follows=True), *ours.encode(" the", follows=True)]


def test_score_shows_its_input(run: Run, folder: Path, ours: Tokenizer) -> None:
    text = TEXT + "\n"
    colored = run("score", "-m", folder, "--color", "always", stdin=text.encode())
    assert colored.code == 0
    assert re.sub("\x1b\\[[0-9;]*m", "", colored.out.decode()) == text
    (told,) = objects(run("score", "-m", folder, "--json", stdin=text.encode()))
    assert told["bytes"] == len(text.encode())
    assert [token["id"] for token in told["tokens"]] == ours.encode(text)
    assert all(token["bits"] is not None for token in told["tokens"])


def test_complete_goes_on_from_within_a_word(run: Run, folder: Path) -> None:
    for prefix in ("the qu", "the", "the ", ""):
        (told,) = objects(run("complete", "-m", folder, prefix, "--json", "--num", "5"))
        assert all(each["probability"] > 0 for each in told["completions"])
    (told,) = objects(run("complete", "-m", folder, "the qu", "--suffix", " fox", "--json"))
    assert told["model"]


@pytest.mark.parametrize("named", [("bos_token_id", "eos_token_id"), ("eos_token_id",), ()])
def test_a_model_without_endoftext_learns(run: Run, folder: Path, tmp_path: Path, named: tuple[str, ...]) -> None:
    """Documents stand behind what starts its texts, or ends them; without either, it is said how to name one."""
    model, out, text = tmp_path / "model", tmp_path / "out", tmp_path / "text"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    for name in {"bos_token_id", "eos_token_id"} - set(named):
        del config[name]
    (model / "config.json").write_text(json.dumps(config))
    if "bos_token_id" not in named:
        raw = json.loads((model / "tokenizer.json").read_text())
        (model / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}))
    text.write_text(f"{TEXT}\n<|endoftext|>\n" * 60)
    length = ("--steps", "1", "--batch-tokens", "64", "--eval-every", "0", "--seed", "1", "--dtype", "float32")
    done = run("train", "--init-from", model, "--out", out, *length, text)
    if not named:
        assert done.code == 2
        assert b"bos_token_id or eos_token_id" in done.err
        return
    assert done.code == 0, done.err
    tuned = json.loads((out / "config.json").read_text())
    assert {name: tuned.get(name) for name in config} == {**config, "torch_dtype": "float32"}
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert run("generate", "-m", out, "-t", "0", "-n", "4", "the quick").code == 0
