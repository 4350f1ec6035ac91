"""``gptcli trace``: the numbers it shows are the model's, and a person can read them wherever they are shown."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gptcli.cli
from gptcli.cli.cells import cells
from gptcli.cli.tokens import quoted
from gptcli.core.build import Model, open_model, random_model
from gptcli.core.predict import distribution, next_logits
from gptcli.core.trace import Trace
from gptcli.errors import OutputError
from gptcli.spec.config import ModelConfig
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Run
from tests.cli.test_terminal import ESCAPE, Screen, Terminal, plain, terminal  # noqa: F401
from tests.conftest import PATIENCE, ROOT, Gptcli

FABLE = ROOT / "weights" / "fable"
PROMPT = "The cat sat on the"
LONG = " ".join(["The old king had three sons, and the youngest was called the fool."] * 7)
VIEWS: list[tuple[str, ...]] = [
    (),
    ("-t", "0"),
    ("--lens",),
    ("--attention",),
    ("--attention", "--layer", "1"),
    ("--attention", "--layer", "1", "--head", "3"),
    ("--layer", "1"),
    ("--layer", "0", "--head", "2"),
    ("--stages",),
]
Other = Callable[..., Model]


@pytest.fixture
def other(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Other:
    """Let the command open a random model of other axes than those that GPT-2's family has on disk."""

    def open_(**axes: Any) -> Model:
        base = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), dtype="float32")
        config = replace(base.config, **axes)
        made = replace(base, config=config, transformer=random_model(config, seed=3).eval())
        monkeypatch.setattr("gptcli.cli.opening.open_for_inference", lambda *args, **options: made)
        return made

    return open_


def sizes_of(config: ModelConfig, tokens: int) -> dict[str, int]:
    return {
        **{"B": 1, "T": tokens, "S": tokens, "C": config.width, "H": config.heads, "K": config.kv_heads},
        **{"D": config.head_dim, "F": config.mlp_width, "V": config.vocab_size},
    }


def lines_of(shown: str) -> list[str]:
    return plain(shown).splitlines()


# --- The numbers


def test_stages_hold_what_a_plain_forward_gives(run: Run) -> None:
    told = run("trace", PROMPT, "--json", "--dtype", "float32", "--seed", "1", "--top", "7").json
    model = open_model(FABLE, Tokenizer.from_folder(FABLE), dtype="float32")
    ids = model.tokenizer.encode(PROMPT)
    seen: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        model.transformer(torch.tensor([ids]), tap=seen.__setitem__)
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert list(stages) == ["tokens", *seen, "probabilities", "draw"]
    for name, value in seen.items():
        assert stages[name]["shape"] == list(value.shape)
        assert stages[name]["dtype"] == "float32"
        summary = stages[name]["summary"]
        if "vector" in summary:
            assert summary["vector"] == pytest.approx(value[0, -1, :8].tolist(), rel=1e-5, abs=1e-6)
            assert summary["norms"] == pytest.approx(value[0].norm(dim=-1).tolist(), rel=1e-5)
    found = distribution(next_logits(model, ids), 1.0, 7)
    assert told["next"]["tokens"] == stages["tokens"]["summary"]["ids"] == ids
    assert told["next"]["entropy_bits"] == pytest.approx(found.entropy_bits, rel=1e-4)
    assert [one["id"] for one in told["next"]["top"]] == [one.id for one in found.top]
    for one, expected in zip(told["next"]["top"], found.top, strict=True):
        assert one["probability"] == pytest.approx(expected.probability, rel=1e-4)
        assert one["logit"] == pytest.approx(expected.logit, rel=1e-4)
        assert one["text"] == model.tokenizer.decode([expected.id])


@pytest.mark.parametrize("temperature", ["0", "0.7", "1"])
def test_it_draws_what_generate_draws(run: Run, temperature: str) -> None:
    common = (PROMPT, "--json", "--dtype", "float32", "--seed", "11", "-t", temperature, "-n", "3")
    told = run("trace", *common).json
    made = run("generate", *common).json
    drawn = [told["drawn"], *(one["drawn"] for one in told["then"])]
    assert [one["id"] for one in drawn] == made["tokens"]
    assert "".join(one["text"] for one in drawn) == made["text"]
    assert told["seed"] == made["seed"] == 11
    for one, before in zip(told["then"], drawn, strict=False):
        assert one["tokens"][-1] == before["id"]
    ranks = {one["id"]: rank for rank, one in enumerate(told["next"]["top"])}
    assert ranks.get(drawn[0]["id"], drawn[0]["rank"]) == drawn[0]["rank"]


def test_attention_rows_sum_to_1_and_the_mean_is_that_of_all_heads(run: Run, tiny_folder: Path) -> None:
    common = ("trace", "Once upon", "-m", tiny_folder, "--json", "--attention")
    heads = [
        run(*common, "--layer", str(layer), "--head", str(head)).json["attention"]
        for layer in range(2)
        for head in range(4)
    ]
    every = torch.tensor([head["weights"] for head in heads])
    assert torch.allclose(every.sum(-1), torch.ones(8, every.shape[1]), atol=1e-5)
    assert not torch.triu(every, 1).any()
    first = run(*common, "--layer", "0").json["attention"]
    assert (first["layer"], first["head"]) == (0, None)
    assert torch.allclose(torch.tensor(first["weights"]), every[:4].mean(0), atol=1e-6)
    assert torch.allclose(torch.tensor(run(*common).json["attention"]["weights"]), every.mean(0), atol=1e-6)


def test_the_mean_of_all_heads_is_the_same_in_several_passes(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("trace", "Once upon", "-m", tiny_folder, "--json", "--attention", "-n", "1", "--seed", "1")
    once = run(*common).json
    monkeypatch.setattr("gptcli.cli.trace._KEPT_AT_ONCE", 1)
    assert run(*common).json == once


def test_the_lens_ends_in_the_model_s_own_prediction(run: Run) -> None:
    told = run("trace", PROMPT, "--json", "--lens", "--dtype", "float32").json
    rows = told["lens"]
    assert [row["name"] for row in rows] == ["positions", *(f"blocks.{layer}" for layer in range(6))]
    assert {len(row["guesses"]) for row in rows} == {5}
    last, best = rows[-1]["guesses"][-1], told["next"]["top"][0]
    assert (last["id"], last["text"]) == (best["id"], best["text"])
    assert last["probability"] == pytest.approx(best["probability"], rel=1e-4)


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"position": "rope"},
        {"kv_heads": 2},
        {"kv_heads": 1, "position": "rope", "norm": "rmsnorm", "activation": "silu", "gated": True},
        {"heads": 1, "kv_heads": 1, "head_dim": 32, "layers": 9},
    ],
    ids=str,
)
def test_symbols_resolve_to_the_shapes(run: Run, other: Other, terminal: Terminal, axes: dict[str, Any]) -> None:  # noqa: F811
    config = other(**axes).config
    told = run("trace", "Once upon a time", "--json", "--lens", "--attention").json
    sizes = sizes_of(config, len(told["next"]["tokens"]))
    for stage in told["stages"]:
        assert [sizes[letter] for letter in stage["symbols"].split()] == stage["shape"], stage["name"]
    for view in VIEWS:
        if config.heads > 1 or "--head" not in view:
            assert terminal("trace", "Once upon a time", *view).code == 0
    shown = plain(terminal("trace", "Once upon a time", "--stages").out)
    for stage in told["stages"]:
        told_sizes = " ".join(f"{letter}={sizes[letter]}" for letter in stage["symbols"].split())
        assert f"[{told_sizes}]" in shown


# --- The views


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(
    "prompt", [PROMPT, LONG, "東京 is\n\ta \x1b[31m place 🙂", ""], ids=["short", "long", "odd", "empty"]
)
def test_no_line_is_wider_than_the_terminal(
    terminal: Terminal,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    prompt: str,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for number, view in enumerate(VIEWS):
        color = "always" if number % 2 == (columns == 80) else "never"  # both, over the two widths
        shown = terminal("trace", prompt, *view, "--seed", "5", "--color", color)
        assert shown.code == 0
        assert max(map(cells, lines_of(shown.out))) <= columns, view
        assert "\x1b" not in plain(shown.out)
        if not view:
            assert len(lines_of(shown.out)) <= 45


def test_the_view_names_the_lecture_s_stages_with_the_numbers_of_the_json(
    run: Run,
    terminal: Terminal,  # noqa: F811
) -> None:
    command = ("trace", PROMPT, "--seed", "1", "--dtype", "float32")
    told, shown = run(*command, "--json").json, plain(terminal(*command).out)
    names = ["Tokens", "Embedding", "Positions", "6 blocks", "Block 0", "Block 5", "Last vector", "Logits"]
    places = [shown.index(f"\n{name}") for name in [*names, "Softmax", "Draw", "And again", "So far"]]
    assert places == sorted(places)
    for id_ in told["next"]["tokens"]:
        assert re.search(rf"\b{id_}\b", shown)
    for stage in told["stages"]:
        if re.fullmatch(r"blocks\.\d\.(attention|mlp)", stage["name"]):
            length = stage["summary"]["norms"][-1]
            assert (f" {length:.2f} " if length < 10 else f" {length:.1f} ") in shown
    best = told["next"]["top"][0]
    assert re.search(rf'"{best["text"]}" +{best["logit"]:.2f} +{100 * best["probability"]:.0f}% █', shown)
    assert f'"{told["drawn"]["text"]}" is drawn' in shown
    every = [told["drawn"], *(one["drawn"] for one in told["then"])]
    assert shown.endswith(f"So far       {PROMPT}{''.join(one['text'] for one in every)}\n")


def test_of_many_blocks_those_are_shown_that_turn_the_vector_most(run: Run, other: Other) -> None:
    other(layers=9)
    told = run("trace", "Once upon", "--seed", "1", "--json").json
    turns = {
        int(stage["name"][7:]): stage["summary"]["turned_degrees"][-1]
        for stage in told["stages"]
        if re.fullmatch(r"blocks\.\d", stage["name"])
    }
    shown = run("trace", "Once upon", "--seed", "1").out.decode()
    found = [int(layer) for layer in re.findall(r"^Block (\d)", shown, flags=re.MULTILINE)]
    assert found == sorted(sorted(turns, key=lambda layer: -turns[layer])[:6])
    assert "the 6 of 9 that turn it most" in shown


def test_a_pipe_gets_plain_text_with_nothing_cut(run: Run, gptcli: Gptcli) -> None:
    for view in VIEWS:
        out = run("trace", LONG, *view, "--seed", "1").out.decode()
        assert "\x1b" not in out
        assert "not shown" not in out
        assert "are shown" not in out
    piped = run("trace", PROMPT, "--attention").out.decode().splitlines()
    assert [line.split()[0] for line in piped[3:8]] == ["1", "2", "3", "4", "5"]
    done = subprocess.run(
        f"{sys.executable} -m gptcli trace '{PROMPT}' --stages | head -1",
        shell=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"fable: 6 blocks")


def test_no_color_has_no_escapes(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert ESCAPE.search(terminal("trace", PROMPT, "--lens").out)
    monkeypatch.setenv("NO_COLOR", "1")
    for view in VIEWS:
        assert "\x1b" not in terminal("trace", PROMPT, *view).out


def test_the_heat_map_has_a_row_and_a_column_for_each_token(terminal: Terminal, run: Run) -> None:  # noqa: F811
    command = ("trace", PROMPT, "--attention", "--layer", "3", "--head", "3")
    weights = run(*command, "--json").json["attention"]["weights"]
    shown = lines_of(terminal(*command).out)
    (at,) = [
        place
        for place, line in enumerate(shown)
        if line.split() == ['"The"', '"', 'cat"', '"', 'sat"', '"', 'on"', '"', 'the"']
    ]
    for place, (name, row) in enumerate(zip(["The", " cat", " sat", " on", " the"], weights, strict=True)):
        line = shown[at + 1 + place]
        assert line.startswith(f'{place + 1} "{name}"')
        percents = [0 if word == "." else int(word) for word in line.split('"')[-1].split()]
        assert percents == [round(100 * weight) for weight in row[: place + 1]]


@pytest.mark.parametrize(("columns", "unit"), [(60, "tenths"), (200, "percent"), (40, "tenths")])
def test_a_heat_map_of_many_tokens_shows_the_last_ones_and_sums_up_the_rest(
    terminal: Terminal,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    unit: str,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    prompt = LONG if columns == 40 else LONG[: LONG.index(".") + 1]
    shown = plain(terminal("trace", prompt, "--attention").out)
    words = re.sub(r"\s+", " ", shown)
    assert f"In {unit}" in words
    assert ("sums up what goes to the others" in words) == (columns == 40)
    if columns == 40:
        rows = re.findall(r'^ *(\d+) "[^"]*" +(\d+|\.)', shown, flags=re.MULTILINE)
        assert len(rows) < len(re.findall(r"\w+", prompt))
        assert f"The last {len(rows)} of {rows[-1][0]} tokens are shown" in words


def test_long_prompts_show_the_last_positions_of_the_lens(terminal: Terminal) -> None:  # noqa: F811
    shown = plain(terminal("trace", LONG, "--lens").out)
    found = re.search(r"The last (\d+) of (\d+) tokens are shown", shown)
    assert found is not None
    assert int(found[1]) < int(found[2])
    assert "The last row is the model's own prediction" in shown


# --- What is asked


def test_wrong_use_is_told(run: Run, tiny_folder: Path) -> None:
    for args, code in (
        (("x", "--top", "0"), 2),
        (("x", "-n", "0"), 2),
        (("x", "--head", "0"), 2),
        (("x", "--layer", "2"), 2),
        (("x", "--layer", "-1"), 2),
        (("x", "--layer", "0", "--head", "4"), 2),
        (("x", "-t", "-1"), 2),
        (("x", "--seed", "-1"), 2),
        (("x", "--special", "bogus"), 2),
        (("x", "--step"), 2),
        (("x", "--step", "--json"), 2),
        ((), 2),
        (("a b " * 100,), 4),
    ):
        done = run("trace", *args, "-m", tiny_folder)
        assert (done.code, done.out) == (code, b""), args
        assert b"error" in done.err
        assert b"hint" in done.err


def test_a_prompt_that_is_too_long_can_be_cut(run: Run, tiny_folder: Path) -> None:
    done = run("trace", "abcdefgh" * 20, "-m", tiny_folder, "--truncate-prompt", "left", "--json", "--seed", "1")
    assert b"were cut off" in done.err
    assert len(done.json["next"]["tokens"]) == 61
    assert len(done.json["then"]) == 3


def test_it_ends_with_the_context(run: Run, tiny_folder: Path) -> None:
    full = run("trace", "~" * 63, "-m", tiny_folder, "--json", "--seed", "1", "-n", "9")
    assert len(full.json["next"]["tokens"]) == 63
    assert len(full.json["then"]) == 1
    assert b"the context is full" in full.err


def test_it_ends_with_the_text(run: Run, other: Other) -> None:
    model = other()
    first = run("trace", "Once", "-t", "0", "-n", "1", "--json").json["drawn"]["id"]
    other(eos_ids=(first,))
    command = ("trace", "Once", "-t", "0", "-n", "5")
    assert run(*command, "--json").json["then"] == []
    shown = run(*command).out.decode()
    assert shown.endswith(
        f"So far       Once\n             {quoted(model.tokenizer.token_bytes(first))} ends the text.\n"
    )


def test_text_comes_from_a_pipe_and_a_file(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(" upon")
    done = run("trace", " a", "-f", tmp_path / "text", "-m", tiny_folder, "--json", "--strip", stdin=b"Once\n")
    assert done.json["prompt"] == "Once upon a"
    special = run("trace", "<|endoftext|>", "-m", tiny_folder, "--special", "parse", "--json").json
    assert special["next"]["tokens"] == [0]


def test_a_seed_is_drawn_and_told(run: Run, tiny_folder: Path) -> None:
    shown = run("trace", "Once", "-m", tiny_folder).out.decode()
    (seed,) = re.findall(r"\(seed (\d+)\)", shown)
    assert run("trace", "Once", "-m", tiny_folder, "--seed", seed).out.decode() == shown


# --- Files


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Trace, int, str, Path]]:
    """What is asked of the writers of pages."""
    written: list[tuple[str, Trace, int, str, Path]] = []
    module: Any = ModuleType("gptcli.cli.trace_page")

    def writer(kind: str) -> Callable[..., None]:
        def write(trace: Trace, later: list[Trace], prompt: str, file: Path) -> None:
            if file.name == "bad":
                raise OutputError("it can't be written", "write elsewhere")
            written.append((kind, trace, len(later), prompt, file))

        return write

    module.write_html, module.write_svg = writer("html"), writer("svg")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gptcli.cli, "trace_page", module, raising=False)
    return written


def test_pages_are_written_with_everything_that_they_show(
    run: Run, tiny_folder: Path, tmp_path: Path, pages: list[tuple[str, Trace, int, str, Path]]
) -> None:
    html, svg = tmp_path / "a.html", tmp_path / "a.svg"
    command = ("trace", "Once", "-m", tiny_folder, "--html", html, "--svg", svg, "-n", "3", "--seed", "1")
    done = run(*command)
    assert (done.code, done.out.decode()) == (0, f"{html}\n{svg}\n")
    assert [(kind, later, prompt, file) for kind, _, later, prompt, file in pages] == [
        ("html", 2, "Once", html),
        ("svg", 2, "Once", svg),
    ]
    assert list(pages[0][1].patterns) == [0, 1]
    assert len(run(*command, "--json").json["then"]) == 2
    assert run(*command, "--layer", "0", "--head", "0").out.startswith(f"{html}\n{svg}\ntiny: 2 blocks".encode())
    assert run("trace", "Once", "-m", tiny_folder, "--html", tmp_path / "bad").code == 1


# --- Step by step


class Person:
    """Someone at a terminal: reads until a text is there, and presses keys."""

    def __init__(self, *args: str | Path) -> None:
        import pty

        self._primary, secondary = pty.openpty()
        self.settings = termios.tcgetattr(secondary)
        self._secondary = secondary
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptcli", *map(str, args)],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"},
        )
        self.seen = ""

    def read_until(self, text: str) -> None:
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self._primary], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come after {self.seen!r}"
            self.seen += os.read(self._primary, 1 << 16).decode()
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def press(self, key: bytes) -> None:
        os.write(self._primary, key)

    def end(self) -> int:
        """The exit code; afterwards the terminal is as it was."""
        code = self.process.wait(PATIENCE)
        now = termios.tcgetattr(self._secondary)
        os.close(self._secondary)
        os.close(self._primary)
        assert now == self.settings
        return code


@pytest.fixture
def person(tiny_folder: Path) -> Iterator[Callable[..., Person]]:
    made: list[Person] = []

    def sit(*args: str) -> Person:
        made.append(Person("trace", "-m", tiny_folder, *args))
        return made[-1]

    yield sit
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_steps_go_on_with_any_key_to_the_end(person: Callable[..., Person]) -> None:
    reader = person("Once upon", "--step", "--seed", "1", "-n", "2")
    names = ["Tokens", "Embedding", "Positions", "Block 0", "Block 1", "Last vector", "Logits", "Softmax", "Draw"]
    for number, name in enumerate(names, 1):
        reader.read_until(name)
        reader.read_until(f"any key goes on, q ends ({number}/10)")
        reader.press([b" ", b"\r", b"\x1b[C", b"x"][number % 4])
    reader.read_until("So far")
    assert reader.end() == 0


@pytest.mark.parametrize(("key", "code"), [(b"q", 0), (b"\x04", 0)])
def test_a_step_can_be_the_last(person: Callable[..., Person], key: bytes, code: int) -> None:
    reader = person("Once upon", "--step")
    reader.read_until("q ends")
    reader.press(key)
    assert reader.end() == code
    assert "Embedding" not in reader.seen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_the_terminal_is_put_back_when_a_signal_ends_the_wait(
    person: Callable[..., Person], number: int, code: int
) -> None:
    reader = person("Once upon", "--step")
    reader.read_until("q ends")
    assert termios.tcgetattr(reader._secondary) != reader.settings
    reader.process.send_signal(number)
    assert reader.end() == code


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_is_followed_too(run: Run, tiny_folder: Path, kind: str) -> None:
    """Heads' shares are those of the matrices as they are multiplied with."""
    told = run("trace", "a b c", "-m", tiny_folder, "--json", "--quantize", kind, "--dtype", "float32").json
    exact = run("trace", "a b c", "-m", tiny_folder, "--json", "--dtype", "float32").json
    assert (told["quantize"], exact["quantize"]) == (kind, "none")
    for one, other in zip(told["stages"], exact["stages"], strict=True):
        assert (one["name"], one["shape"]) == (other["name"], other["shape"])
        if one["name"].endswith(".pattern"):
            ours, wanted = ([head["norm"] for head in stage["summary"]["heads"]] for stage in (one, other))
            assert ours == pytest.approx(wanted, rel=0.3)
            assert ours != wanted
