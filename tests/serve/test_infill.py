"""``suffix``: a model whose tokenizer has the marks fills in before it; any other says why it can't."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcli.core.generate import generate
from gptcli.core.requests import Request
from gptcli.core.settings import Sampling
from tests.conftest import tiny_tokenizer
from tests.serve.running import Running, running

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A random model with room for three marks, ids 300 to 302."""
    from gptcli.core.build import random_model
    from gptcli.core.checkpoint import save_folder
    from gptcli.core.runtime import DTYPES
    from gptcli.spec.config import from_hf

    shape = {"vocab_size": 304, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = from_hf({"model_type": "gpt2", **shape, "bos_token_id": 0, "eos_token_id": 0})
    raw = json.loads(tiny_tokenizer())
    first = raw["added_tokens"][0]
    raw["added_tokens"] += [{**first, "id": 300 + number, "content": mark} for number, mark in enumerate(MARKS)]
    folder = tmp_path_factory.mktemp("models") / "filler"
    files = {"tokenizer.json": json.dumps(raw).encode()}
    save_folder(random_model(config, seed=7), folder, dtype=DTYPES["float32"], files=files)
    with running(folder, tmp_path_factory.mktemp("s")) as server:
        yield server


def test_a_middle_is_made_from_the_marks(filler: Running) -> None:
    tokenizer = filler.service.model.tokenizer
    before, after = tokenizer.encode("Once upon"), tokenizer.encode(" a king.")
    ids = [300, *before, 301, *after, 302]
    request = Request(ids, 1, 12, (*MARKS, "<|endoftext|>"))
    wanted = "".join(step.text for step in generate(filler.service.model, [request], Sampling()))
    for prompt in ("Once upon", before):
        answer = filler.complete(prompt, suffix=" a king.", max_tokens=12)
        assert answer["choices"][0]["text"] == wanted
        assert answer["usage"]["prompt_tokens"] == len(ids)
    both = filler.complete(["Once upon", "The"], suffix=" a king.", max_tokens=12)["choices"]
    assert both[0]["text"] == wanted
    fields = {"prompt": "Once upon", "suffix": " a king.", "seed": 1, "max_tokens": 12, "stream": True}
    events = filler.post("/v1/completions", fields).events
    assert "".join(event["choices"][0]["text"] for event in events) == wanted
    assert (
        filler.complete("Once upon", max_tokens=12)["choices"]
        == (filler.complete("Once upon", suffix="", max_tokens=12)["choices"])
    )


def test_a_middle_ends_with_a_mark(filler: Running) -> None:
    choice = filler.complete("Once", suffix=" time", logit_bias={"300": 100}, temperature=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")


def test_what_does_not_go_is_told(filler: Running) -> None:
    for fields, param in (
        ({"suffix": 5}, "suffix"),
        ({"suffix": "a", "echo": True}, "echo"),
        ({"suffix": "word " * 64}, "prompt"),
    ):
        answer = filler.post("/v1/completions", {"prompt": "a", **fields})
        assert (answer.status, answer.error["param"]) == (400, param)


def test_a_model_that_has_not_learnt_it_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, tmp_path) as server:
        error = server.post("/v1/completions", {"prompt": "a", "suffix": "b"}).error
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert "no tokens for filling in" in error["message"]
    assert "complete --suffix" in error["message"]
