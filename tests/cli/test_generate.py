"""``gptcli generate``: the text, its seeds, its input, its limits, and the JSON that scripts read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.core.build import random_model
from gptcli.core.checkpoint import save_folder
from gptcli.core.runtime import DTYPES
from gptcli.spec.config import from_hf
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Run
from tests.conftest import PATIENCE

FIELDS = {
    "model",
    "prompt",
    "text",
    "tokens",
    "finish_reason",
    "seed",
    "device",
    "dtype",
    "quantize",
    "usage",
    "timing",
}
TIMING = {"load_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second"}
COUNTS = {"drafted_tokens", "accepted_tokens"}
CONTEXT = 64  # of the tiny model
END = 0  # its <|endoftext|>


@pytest.fixture
def generate(run: Run, tiny_folder: Path) -> Run:
    """``gptcli generate`` with the tiny model in float32."""
    return lambda *args, **more: run("generate", "-m", tiny_folder, "--dtype", "float32", *args, **more)


def continued(done: Done) -> dict[str, Any]:
    """The JSON of a run that went well."""
    assert done.code == 0, done.err
    return done.json


def lines(done: Done) -> list[dict[str, Any]]:
    """The NDJSON of a run that went well."""
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


# --- The text and its seed


def test_the_same_seed_gives_the_same_text_and_another_another(generate: Run) -> None:
    args = ("Once upon a time", "-n", "20")
    first, again, other = (generate(*args, "--seed", seed) for seed in ("3", "3", "4"))
    assert first.code == again.code == other.code == 0
    assert first.out == again.out != other.out
    assert first.out
    assert first.err == b""


def test_in_a_pipe_stdout_is_the_text_and_not_a_byte_more(generate: Run) -> None:
    args = ("Once upon a time", "-n", "20", "--seed", "3")
    text = continued(generate(*args, "--json"))["text"]
    assert generate(*args).out == text.encode()
    assert generate(*args, "--no-stream").out == text.encode()


def test_a_seed_is_drawn_and_reported_and_gives_the_text_again(generate: Run) -> None:
    first, second = (continued(generate("x", "-n", "8", "--json")) for _ in range(2))
    assert first["seed"] != second["seed"]
    again = continued(generate("x", "-n", "8", "--json", "--seed", str(first["seed"])))
    assert again["tokens"] == first["tokens"]
    assert b"seed" in generate("x", "-n", "8", "-v").err


def test_temperature_0_takes_the_likeliest_whatever_the_seed(generate: Run) -> None:
    args = ("Once", "-n", "6", "-t", "0", "--json", "--logprobs", "2")
    one, two = (continued(generate(*args, "--seed", seed)) for seed in ("1", "2"))
    assert one["tokens"] == two["tokens"]
    assert all(step["id"] == step["top"][0]["id"] for step in one["logprobs"])


@pytest.mark.parametrize("option", [("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")])
def test_a_filter_to_one_token_is_greedy(generate: Run, option: tuple[str, str]) -> None:
    greedy = continued(generate("Once", "-n", "6", "-t", "0", "--json"))["tokens"]
    assert continued(generate("Once", "-n", "6", "-t", "1", *option, "--seed", "5", "--json"))["tokens"] == greedy


def test_penalties_and_bias_move_the_choice(generate: Run) -> None:
    biased = continued(generate("Once", "-n", "4", "-t", "0", "--logit-bias", "77:1000", "--json"))
    assert biased["tokens"] == [77] * 4
    forbidden = ("--logit-bias", "77:1000", "--logit-bias", "78:999", "--presence-penalty", "2")
    assert continued(generate("Once", "-n", "2", "-t", "0", *forbidden, "--json"))["tokens"] == [77, 78]
    often = (*forbidden[:4], "--frequency-penalty", "0.75")
    assert continued(generate("Once", "-n", "3", "-t", "0", *often, "--json"))["tokens"] == [77, 77, 78]
    repeating = continued(generate("Once", "-n", "8", "-t", "0", "--json"))["tokens"]
    fresh = continued(generate("Once", "-n", "8", "-t", "0", "--repetition-penalty", "1e6", "--json"))["tokens"]
    assert len(set(repeating)) < 8 == len(set(fresh))


# --- JSON


def test_json_has_the_fields_of_the_contract(generate: Run, tiny_folder: Path) -> None:
    prompt = "Once upon a time"
    value = continued(generate(prompt, "-n", "5", "--seed", "3", "--json"))
    words = Tokenizer.from_folder(tiny_folder)
    assert value.keys() == FIELDS
    assert value["model"] == "tiny"
    assert value["prompt"] == prompt
    assert value["text"] == words.decode(value["tokens"])
    assert len(value["tokens"]) == 5
    assert value["finish_reason"] == "length"
    assert value["seed"] == 3
    assert (value["device"], value["dtype"]) == ("cpu", "float32")
    assert value["usage"] == {"prompt_tokens": len(words.encode(prompt)), "completion_tokens": 5}
    assert value["timing"].keys() == TIMING | COUNTS
    assert all(isinstance(value["timing"][name], float) and value["timing"][name] > 0 for name in TIMING)
    assert [value["timing"][name] for name in COUNTS] == [0, 0]


def test_format_json_is_json(generate: Run) -> None:
    args = ("Once", "-n", "3", "--seed", "1")
    assert continued(generate(*args, "--format", "json")).keys() == FIELDS
    assert generate(*args, "--format", "text").out == generate(*args).out
    assert continued(generate(*args, "--format", "json", "--json")).keys() == FIELDS


def test_logprobs(generate: Run) -> None:
    value = continued(generate("Once", "-n", "6", "--seed", "2", "--json", "--logprobs", "3"))
    assert value.keys() == FIELDS | {"logprobs"}
    assert [step["id"] for step in value["logprobs"]] == value["tokens"]
    for step in value["logprobs"]:
        assert step.keys() == {"id", "text", "logprob", "top"}
        assert len(step["top"]) == 3
        assert all(choice.keys() == {"id", "text", "logprob"} for choice in step["top"])
        ordered = [choice["logprob"] for choice in step["top"]]
        assert ordered == sorted(ordered, reverse=True)
        assert step["logprob"] <= ordered[0] < 0


def test_logprobs_are_the_models_own_whatever_the_sampling(generate: Run) -> None:
    args = ("Once", "-n", "1", "--seed", "2", "--json", "--logprobs", "1")
    plain = continued(generate(*args))["logprobs"][0]["top"]
    assert continued(generate(*args, "-t", "0.1", "--top-k", "2"))["logprobs"][0]["top"] == plain


def test_logprobs_of_none_beside_the_chosen(generate: Run) -> None:
    value = continued(generate("Once", "-n", "2", "--seed", "2", "--json", "--logprobs", "0"))
    assert [step["top"] for step in value["logprobs"]] == [[], []]


# --- Several


def test_samples_have_seeds_of_their_own_and_are_what_each_gives_alone(generate: Run) -> None:
    args = ("Once upon", "-n", "12", "--json")
    several = lines(generate(*args, "--num-samples", "4", "--seed", "40"))
    assert [value["index"] for value in several] == [0, 1, 2, 3]
    assert [value["seed"] for value in several] == [40, 41, 42, 43]
    assert len({tuple(value["tokens"]) for value in several}) == 4
    for value in several:
        alone = continued(generate(*args, "--seed", str(value["seed"])))
        assert value.keys() == FIELDS | {"index"}
        for key in FIELDS - {"timing"}:
            assert value[key] == alone[key], key


def test_more_samples_than_fit_at_once_are_all_there(generate: Run) -> None:
    several = lines(generate("Once", "-n", "3", "--json", "--num-samples", "18", "--seed", "0"))
    assert [(value["index"], value["seed"]) for value in several] == [(i, i) for i in range(18)]
    assert several[17]["tokens"] == continued(generate("Once", "-n", "3", "--json", "--seed", "17"))["tokens"]


def test_one_sample_has_its_number_where_it_was_asked_for(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = lines(generate("Once", "-n", "2", "--json", "--num-samples", "1", "--seed", "4"))
    assert (one["index"], one["seed"]) == (0, 4)
    monkeypatch.setenv("GPTCLI_NUM_SAMPLES", "1")
    assert "index" not in continued(generate("Once", "-n", "2", "--json"))


def test_samples_in_a_pipe_are_documents_parted_by_their_separator(generate: Run) -> None:
    args = ("Once upon", "-n", "12", "--seed", "40", "--num-samples", "3")
    texts = [value["text"] for value in lines(generate(*args, "--json"))]
    ended = [text if text.endswith("\n") else text + "\n" for text in texts]
    assert generate(*args).out.decode() == "<|endoftext|>\n".join(ended)


def test_a_batch_has_its_own_prompts_and_seeds(generate: Run, tmp_path: Path) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text('{"prompt": "Once upon a time there was", "seed": 7}\n\n{"prompt": "A"}\n{"prompt": ""}\n')
    several = lines(generate("--batch", batch, "-n", "10", "--seed", "3", "--json"))
    assert [value["index"] for value in several] == [0, 1, 2]
    assert [value["seed"] for value in several] == [7, 3, 3]
    for value in several:
        alone = continued(generate(value["prompt"], "-n", "10", "--seed", str(value["seed"]), "--json"))
        assert (value["text"], value["tokens"]) == (alone["text"], alone["tokens"])
        assert value["usage"] == alone["usage"]


def test_what_memory_held_before_does_not_reach_a_batch(generate: Run, tmp_path: Path) -> None:
    """Places of the cache behind a shorter row are not filled; torch then puts NaN into them, here for certain."""
    import torch

    batch = tmp_path / "batch.jsonl"
    batch.write_text('{"prompt": "Once upon a time there was a king"}\n{"prompt": "A"}\n')
    torch.use_deterministic_algorithms(True)
    try:
        several = lines(generate("--batch", batch, "-n", "10", "--seed", "3", "--json"))
    finally:
        torch.use_deterministic_algorithms(False)
    alone = continued(generate("A", "-n", "10", "--seed", "3", "--json"))
    assert several[1]["tokens"] == alone["tokens"]


def test_a_batch_comes_from_stdin_too(generate: Run) -> None:
    done = generate("--batch", "-", "-n", "3", "--seed", "1", "--json", stdin=b'{"prompt": "A", "seed": 5}\n')
    assert [value["seed"] for value in lines(done)] == [5]
    refused = generate("--batch", "-", "--no-stdin", "--json", stdin=b'{"prompt": "A"}\n')
    assert (refused.code, refused.out) == (2, b"")
    assert b"--no-stdin" in refused.err


def test_a_batch_in_a_file_leaves_a_pipe_alone(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text('{"prompt": "A"}\n')
    done = generate("--batch", tmp_path / "batch.jsonl", "-n", "2", "--json", stdin=b"no object\n")
    assert [value["prompt"] for value in lines(done)] == ["A"]


@pytest.mark.parametrize(
    "line", ["not json", "[]", "{}", '{"prompt": 1}', '{"prompt": "x", "seed": "1"}', '{"prompt": "x", "seed": -1}']
)
def test_a_bad_line_of_a_batch_is_named(generate: Run, tmp_path: Path, line: str) -> None:
    batch = tmp_path / "batch.jsonl"
    batch.write_text('{"prompt": "good"}\n' + line + "\n")
    done = generate("--batch", batch, "--json")
    assert (done.code, done.out) == (3, b"")
    assert "line 2" in json.loads(done.err)["error"]["message"]


def test_a_batch_and_a_text_is_wrong_use(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "batch.jsonl").write_text('{"prompt": "good"}\n')
    assert generate("--batch", tmp_path / "batch.jsonl", "text").code == 2
    assert generate("--batch", tmp_path / "nothing.jsonl").code == 3


# --- Input


def prompt_of(done: Done) -> str:
    return continued(done)["prompt"]


def test_piped_text_comes_first_then_the_argument_and_nothing_is_added(generate: Run) -> None:
    args = ("-n", "1", "--json")
    assert prompt_of(generate(*args, stdin=b"piped\n")) == "piped\n"
    assert prompt_of(generate(*args, "argument", stdin=b"piped\n")) == "piped\nargument"
    assert prompt_of(generate(*args, "argument", "--strip", stdin=b" piped \n\n")) == " piped \nargument"
    assert prompt_of(generate(*args, " argument\n", "--strip")) == " argument\n"
    assert prompt_of(generate(*args, "argument", "--no-stdin", stdin=b"piped\n")) == "argument"
    assert prompt_of(generate(*args, "-", stdin=b"piped\r\n")) == "piped\r\n"


def test_files(generate: Run, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"first\n")
    (tmp_path / "b").write_bytes(b"second\n")
    files = ("-n", "1", "--json", "-f", tmp_path / "a", "--file", tmp_path / "b")
    assert prompt_of(generate(*files)) == "first\nsecond\n"
    assert prompt_of(generate(*files, "text", stdin=b"piped\n")) == "piped\nfirst\nsecond\ntext"
    assert prompt_of(generate("-n", "1", "--json", "-f", "-", stdin=b"piped\n")) == "piped\n"


def test_dev_null_is_no_text_unless_told(generate: Run) -> None:
    nothing = generate()
    assert (nothing.code, nothing.out) == (2, b"")
    assert nothing.err.startswith(b"error: there is nothing to work on\nhint: ")
    assert prompt_of(generate("-", "-n", "1", "--json")) == ""


def test_an_empty_text_starts_from_the_start_token(generate: Run) -> None:
    value = continued(generate("", "-n", "5", "--seed", "1", "--json"))
    assert value["usage"]["prompt_tokens"] == 1
    parsed = generate("<|endoftext|>", "--special", "parse", "-n", "5", "--seed", "1", "--json")
    assert value["tokens"] == continued(parsed)["tokens"]
    assert b"note: the text is empty" in generate("", "-n", "1").err  # which is what a variable that is not set gives


def test_special_tokens_in_a_text_are_text(generate: Run) -> None:
    plain = continued(generate("<|endoftext|>", "-n", "1", "--json"))
    parsed = continued(generate("<|endoftext|>", "-n", "1", "--json", "--special", "parse"))
    assert plain["usage"]["prompt_tokens"] > 1
    assert parsed["usage"]["prompt_tokens"] == 1


def test_bad_utf8_is_named_by_its_offset(generate: Run, tmp_path: Path) -> None:
    bad = "héé".encode() + b"\xffc"
    (tmp_path / "file").write_bytes(bad)
    argument = os.fsdecode(bad)
    for done in (generate(stdin=bad), generate("-f", tmp_path / "file"), generate(argument)):
        assert (done.code, done.out) == (3, b"")
        assert b"offset 5" in done.err
        assert b"0xff" in done.err
    for how, read in (("replace", "héé\ufffdc"), ("skip", "hééc")):
        for args, piped in (((), bad), (("-f", tmp_path / "file"), None), ((argument,), None)):
            assert prompt_of(generate(*args, "--errors", how, "-n", "1", "--json", stdin=piped)) == read


def test_bytes_on_the_command_line_reach_the_prompt(gptcli: Callable[..., Any], tiny_folder: Path) -> None:
    done = gptcli("generate", b"ab\xffc", "-m", str(tiny_folder), "-n", "1")
    assert (done.returncode, done.stdout) == (3, b"")
    assert b"offset 2" in done.stderr


# --- Where it ends


def test_a_stop_ends_the_text_and_is_hidden(generate: Run) -> None:
    args = ("Once upon a time", "-n", "30", "--seed", "3")
    # Text of plain characters, so that what is looked for is there.
    allowed = [part for id_ in range(66, 92) for part in ("--logit-bias", f"{id_}:100")]
    whole = continued(generate(*args, *allowed, "--json"))["text"]
    stop = whole[7:10]
    for option in ([], ["--no-stream"]):
        done = generate(*args, *allowed, "--stop", stop, *option)
        assert done.out.decode() == whole[: whole.index(stop)]
    value = continued(generate(*args, *allowed, "--stop", "never there", "--stop", stop, "--json"))
    assert value["text"] == whole[: whole.index(stop)]
    assert value["finish_reason"] == "stop"


def test_the_end_of_text_token_ends_it_and_is_not_part_of_it(generate: Run) -> None:
    bias = ("--logit-bias", f"{END}:1000", "-n", "5", "--json")
    value = continued(generate("Once", *bias))
    assert (value["finish_reason"], value["tokens"], value["text"]) == ("eos", [], "")
    on = continued(generate("Once", *bias, "--ignore-eos"))
    assert (on["finish_reason"], on["tokens"]) == ("length", [END] * 5)


def test_no_tokens_asked_for_are_none(generate: Run) -> None:
    value = continued(generate("Once", "-n", "0", "--json"))
    assert (value["finish_reason"], value["tokens"], value["text"]) == ("length", [], "")


def test_the_context_ends_a_text(generate: Run) -> None:
    for limit in ("-1", "500"):
        value = continued(generate("Once", "-n", limit, "--ignore-eos", "--seed", "1", "--json"))
        assert value["finish_reason"] == "context"
        # The token drawn from a full context is the last.
        assert value["usage"]["prompt_tokens"] + value["usage"]["completion_tokens"] == CONTEXT + 1
        assert len(value["tokens"]) == value["usage"]["completion_tokens"]
    text = generate("Once", "-n", "-1", "--ignore-eos", "--seed", "1")
    assert text.out.decode() == value["text"]
    assert b"--slide" in text.err


def test_slide_goes_on_past_the_context_and_says_so(generate: Run) -> None:
    args = ("Once", "-n", "150", "--ignore-eos", "--seed", "1")
    done = generate(*args, "--slide", "--json")
    value = continued(done)
    assert (value["finish_reason"], len(value["tokens"])) == ("length", 150)
    assert b"note: " in done.err
    before = continued(generate(*args, "--json"))
    assert value["tokens"][: len(before["tokens"])] == before["tokens"]
    quiet = generate(*args, "--slide", "-q")
    assert (quiet.out.decode(), quiet.err) == (value["text"], b"")


def test_a_prompt_past_the_context_is_refused_or_cut_on_the_left(generate: Run, tiny_folder: Path) -> None:
    prompt = " ".join(f"w{i}" for i in range(100))
    refused = generate(prompt)
    assert (refused.code, refused.out) == (4, b"")
    assert b"--truncate-prompt left" in refused.err
    cut = generate(prompt, "--truncate-prompt", "left", "-n", "2", "--seed", "1", "--json")
    value = continued(cut)
    whole = len(Tokenizer.from_folder(tiny_folder).encode(prompt))
    kept = value["usage"]["prompt_tokens"]
    assert kept == CONTEXT - 2  # room for the two tokens that are asked for
    assert f"{whole - kept:,}".encode() in cut.err
    assert cut.err.startswith(b"note: ")
    assert len(value["tokens"]) == 2
    # What is cut is the left: the end of the prompt alone gives the same.
    end = Tokenizer.from_folder(tiny_folder).encode(prompt)[-kept:]
    text = Tokenizer.from_folder(tiny_folder).decode(end)
    assert Tokenizer.from_folder(tiny_folder).encode(text) == end
    assert continued(generate(text, "-n", "2", "--seed", "1", "--json"))["tokens"] == value["tokens"]
    assert generate(prompt, "--truncate-prompt", "left", "-n", "2", "-q").err == b""
    for more in ("-1", "1000"):  # however much is asked for, half the context stays the prompt's
        open_end = continued(generate(prompt, "--truncate-prompt", "left", "-n", more, "--ignore-eos", "--json"))
        assert open_end["usage"] == {"prompt_tokens": CONTEXT // 2, "completion_tokens": CONTEXT // 2 + 1}


def test_a_prompt_that_fills_the_context_is_no_error(generate: Run) -> None:
    value = continued(generate("\x07" * CONTEXT, "-n", "5", "--ignore-eos", "--json"))
    assert value["usage"] == {"prompt_tokens": CONTEXT, "completion_tokens": 1}
    assert value["finish_reason"] == "context"
    assert generate("\x07" * (CONTEXT + 1), "-n", "5").code == 4


# --- What is said beside it


def test_echo(generate: Run) -> None:
    args = ("Once upon", "-n", "5", "--seed", "3")
    text = continued(generate(*args, "--json"))["text"]
    assert generate(*args, "--echo").out.decode() == "Once upon" + text
    assert generate(*args, "--no-echo").out.decode() == text
    assert generate(*args).out.decode() == text


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_quantized_matrices_are_named_and_repeatable(generate: Run, kind: str) -> None:
    asked = ("Once upon", "-n", "6", "-t", "0", "--quantize", kind)
    value = continued(generate(*asked, "--json"))
    assert (value["quantize"], value["dtype"]) == (kind, "float32")
    told = generate(*asked, "--stats", "-v", "--no-echo")
    assert told.out.decode().rstrip("\n") == value["text"].rstrip("\n")
    named = told.err.decode()
    assert (f"{kind})" in named, f"matrices in {kind}" in named) == ((kind != "none",) * 2)


def test_stats_are_on_stderr_alone(generate: Run) -> None:
    args = ("Once upon", "-n", "5", "--seed", "3")
    plain, told = generate(*args), generate(*args, "--stats")
    assert told.out == plain.out
    assert plain.err == b""
    assert b"tokens/s" in told.err
    assert b"5 tokens" in told.err


def test_detail_is_on_stderr_alone(generate: Run) -> None:
    args = ("Once upon", "-n", "5", "--seed", "3")
    told = generate(*args, "-v")
    assert told.out == generate(*args).out
    assert b"float32" in told.err


# --- Wrong use


@pytest.mark.parametrize(
    "options",
    [
        ("-t", "-1"),
        ("-t", "nan"),
        ("-t", "inf"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--top-p", "nan"),
        ("-k", "-1"),
        ("--min-p", "2"),
        ("--min-p", "-0.1"),
        ("--repetition-penalty", "0"),
        ("--frequency-penalty", "inf"),
        ("--presence-penalty", "nan"),
        ("-n", "-2"),
        ("-n", "many"),
        ("-n", "1.5"),
        ("--num-samples", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--logit-bias", "nonsense"),
        ("--logit-bias", "5"),
        ("--logit-bias", "a:1"),
        ("--logit-bias", "5:b"),
        ("--logit-bias", "5:nan"),
        ("--logit-bias", "-5:1"),
        ("--logprobs", "-1", "--json"),
        ("--logprobs", "2"),
        ("--errors", "ignore"),
        ("--special", "both"),
        ("--truncate-prompt", "right"),
        ("--threads", "0"),
        ("--device", "abacus"),
        ("--device", "cpu:1"),
        ("--dtype", "float8"),
        ("--dtype", "float16", "--device", "cpu"),
        ("--quantize", "int5"),
        ("--quantize", ""),
        ("--color", "sometimes"),
        ("--format", "xml"),
        ("--json", "--format", "text"),
        ("--bogus",),
        ("another text",),
    ],
    ids=" ".join,
)
def test_wrong_use_is_2(generate: Run, options: tuple[str, ...]) -> None:
    done = generate("Once", *options)
    assert (done.code, done.out) == (2, b"")
    if "--json" in options:
        assert json.loads(done.err)["error"]["type"] == "usage"
    else:
        first, second = done.err.decode().splitlines()
        assert first.startswith("error: ")
        assert second.startswith("hint: ")


def test_a_wrong_option_is_found_before_the_model_is_sought(run: Run) -> None:
    assert run("generate", "-m", "no-such-model", "-t", "-1", "x").code == 2


# --- The reader goes


def test_a_closed_pipe_is_a_quiet_end(tiny_folder: Path) -> None:
    command = ["generate", "-m", str(tiny_folder), "Once", "-n", "-1", "--slide", "--ignore-eos", "-q"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(PATIENCE) in (0, 141)
    assert said == b""


def gpt2_sized(folder: Path) -> Path:
    """A folder with GPT-2's vocabulary size and no tokenizer files."""
    raw = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    save_folder(random_model(from_hf(raw), 0), folder, dtype=DTYPES["float32"])
    return folder


@pytest.mark.skipif(not os.environ.get("TIKTOKEN_CACHE_DIR"), reason="needs tiktoken's vocabularies")
def test_a_gpt2_folder_without_tokenizer_takes_gpt2s_and_says_so(run: Run, tmp_path: Path) -> None:
    done = run("generate", "Hello world", "-m", gpt2_sized(tmp_path / "m"), "-n", "2", "--json", "--seed", "1")
    assert continued(done)["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}
    assert b"GPT-2's are used" in done.err


def test_without_the_vocabulary_it_says_what_to_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    import tiktoken.registry

    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    done = run("generate", "Hello", "-m", gpt2_sized(tmp_path / "m"), "-n", "2")
    assert done.code == 3
    assert b"has no tokenizer.json" in done.err
    assert b"TIKTOKEN_CACHE_DIR" in done.err


def test_compiled_steps_make_the_same_text(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that gives back what it was given: the real one is tried in tests/core/test_compiled.py."""
    import torch

    asked = ("generate", "Once", "-m", str(tiny_folder), "-n", "20", "-t", "0", "--ignore-eos")
    plain = run(*asked)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    done = run(*asked, "--compile", "-v")
    assert (done.code, done.out) == (plain.code, plain.out)
    assert b"the step is compiled when the first token is made" in done.err
    assert b"compiled steps" in done.err

    def broken(function: object, **options: object) -> object:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    fallen = run(*asked, "--compile")
    assert (fallen.code, fallen.out) == (plain.code, plain.out)
    assert b"steps could not be compiled: no compiler here" in fallen.err
