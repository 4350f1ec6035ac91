"""``gptcli score``: coloured text, rows, lines, totals, JSON, and the numbers in them."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gptcli.cli.shade import HEAT
from gptcli.core.build import open_model
from gptcli.core.score import score_slowly
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Run
from tests.cli.test_reviewed import on_terminal
from tests.cli.training import TEXT
from tests.conftest import PATIENCE, ROOT

FIELDS = {
    *("model", "tokens", "total_bits", "bits_per_byte", "perplexity", "tokens_scored", "bytes"),
    *("documents", "stride", "device", "dtype", "quantize"),
}
STORY = "Once upon a time there was a king who had a daughter. " * 5
SEPARATOR = "<|endoftext|>"
ODD = "naïve café, 北京 🐉\n\n\tTabs and  spaces \r\nÅ, e\u0301 — 👩‍👧\n"


@pytest.fixture
def score(run: Run, tiny_folder: Path) -> Run:
    """``gptcli score`` with the tiny model in float32."""
    return lambda *args, **more: run("score", "-m", tiny_folder, "--dtype", "float32", *args, **more)


def objects(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def rows(done: Done) -> list[list[str]]:
    assert done.code == 0, done.err
    return [line.split("\t") for line in done.out.decode().removesuffix("\n").split("\n")]


def plain(shown: bytes) -> bytes:
    """Without colours."""
    return re.sub(rb"\x1b\[[0-9;]*m", b"", shown)


def slowly(folder: Path, text: str, stride: int | None = None) -> list[float]:
    model = open_model(folder, Tokenizer.from_folder(folder), device="cpu", dtype="float32")
    return [bits for bits in score_slowly(model, model.tokenizer.encode(text), stride) if bits is not None]


# --- JSON, and the numbers


@pytest.mark.parametrize("stride", [None, 10, 64])
def test_json_has_the_fields_of_the_contract_and_the_twins_numbers(
    score: Run, tiny_folder: Path, stride: int | None
) -> None:
    (told,) = objects(score(STORY, "--json", *(["--stride", str(stride)] if stride else [])))
    assert told.keys() == FIELDS
    assert (told["model"], told["device"], told["dtype"], told["stride"]) == ("tiny", "cpu", "float32", stride or 32)
    words = Tokenizer.from_folder(tiny_folder)
    assert [token["id"] for token in told["tokens"]] == words.encode(STORY)
    assert "".join(token["text"] for token in told["tokens"]) == STORY
    bits = [token["bits"] for token in told["tokens"]]
    assert bits == pytest.approx(slowly(tiny_folder, STORY, stride), rel=1e-5)
    assert told["total_bits"] == pytest.approx(sum(bits))
    assert (told["tokens_scored"], told["bytes"], told["documents"]) == (len(bits), len(STORY), 1)
    assert told["bits_per_byte"] == told["total_bits"] / told["bytes"]
    assert told["perplexity"] == pytest.approx(2 ** (told["total_bits"] / told["tokens_scored"]))


def test_separators_part_documents_and_count_in_nothing(score: Run, tiny_folder: Path) -> None:
    parts = ["Once upon a time", "\nthere was\n\na king", "x"]
    text = f"\n{SEPARATOR}\n".join(parts) + f"\n{SEPARATOR}\n \n{SEPARATOR}\n\n"
    (told,) = objects(score("--json", stdin=text.encode()))
    assert told["documents"] == 3
    assert told["bytes"] == sum(map(len, parts))
    assert "".join(token["text"] for token in told["tokens"]) == "".join(parts)
    expected = [bits for part in parts for bits in slowly(tiny_folder, part)]
    assert [token["bits"] for token in told["tokens"]] == pytest.approx(expected, rel=1e-5)


def test_a_separator_within_a_line_is_text_unless_parsed(score: Run) -> None:
    text = f"a {SEPARATOR} b"
    (as_text,), (parsed,) = (objects(score(text, "--json", "--special", how)) for how in ("text", "parse"))
    assert as_text["documents"] == parsed["documents"] == 1
    assert as_text["bytes"] == parsed["bytes"] == len(text)
    assert 0 not in [token["id"] for token in as_text["tokens"]]
    assert 0 in [token["id"] for token in parsed["tokens"]]


def test_the_last_newline_counts_unless_stripped(score: Run) -> None:
    (whole,), (stripped,) = (objects(score("--json", *more, stdin=b"a king\n")) for more in ([], ["--strip"]))
    assert (whole["bytes"], stripped["bytes"]) == (7, 6)
    assert whole["tokens"][:-1] == stripped["tokens"]


@pytest.mark.parametrize("text", [b"", f"{SEPARATOR}\n".encode()])
def test_nothing_to_score_is_told_as_nothing(score: Run, text: bytes) -> None:
    (told,) = objects(score("--json", stdin=text))
    assert (told["tokens"], told["total_bits"], told["tokens_scored"], told["bytes"]) == ([], 0.0, 0, 0)
    assert told["bits_per_byte"] is told["perplexity"] is None
    assert score("--color", "always", stdin=text).out == text
    assert rows(score("--total", stdin=text)) == [["0.000", "-", "-", "0", "0", "stdin"]]


def test_without_a_start_token_the_first_token_has_no_score(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "startless"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "bos_token_id": None}))
    common = ("score", "-m", folder, "--dtype", "float32")
    text = f"a king\n{SEPARATOR}\nx\n{SEPARATOR}\nwho had"
    (told,) = objects(run(*common, "--json", text))
    bits = [token["bits"] for token in told["tokens"]]
    assert bits.count(None) == told["documents"] == 3
    assert bits[0] is None
    assert told["tokens_scored"] == len(bits) - 3
    assert told["bytes"] == len("a kingxwho had")
    assert rows(run(*common, text))[0][0] == "-"
    assert rows(run(*common, "--lines", "x"))[0] == ["0.000", "-", "x"]
    assert plain(run(*common, "--color", "always", text).out) == text.encode()


def test_several_sources_have_an_object_each_and_a_total(score: Run, tmp_path: Path) -> None:
    for name, text in (("a", "a king"), ("empty", f"{SEPARATOR}\n"), ("b", "who had")):
        (tmp_path / name).write_text(text)
    files = [arg for name in ("a", "empty", "b") for arg in ("-f", tmp_path / name)]
    told = objects(score("--json", *files, "x", stdin=b"once"))
    names = ["stdin", *(str(tmp_path / name) for name in ("a", "empty", "b")), "argument 1"]
    assert [value["name"] for value in told] == names
    assert [value["documents"] for value in told] == [1, 1, 0, 1, 1]
    totals = objects(score("--json", "--total", *files, "x", stdin=b"once"))
    assert [value["name"] for value in totals] == [*names, "total"]
    assert [value["total_bits"] for value in totals[:-1]] == [value["total_bits"] for value in told]
    assert totals[-1]["total_bits"] == pytest.approx(sum(value["total_bits"] for value in told))
    assert "tokens" not in totals[0]
    table = rows(score("--total", *files, "x", stdin=b"once"))
    assert [row[-1] for row in table] == [*names, "total"]
    assert [float(row[0]) for row in table] == pytest.approx([value["total_bits"] for value in totals], abs=1e-3)
    assert [int(row[4]) for row in table] == [value["bytes"] for value in totals]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_of_train_is_what_score_says_of_the_saved_model(
    train: Run, run: Run, text: Path, tmp_path: Path, dtype: str
) -> None:
    """Two texts, one of them of documents far longer than the context."""
    long = tmp_path / "long.txt"
    long.write_text(f"\n{SEPARATOR}\n".join((TEXT[n:] * 3).replace(SEPARATOR, "") for n in (0, 40)))
    done = train(
        text, "--valid", text, "--valid", long, "--steps", "3", "--lr", "0.05", "--seed", "1", "--dtype", dtype
    )
    (event,) = [event for event in objects(done) if event["event"] == "eval"]
    common = ("score", "-m", tmp_path / "out", "--json", "--total", "--stride", "16", "--dtype", dtype)
    told = objects(run(*common, "-f", text, "-f", long))
    tolerance = 1e-6 if dtype == "float32" else 2e-3
    valid = [event["valid"]["text"], event["valid"]["long"], event["bits_per_byte"]]
    assert [value["bits_per_byte"] for value in told] == pytest.approx(valid, rel=tolerance)
    assert math.log(told[-1]["perplexity"]) == pytest.approx(event["loss"], rel=tolerance)


# --- Text


@pytest.mark.parametrize("text", [STORY, ODD, ODD + "\x00\x07", f"a\n{SEPARATOR}\n\n{SEPARATOR}\nb\n", "🐉"])
def test_the_coloured_text_without_its_colours_is_the_input(score: Run, text: str) -> None:
    done = score("--color", "always", stdin=text.encode())
    assert done.code == 0
    assert done.out != text.encode()
    assert plain(done.out) == text.encode()
    done.out.decode()  # no escape stands within a character


def test_several_documents_are_shown_as_they_stand(score: Run, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"a king\n{SEPARATOR}\n")
    done = score("--color", "always", "-f", tmp_path / "a", " had", stdin=f"\n{SEPARATOR}\nonce\n".encode())
    assert plain(done.out) == f"\n{SEPARATOR}\nonce\na king\n{SEPARATOR}\n had".encode()


def test_the_more_surprising_a_token_the_stronger_its_colour(run: Run) -> None:
    done = run("score", "--color", "always", "Once upon a time there was a zygote", "--dtype", "float32")
    assert done.out.startswith(b"Once upon a time")  # a chance of one in four, and better, has no colour
    shades = [int(shade) for shade in re.findall(rb"48;5;(\d+);", done.out[done.out.index(b" a") :])]
    assert [background for background, _ in HEAT].index(shades[-1]) >= 4  # the last piece of the word
    assert b"perplexity" in done.err
    assert b"48;5;88" in done.err  # the legend
    assert run("score", "--color", "always", "-q", "Once").err == b""


def test_on_a_terminal_the_legend_and_the_totals_follow_the_text(tiny_folder: Path) -> None:
    shown = on_terminal("score", "-m", tiny_folder, "Once\x1b[2J upon 🐉")
    text, legend, totals = plain(shown).decode().splitlines()
    assert text == "Once\\x1b[2J upon 🐉"
    assert legend.split() == ["bits", "a", "token:", "less", "2", "4", "6", "8", "10", "12", "14", "16+"]
    assert len(legend) < 80
    assert re.fullmatch(r"[\d.]+ bits in \d+ tokens, 18 bytes: [\d.]+ bits a byte, perplexity [\d.,]+", totals)
    assert b"\x1b" in shown


def test_in_a_pipe_each_token_has_a_line(score: Run) -> None:
    (told,) = objects(score(ODD, "--json"))
    done = score(ODD)
    assert done.err == b""
    table = rows(done)
    assert [float(row[0]) for row in table] == pytest.approx([token["bits"] for token in told["tokens"]], abs=1e-3)
    assert all(len(row) == 2 for row in table)
    assert rows(score("a\nb"))[1][1] == "\\n"


# --- Lines


LINES = b"Once upon a time there was a king.\nzq\x07\xc3\xa9 jx\tQQ\r\n\n<|endoftext|>\nwho had a daughter"


def test_each_line_is_a_document_with_a_row(score: Run, tiny_folder: Path) -> None:
    lines = LINES.decode().split("\n")
    table = [row.split("\t", 2) for row in score("--lines", stdin=LINES).out.decode().split("\n")]
    assert table.pop() == [""]
    assert [row[2] for row in table] == lines
    for bits, rate, line in table:
        expected = sum(slowly(tiny_folder, line)) if line not in ("", SEPARATOR) else 0
        assert float(bits) == pytest.approx(expected, abs=2e-3)
        assert rate == "-" if not expected else float(rate) == pytest.approx(expected / len(line.encode()), abs=1e-3)


def test_lines_in_json(score: Run) -> None:
    told = objects(score("--lines", "--json", stdin=LINES))
    assert [value["line"] for value in told] == [1, 2, 3, 4, 5]
    assert [value["text"] for value in told] == LINES.decode().split("\n")
    assert all(value.keys() == FIELDS | {"line", "text"} for value in told)
    assert told[2]["tokens"] == told[3]["tokens"] == []
    assert told[0]["total_bits"] == pytest.approx(sum(token["bits"] for token in told[0]["tokens"]))
    (whole,) = objects(score("--lines", "--json", "--total", stdin=LINES))
    assert whole["total_bits"] == pytest.approx(sum(value["total_bits"] for value in told))
    assert (whole["documents"], whole["bytes"]) == (5, sum(value["bytes"] for value in told))


def test_above_keeps_odd_lines_byte_for_byte(score: Run) -> None:
    table = [line.split(b"\t", 2) for line in score("--lines", stdin=LINES).out.split(b"\n") if line]
    rates = [float(rate) for _, rate, _ in table if rate != b"-"]
    lines = [line for line in LINES.splitlines(keepends=True) if line.strip() not in (b"", b"<|endoftext|>")]
    assert len(rates) == len(lines) == 3
    bound = sorted(rates)[1]
    done = score("--above", str(bound + 1e-3), stdin=LINES)
    assert done.out == lines[rates.index(max(rates))]
    assert score("--above", "0", stdin=LINES).out == b"".join(lines)
    assert score("--above", "1e9", stdin=LINES) == Done(0, b"", b"")
    assert len(score("--above", str(bound + 1e-3), "--lines", stdin=LINES).out.split(b"\t", 2)) == 3
    assert [value["line"] for value in objects(score("--above", "0", "--json", stdin=LINES))] == [1, 2, 5]
    assert plain(score("--above", "0", "--color", "always", stdin=LINES).out) == b"".join(lines)


def test_a_line_is_answered_before_the_next_one_comes(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "gptcli", "score", "--lines", "-m", str(tiny_folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in (b"Once\n", b"upon\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\t" + line)
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0


# --- Wrong use, and Ctrl-C


@pytest.mark.parametrize(
    "args",
    [
        ("x", "--stride", "0"),
        ("x", "--stride", "65"),
        ("x", "--total", "--above", "3"),
        ("x", "--above", "nan"),
        ("x", "--batch-tokens", "0"),
        ("x", "--special", "no"),
        (),
    ],
)
def test_wrong_use(score: Run, args: tuple[str, ...]) -> None:
    done = score(*args)
    assert done.code == 2
    assert done.out == b""
    assert done.err.startswith(b"error: ")
    assert b"\nhint: " in done.err


def test_bad_bytes_and_missing_files_are_told(score: Run, tmp_path: Path) -> None:
    assert score(stdin=b"a\xff").code == 3
    assert score("--errors", "replace", "--color", "always", stdin=b"a\xff").code == 0
    assert score("-f", tmp_path / "none").code == 3


@pytest.mark.parametrize("more", [("--json",), ("--color", "always"), ("--total",)])
def test_ctrl_c_keeps_what_was_made(tiny_folder: Path, more: tuple[str, ...]) -> None:
    """The text never ends; the signal goes out when there is some output, or much was read."""
    command = [sys.executable, "-m", "gptcli", "score", "-v", "-m", str(tiny_folder), *more]
    text, given = os.pipe()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0
    )
    os.close(text)
    much = threading.Event()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(given, "wb", buffering=0) as pipe:
            for number in itertools.count():
                pipe.write(b"Once upon a time\n" * 1000)
                if number == 20:  # several times what a pipe holds
                    much.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert process.stdout is not None
    assert process.stderr is not None
    assert b"tiny from" in process.stderr.readline()
    begin = process.stdout.read(100) if more != ("--total",) else b""
    assert begin or much.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    writer.join(PATIENCE)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if more == ("--json",):
        told = json.loads(begin + out)
        assert told["tokens_scored"] == len(told["tokens"]) > 0
        assert told["bytes"] == len("".join(token["text"] for token in told["tokens"]))


def test_a_reader_that_leaves_ends_it_quietly(tiny_folder: Path) -> None:
    script = f"yes 'Once upon a time' | {sys.executable} -m gptcli score -m {tiny_folder} --lines | head -1"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE
    )
    assert done.stdout.endswith(b"Once upon a time\n")
    assert done.stderr == b""


def test_fewer_bits_a_weight_cost_some_bits_a_byte(run: Run) -> None:
    """On fable and a text of its kind: int8 next to nothing, int4 little."""
    text = "Once upon a time there was a little girl who lived in a small house near the forest with her mother. " * 2
    bits = {}
    for kind in ("none", "int8", "int4"):
        told = run("score", text, "--json", "--total", "--quantize", kind, "--dtype", "float32").json
        assert told["quantize"] == kind
        bits[kind] = told["bits_per_byte"]
    assert bits["int8"] != bits["none"]
    assert bits["int8"] == pytest.approx(bits["none"], rel=0.02)
    assert bits["int4"] == pytest.approx(bits["none"], rel=0.15)
