"""``gptcli predict``: numbers as the model gives them, choices, many lines, what is refused, and bars on a terminal."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.cli import main, predict_bars
from gptcli.core.build import Model, open_model
from gptcli.core.distribution import Candidate, Distribution
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Run
from tests.cli.test_terminal import ESCAPE, Screen, plain
from tests.conftest import PATIENCE, ROOT

CONTEXT, VOCABULARY = 64, 300  # of the tiny model
START = 0
FIELDS = {"model", "prompt", "tokens", "temperature", "entropy_bits", "others", "top", "device", "dtype", "quantize"}
TEXT = "Once upon a time"


@pytest.fixture
def predict(run: Run, tiny_folder: Path) -> Run:
    """``gptcli predict`` with the tiny model in float32."""
    return lambda *args, **more: run("predict", "-m", tiny_folder, "--dtype", "float32", *args, **more)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")


def good(done: Done) -> Any:
    """The JSON of a run that went well, a list where there are several lines."""
    assert done.code == 0, done.err
    values = [json.loads(line) for line in done.out.splitlines()]
    return values[0] if len(values) == 1 else values


def rows(done: Done) -> list[list[str]]:
    """The lines of a run that went well, parted at tabs."""
    assert done.code == 0, done.err
    return [line.split("\t") for line in done.out.decode().splitlines()]


def expected(model: Model, ids: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """The probabilities by numpy, in float64, of a plain forward."""
    logits = model.transformer(torch.tensor([ids]))[0, -1].double().numpy()
    powers = np.exp((logits - logits.max()) / temperature)
    return powers / powers.sum()


# --- The next token


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_matrices_move_the_numbers_a_little(predict: Run, kind: str) -> None:
    exact, value = (good(predict(TEXT, "--json", "--top", "300", *more)) for more in ((), ("--quantize", kind)))
    assert (exact["quantize"], value["quantize"]) == ("none", kind)
    logits = {each["id"]: each["logit"] for each in exact["top"]}
    moved = max(abs(each["logit"] - logits[each["id"]]) for each in value["top"])
    assert 0 < moved < {"int8": 0.02, "int4": 0.1}[kind]
    assert good(predict(TEXT, "--json", "--choose", "a", "--choose", "b", "--quantize", kind))["quantize"] == kind


def test_json_has_the_fields_of_the_contract_and_the_models_numbers(predict: Run, model: Model) -> None:
    value = good(predict(TEXT, "--json"))
    ids = model.tokenizer.encode(TEXT)
    assert value.keys() == FIELDS
    assert (value["model"], value["prompt"], value["tokens"]) == ("tiny", TEXT, ids)
    assert (value["device"], value["dtype"], value["temperature"]) == ("cpu", "float32", 1.0)
    assert len(value["top"]) == 10
    chances = expected(model, ids)
    assert [each["id"] for each in value["top"]] == np.argsort(-chances)[:10].tolist()
    logits = model.transformer(torch.tensor([ids]))[0, -1]
    for each in value["top"]:
        assert each.keys() == {"id", "text", "logit", "probability"}
        assert each["text"] == model.tokenizer.decode([each["id"]])
        assert each["logit"] == pytest.approx(logits[each["id"]].item(), abs=1e-6)
        assert each["probability"] == pytest.approx(chances[each["id"]], abs=1e-8)
    assert value["entropy_bits"] == pytest.approx(-(chances * np.log2(chances)).sum(), abs=1e-6)


def test_all_of_the_vocabulary_sums_to_1(predict: Run) -> None:
    value = good(predict(TEXT, "--json", "--top", str(VOCABULARY + 5)))
    assert len(value["top"]) == VOCABULARY
    assert abs(math.fsum(each["probability"] for each in value["top"]) - 1) < 1e-6
    assert value["others"] == 0
    few = good(predict(TEXT, "--json", "--top", "3"))
    assert few["top"] == value["top"][:3]
    assert abs(math.fsum(each["probability"] for each in few["top"]) + few["others"] - 1) < 1e-6


def test_several_temperatures_are_blocks_with_one_order(predict: Run, model: Model) -> None:
    value = good(predict(TEXT, "--json", "-t", "0,0.2,1", "-t", "2"))
    assert value.keys() == FIELDS - {"temperature", "entropy_bits", "others", "top"} | {"temperatures"}
    assert [block["temperature"] for block in value["temperatures"]] == [0, 0.2, 1, 2]
    order = [each["id"] for each in value["temperatures"][2]["top"]]
    for block in value["temperatures"]:
        assert block.keys() == {"temperature", "entropy_bits", "others", "top"}
        assert [each["id"] for each in block["top"]] == order
        alone = good(predict(TEXT, "--json", "-t", str(block["temperature"])))
        assert {name: alone[name] for name in block} == block
    for block in value["temperatures"][1:]:
        chances = expected(model, value["tokens"], block["temperature"])
        assert [each["probability"] for each in block["top"]] == pytest.approx(chances[order], abs=1e-7)
    greedy = value["temperatures"][0]
    assert [each["probability"] for each in greedy["top"]] == [1.0] + [0.0] * 9
    assert greedy["entropy_bits"] == greedy["others"] == 0
    bits = [block["entropy_bits"] for block in value["temperatures"]]
    assert bits == sorted(bits)


def test_in_a_pipe_a_token_is_a_row_of_numbers_as_in_json(predict: Run, model: Model) -> None:
    top = good(predict(TEXT, "--json"))["top"]
    for row, each in zip(rows(predict(TEXT)), top, strict=True):
        assert [float(row[0]), float(row[1]), int(row[2])] == [each["probability"], each["logit"], each["id"]]
        assert row[3][0] == row[3][-1] == '"'
    several = good(predict(TEXT, "--json", "-t", "0.5,2"))["temperatures"]
    table = rows(predict(TEXT, "-t", "0.5,2"))
    for column, block in enumerate(several):
        assert [float(row[column]) for row in table] == [each["probability"] for each in block["top"]]
    assert [row[3:] for row in table] == [row[2:] for row in rows(predict(TEXT))]


def test_every_token_is_one_row(predict: Run) -> None:
    """Also those that are line ends, tabs and halves of characters."""
    table = rows(predict(TEXT, "--top", str(VOCABULARY)))
    assert len(table) == VOCABULARY
    assert {len(row) for row in table} == {4}
    assert {'"\\n"', '"\\t"', '"\\x1b"', '"\\xff"', '"\\\\"', '"\\""', '" the"'} <= {row[3] for row in table}


def test_the_prompt_is_what_generate_would_take(predict: Run, model: Model, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("Once ")
    assert good(predict("a time", "-f", str(tmp_path / "a"), "--json", stdin=b"upon "))["prompt"] == "upon Once a time"
    piped = good(predict("--json", stdin=b"Once\n"))
    assert piped["tokens"] == model.tokenizer.encode("Once\n")
    assert good(predict("--json", "--strip", stdin=b"Once\n"))["prompt"] == "Once"
    assert good(predict("", "--json"))["tokens"] == [START]
    assert good(predict("<|endoftext|>", "--json", "--special", "parse"))["tokens"] == [START]
    assert len(good(predict("<|endoftext|>", "--json"))["tokens"]) > 1


def test_a_prompt_beyond_the_context_is_4_or_is_cut(predict: Run) -> None:
    long = "x" * (CONTEXT + 6)
    done = predict(long)
    assert (done.code, done.out) == (4, b"")
    assert b"--truncate-prompt left" in done.err
    assert good(predict(long[:CONTEXT], "--json"))["top"]
    cut = predict(long, "--truncate-prompt", "left", "--json")
    assert len(good(cut)["tokens"]) == CONTEXT
    assert b"the first 6 of 70 prompt tokens" in cut.err


# --- Choices


def test_choices_are_scored_as_a_plain_forward_does_in_the_order_given(predict: Run, model: Model) -> None:
    texts = [" the king", "z", " animals and the others", " a"]
    value = good(predict(TEXT, "--json", *itertools.chain(*(("--choose", text) for text in texts))))
    assert value.keys() == FIELDS - {"entropy_bits", "others", "top"} | {"choices", "winner"}
    assert value["temperature"] == 1
    assert [each["text"] for each in value["choices"]] == texts
    for each in value["choices"]:
        assert each.keys() == {"text", "logprob", "probability", "tokens", "logprobs"}
        assert each["tokens"] == model.tokenizer.encode(each["text"])
        before, total = list(value["tokens"]), 0.0
        for id_, logprob in zip(each["tokens"], each["logprobs"], strict=True):
            assert logprob == pytest.approx(math.log(expected(model, before)[id_]), abs=1e-5)
            total += logprob
            before.append(id_)
        assert each["logprob"] == pytest.approx(total)
        alone = good(predict(TEXT, "--json", "--choose", each["text"]))["choices"][0]
        assert alone["logprob"] == pytest.approx(each["logprob"], abs=1e-5)
        assert alone["probability"] == 1
    weights = [math.exp(each["logprob"]) for each in value["choices"]]
    chances = [each["probability"] for each in value["choices"]]
    assert chances == pytest.approx([weight / sum(weights) for weight in weights])
    assert abs(math.fsum(chances) - 1) < 1e-6
    assert value["winner"] == texts[chances.index(max(chances))]


def test_per_token_weighs_by_the_mean(predict: Run) -> None:
    args = (TEXT, "--json", "--choose", "z", "--choose", " the king had a daughter")
    total, mean = good(predict(*args)), good(predict(*args, "--per-token"))
    assert [each["logprob"] for each in mean["choices"]] == [each["logprob"] for each in total["choices"]]
    assert total["winner"] == "z"
    weights = [math.exp(each["logprob"] / len(each["tokens"])) for each in mean["choices"]]
    chances = [each["probability"] for each in mean["choices"]]
    assert chances == pytest.approx([weight / sum(weights) for weight in weights])
    assert mean["winner"] == mean["choices"][chances.index(max(chances))]["text"]


def test_choices_in_a_pipe_are_rows(predict: Run) -> None:
    args = (TEXT, "--choose", "z\n", "--choose", " the")
    choices = good(predict(*args, "--json"))["choices"]
    table = rows(predict(*args))
    assert [[float(row[0]), float(row[1]), int(row[2])] for row in table] == [
        [each["probability"], each["logprob"], len(each["tokens"])] for each in choices
    ]
    assert [row[3] for row in table] == ['"z\\n"', '" the"']


def test_the_winner_is_its_text_and_a_line_end(predict: Run) -> None:
    args = (TEXT, "--choose", " the king", "--choose", "z", "--winner")
    assert predict(*args).out == b"z\n"
    assert good(predict(*args, "--json"))["winner"] == "z"


def test_a_shell_can_ask(tiny_folder: Path) -> None:
    program = f"{sys.executable} -m gptcli predict -m {tiny_folder}"
    script = f"""
review='it was'
if [ "$(echo "$review" | {program} --choose ' the' --choose ' the king' --winner)" = ' the' ]; then echo yes; fi
{program} "$review" --top 300 | head -1 | cut -f 3
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE
    )
    assert done.stderr == b""
    assert done.stdout.split()[0] == b"yes"
    assert done.stdout.split()[1].isdigit()


def test_a_choice_that_would_be_other_tokens_in_one_piece_is_told_with_v(predict: Run) -> None:
    done = predict("th", "--choose", "e", "--choose", "z", "-v")
    assert b"'e' is weighed as \"e\"; in one piece with the prompt" in done.err
    assert b"'z'" not in done.err
    assert predict("th", "--choose", "e", "--choose", "z").err == b""


def test_special_tokens_in_choices_are_text_unless_told(predict: Run) -> None:
    args = (TEXT, "--json", "--choose", "<|endoftext|>")
    assert len(good(predict(*args))["choices"][0]["tokens"]) > 1
    assert good(predict(*args, "--special", "parse"))["choices"][0]["tokens"] == [START]


def test_prompt_and_choice_beyond_the_context_are_4_or_cut(predict: Run, model: Model) -> None:
    long = "x" * (CONTEXT - 2)
    assert good(predict(long, "--json", "--choose", "zzz"))["choices"][0]["logprob"] < 0
    done = predict(long, "--choose", "zzzz")
    assert (done.code, done.out) == (4, b"")
    cut = good(predict(long, "--json", "--choose", "zzzz", "--truncate-prompt", "left"))
    assert cut["tokens"] == model.tokenizer.encode(long)[1:]
    assert predict("x", "--choose", "z" * 65, "--truncate-prompt", "left").code == 4


# --- Lines


def test_each_line_is_a_prompt_and_a_line_of_json(predict: Run) -> None:
    lines = [f"{'x' * (number % 40)} {number}" for number in range(70)]  # more than one group, of unlike length
    lines[3] = ""
    found = good(predict("--lines", "--json", "--top", "4", stdin="\n".join(lines).encode()))
    assert [each["prompt"] for each in found] == lines
    assert [each["index"] for each in found] == list(range(70))
    for place in (0, 3, 39, 63, 64, 69):
        alone = good(predict(lines[place], "--json", "--top", "4"))
        assert found[place]["tokens"] == alone["tokens"]
        for ours, theirs in zip(found[place]["top"], alone["top"], strict=True):
            assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-7)


def test_many_lines_are_classified(predict: Run) -> None:
    lines = [f"{'king ' * (number % 9)}{number}" for number in range(70)]
    stdin = "\n".join(lines).encode() + b"\n"
    args = ("--choose", " the", "--choose", "z", "--choose", " animals")
    winners = predict("--lines", *args, "--winner", stdin=stdin).out.decode().splitlines()
    table = rows(predict("--lines", *args, stdin=stdin))
    found = good(predict("--lines", *args, "--json", stdin=stdin))
    assert len(winners) == len(table) == len(found) == 70
    for winner, row, value in zip(winners, table, found, strict=True):
        chances = [each["probability"] for each in value["choices"]]
        assert list(map(float, row)) == chances
        assert abs(math.fsum(chances) - 1) < 1e-6
        assert winner == value["winner"] == (" the", "z", " animals")[chances.index(max(chances))]
    for place in (0, 8, 69):
        alone = good(predict(lines[place], *args, "--json"))
        assert [each["logprob"] for each in alone["choices"]] == pytest.approx(
            [each["logprob"] for each in found[place]["choices"]], abs=1e-5
        )


def test_blocks_of_lines_are_parted_by_an_empty_line(predict: Run) -> None:
    blocks = predict("--lines", "--top", "2", stdin=b"a\nb\n").out.decode().split("\n\n")
    assert len(blocks) == 2
    for block, text in zip(blocks, ("a", "b"), strict=True):
        found = [line.split("\t") for line in block.splitlines()]
        alone = rows(predict(text, "--top", "2"))
        assert [row[2:] for row in found] == [row[2:] for row in alone]
        assert [float(row[0]) for row in found] == pytest.approx([float(row[0]) for row in alone], abs=1e-7)
    assert predict("--lines", stdin=b"").out == b""


def test_a_line_that_is_too_long_is_named(predict: Run) -> None:
    done = predict("--lines", "--json", stdin=b"a\n" + b"x" * 70 + b"\n")
    assert done.code == 4
    assert json.loads(done.err)["error"]["message"].startswith("line 2: ")


# --- What is refused


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("-t", "-1"), "temperature -1.0"),
        (("-t", "nan"), "temperature nan"),
        (("-t", "inf"), "temperature inf"),
        (("-t", "1,2,x"), "'x' is not a number"),
        (("-t", ""), "'' is not a number"),
        (("--top", "0"), "--top 0"),
        (("--winner",), "--choose"),
        (("--per-token",), "--choose"),
        (("--choose", "a", "--choose", ""), "empty"),
        (("--choose", "a", "--choose", "b", "--choose", "a"), "'a' was given twice"),
        (("--choose", "a", "-t", "1,2"), "temperature 1"),
        (("--choose", "a", "-t", "0.5"), "temperature 1"),
        (("--choose", "a\n", "--winner", "--lines"), "--json"),
        (("--special", "maybe"), "--special"),
        (("--truncate-prompt", "right"), "--truncate-prompt"),
    ],
)
def test_wrong_use_is_told_before_a_model_is_looked_for(run: Run, args: Sequence[str], told: str) -> None:
    done = run("predict", "-m", "no-such-model", "x", *args)
    assert (done.code, done.out) == (2, b"")
    assert told in done.err.decode()
    assert done.err.decode().splitlines()[1].startswith("hint: ")


def test_wrong_use_does_not_wait_for_torch() -> None:
    code = "import sys; from gptcli.cli import main; print(main(['predict', 'x', '-t', '-1']), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE
    )
    assert done.stdout.split() == [b"2", b"False"]


def test_a_temperature_that_is_set_for_all_commands_does_not_hinder_choices(
    predict: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_TEMPERATURE", "0.7")
    assert good(predict(TEXT, "--json"))["temperature"] == 0.7
    assert good(predict(TEXT, "--json", "--choose", "a"))["temperature"] == 1
    monkeypatch.setenv("GPTCLI_TEMPERATURE", "0.5,2")
    assert len(good(predict(TEXT, "--json"))["temperatures"]) == 2


# --- On a terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Callable[..., str]:
    """``gptcli predict`` with a terminal of so many columns for stdout; what it showed."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def call(columns: int, *args: str) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        screen = Screen()
        with os.fdopen(os.dup(screen.secondary), "w", encoding="utf-8") as stdout, Path(os.devnull).open() as stdin:
            monkeypatch.setattr(sys, "stdout", stdout)
            monkeypatch.setattr(sys, "stdin", stdin)
            code = main(["predict", "-m", str(tiny_folder), "--dtype", "float32", *args])
        monkeypatch.setattr(sys, "stdout", sys.__stdout__)
        shown = screen.close()
        assert code == 0
        return shown

    return call


def length(line: str) -> int:
    """Of the bars in a line, in eighths of a cell."""
    return sum(8 if char == "█" else "▏▎▍▌▋▊▉".find(char) + 1 for char in line)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(
    "args", [(), ("-t", "0.01,1,2"), ("-t", "0,0.01,0.5,1,2,5"), ("--choose", " the", "--choose", "z" * 20)]
)
def test_bars_stay_within_the_terminal(terminal: Callable[..., str], columns: int, args: Sequence[str]) -> None:
    shown = plain(terminal(columns, "Once upon a time " * 3, *args))
    widths = list(map(len, shown.splitlines()))
    assert max(widths) <= columns
    assert "█" in shown
    assert all(line == line.rstrip() for line in shown.splitlines())
    if columns == 200 and not args:
        assert max(widths) > 80  # room is used


def test_the_longest_bar_is_the_likeliest_token(terminal: Callable[..., str], predict: Run) -> None:
    value = good(predict(TEXT, "--json", "-t", "0.1"))
    title, header, *tokens, others, entropy = plain(terminal(80, TEXT, "-t", "0.1")).splitlines()
    assert title == f'tiny after "{TEXT}"'
    assert header.split() == ["T", "=", "0.1"]
    lengths = list(map(length, tokens))
    assert len(tokens) == 10
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[1] > 0
    assert len(tokens[0]) == 80  # it takes all the room
    for line, each in zip(tokens, value["top"], strict=True):
        share = each["probability"] / value["top"][0]["probability"]
        assert abs(length(line) - share * lengths[0]) <= 1
        assert f"{100 * each['probability']:.4f} %" in line
    assert f"{VOCABULARY - 10} others" in others
    assert f"{100 * value['others']:.4f} %" in others
    assert f"{value['entropy_bits']:.4f} bits" in entropy
    assert length(others) == length(entropy) == 0


def test_temperatures_stand_side_by_side_where_they_fit_and_in_turn_where_not(terminal: Callable[..., str]) -> None:
    wide, narrow = (plain(terminal(columns, TEXT, "-t", "0.01,1,2")) for columns in (80, 40))
    assert wide.splitlines()[1].split() == ["T", "=", "0.01", "T", "=", "1", "T", "=", "2"]
    assert len(wide.splitlines()) == 1 + 13
    assert [line.split() for line in narrow.splitlines() if "T =" in line] == [
        ["T", "=", number] for number in ("0.01", "1", "2")
    ]
    assert len(narrow.splitlines()) == 1 + 3 * 13 + 2
    for token in good_tokens(wide):
        assert narrow.count(token) >= 3


def good_tokens(shown: str) -> list[str]:
    return [line.split("  ")[0] for line in shown.splitlines() if line.startswith('"')]


def test_no_colour_where_none_is_wanted(
    terminal: Callable[..., str], predict: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    coloured = terminal(80, TEXT)
    assert ESCAPE.search(coloured)
    assert "\x1b" not in predict(TEXT).out.decode()
    assert "█" not in predict(TEXT).out.decode()
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal(80, TEXT) == plain(coloured)


def test_a_prompt_can_not_drive_the_terminal(terminal: Callable[..., str]) -> None:
    shown = terminal(80, "a\x1b[2J\nb", "--choose", "\x1b]", "--color", "never")
    assert "\x1b" not in shown
    assert 'after "a\\x1b[2J\\nb"' in shown
    assert '"\\x1b]"' in shown


def test_choices_on_a_terminal_keep_their_order(terminal: Callable[..., str]) -> None:
    lines = plain(terminal(80, TEXT, "--choose", " the king", "--choose", "z")).splitlines()
    assert lines[1].startswith('" the king"')
    assert lines[2].startswith('"z"')
    assert length(lines[1]) < length(lines[2])
    assert "nats, 1 token" in lines[2]


def flat(probability: float) -> Distribution:
    return Distribution(1.0, 3.0, tuple(Candidate(id_, 0.0, probability) for id_ in range(3)), 0.0)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_wide_characters_and_long_tokens_keep_their_columns(columns: int) -> None:
    from rich.cells import cell_len

    names = ['"東京"', '"' + "=" * 90 + '"', '" a"']
    lines = predict_bars.distributions([flat(0.3)] * 2, names, 7, columns, lambda text, mark: text).splitlines()
    assert all(cell_len(line) <= columns for line in lines)
    assert len({cell_len(line.partition("30.0000 %")[0]) for line in lines[1:4]}) == 1
    assert "…" in lines[2]


@pytest.mark.parametrize(
    ("probability", "shown"),
    [(1.0, "100.0000 %"), (0.0, "0.0000 %"), (0.123456789, "12.3457 %"), (2e-6, "0.0002 %"), (3e-9, "3.0e-07 %")],
)
def test_percent_never_says_nothing_of_something(probability: float, shown: str) -> None:
    assert predict_bars.percent(probability) == shown


@pytest.mark.parametrize(("prompt", "columns"), [("x" * 500, 80), ("東" * 300, 80), ("東" * 300, 81), ("x\n" * 90, 40)])
def test_a_long_prompt_shows_its_end(prompt: str, columns: int) -> None:
    from rich.cells import cell_len

    shown = "".join(predict_bars.title("tiny", prompt, columns))
    assert columns - 2 <= cell_len(shown) <= columns
    assert shown.startswith("tiny after …")
    assert shown.endswith(prompt[-1].replace("\n", "\\n") + '"')
