"""``gptcli embed``: vectors, neighbours, directions, pictures; in a pipe, as JSON, on a terminal, in files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from gptcli.cli.cells import bar, cells, cut, fit, signed_bar
from gptcli.cli.embed_map import heat_map
from gptcli.cli.embed_plot import scatter
from gptcli.cli.out import Output
from gptcli.core.build import Model, open_model
from gptcli.core.embedding import one_text_vector
from gptcli.text.tokenizer import Tokenizer
from tests.cli.conftest import Done, Run

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def embed(run: Run, tiny_folder: Path) -> Run:
    """``gptcli embed`` with the tiny model in float32."""
    return lambda *args, **more: run("embed", "-m", tiny_folder, "--dtype", "float32", *args, **more)


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    return open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), dtype="float32")


Screen = Callable[[int], None]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Let stdout count as a terminal of so many columns."""

    def set_(columns: int) -> None:
        monkeypatch.setattr(Output, "on_terminal", property(lambda self: True))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))

    return set_


def numbers(done: Done) -> list[list[float]]:
    assert done.code == 0, done.err
    return [[float(word) for word in line.split(b" ")] for line in done.out.splitlines()]


def rows(done: Done) -> list[list[str]]:
    assert done.code == 0, done.err
    return [line.split("\t") for line in done.out.decode().splitlines()]


def error(done: Done) -> tuple[int, str]:
    assert done.out == b""
    return done.code, done.err.decode()


# --- Texts


def test_a_line_of_numbers_a_text(embed: Run, tiny: Model) -> None:
    found = numbers(embed("the king", "a", ""))
    assert len(found) == 3
    for line, text in zip(found, ("the king", "a", "<|endoftext|>"), strict=True):
        ids = tiny.tokenizer.encode(text, special=True)
        assert line == pytest.approx(one_text_vector(tiny, ids).tolist(), abs=2e-6)


def test_input_comes_from_a_pipe_files_and_arguments_in_this_order(embed: Run, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("bb\nb")
    done = embed("c", "-f", tmp_path / "b.txt", "--lines", "--json", stdin=b"a\n\naa\n")
    assert [item["text"] for item in done.json["items"]] == ["a", "", "aa", "bb", "b", "c"]
    done = embed("c", "-f", tmp_path / "b.txt", "--json", stdin=b"a\n\naa\n")
    assert [item["text"] for item in done.json["items"]] == ["a\n\naa\n", "bb\nb", "c"]


def test_many_lines_in_a_batch_are_as_one_by_one(embed: Run) -> None:
    lines = [f"the king {'and the cat ' * (i % 5)}{i}" for i in range(30)]
    together = numbers(embed("--lines", "--pool", "mean", stdin="\n".join(lines).encode()))
    for i in (0, 4, 17, 29):
        assert together[i] == pytest.approx(numbers(embed(lines[i], "--pool", "mean"))[0], abs=2e-6)


def test_json_of_vectors(embed: Run, tiny: Model) -> None:
    value = embed("the king", "cat", "--json", "--pool", "mean", "--layer", "-2").json
    assert list(value) == ["model", "pool", "layer", "dimensions", "device", "dtype", "quantize", "items"]
    assert (value["model"], value["pool"], value["layer"], value["dimensions"]) == ("tiny", "mean", 1, 32)
    assert (value["device"], value["dtype"]) == ("cpu", "float32")
    for item in value["items"]:
        assert item["tokens"] == tiny.tokenizer.encode(item["text"])
        alone = one_text_vector(tiny, item["tokens"], pool="mean", layer=1)
        assert item["vector"] == pytest.approx(alone.tolist(), abs=2e-6)


def test_a_vector_a_token(embed: Run, tiny: Model) -> None:
    ids = tiny.tokenizer.encode("the king")
    (item,) = embed("the king", "--json", "--pool", "none").json["items"]
    assert np.array(item["vector"]).shape == (len(ids), 32)
    blocks = embed("the king", "cat", "--pool", "none").out.decode().split("\n\n")
    assert len(blocks[0].splitlines()) == len(ids)
    assert blocks[2:] == [""]


def test_normalized_vectors_have_length_1(embed: Run) -> None:
    (line,) = numbers(embed("the king", "--normalize"))
    assert math.hypot(*line) == pytest.approx(1, abs=1e-6)


def test_vectors_in_files_are_those_in_the_pipe(embed: Run, tmp_path: Path) -> None:
    shown = np.array(numbers(embed("the king", "cat")), dtype="f4")
    file = tmp_path / "v.npy"
    done = embed("the king", "cat", "--output", file)
    assert (done.code, done.out.decode()) == (0, f"{file}\n")
    assert np.array_equal(np.load(file, allow_pickle=False), shown)
    done = embed("the king", "cat", "-o", tmp_path / "v.safetensors", "--json")
    assert done.json["output"] == str(tmp_path / "v.safetensors")
    assert [set(item) for item in done.json["items"]] == [{"text", "tokens"}] * 2
    with safe_open(tmp_path / "v.safetensors", "np") as stored:
        assert np.array_equal(stored.get_tensor("vectors"), shown)
        assert stored.metadata()["layer"] == "2"


def test_with_a_table_a_text_is_a_word_and_its_row(embed: Run, tiny: Model) -> None:
    value = embed(" the", "b", "--table", "embedding", "--json").json
    assert "pool" not in value
    for item in value["items"]:
        (id_,) = item["tokens"]
        assert item["vector"] == tiny.transformer.embedding.weight[id_].tolist()
    done = embed("b", "--table", "unembedding")
    assert numbers(done)[0] == pytest.approx(value["items"][1]["vector"])
    assert b"tied" in done.err


# --- Words


def test_neighbours_of_a_word_by_hand(embed: Run, tiny: Model) -> None:
    table = tiny.transformer.embedding.weight.double().numpy()
    (id_,) = tiny.tokenizer.encode(" the")
    cosine = table @ table[id_] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[id_])
    order = [int(other) for other in np.argsort(-cosine) if other != id_][:10]
    value = embed(" the", "--nearest", "10", "--json").json
    assert (value["expression"], value["excluded"]) == ('" the"', [id_])
    assert [near["id"] for near in value["nearest"]] == order
    assert [near["cosine"] for near in value["nearest"]] == pytest.approx(cosine[order], abs=1e-6)
    assert value["nearest"][0]["text"] == tiny.tokenizer.decode([order[0]])
    done = embed(" the", "--nearest", "10")
    assert [int(row[1]) for row in rows(done)] == order
    assert b'left out of the answer, since they were asked with: " the"' in done.err


def test_an_expression_is_computed_on_the_rows(embed: Run, tiny: Model) -> None:
    ids = [tiny.tokenizer.encode(word)[0] for word in (" the", "a", "b")]
    table = tiny.transformer.embedding.weight.double().numpy()
    vector = 2 * table[ids[0]] - table[ids[1]] + 0.5 * table[ids[2]]
    cosine = table @ vector / np.linalg.norm(table, axis=1) / np.linalg.norm(vector)
    order = [int(other) for other in np.argsort(-cosine) if other not in ids][:10]
    value = embed("--expression", f"2*\" the\" - 'a' + 0.5 * #{ids[2]}", "--json").json
    assert value["excluded"] == ids
    assert [near["id"] for near in value["nearest"]] == order


def test_several_words_are_an_object_each_and_parted_in_a_pipe(embed: Run) -> None:
    done = embed("a", "b", "--nearest", "2", "--json")
    assert [json.loads(line)["expression"] for line in done.out.splitlines()] == ['"a"', '"b"']
    assert [len(row) for row in rows(embed("--lines", "--nearest", "2", stdin=b"a\nb\n"))] == [3, 3, 1, 3, 3]


def test_a_direction_sorts_words_by_their_projection(embed: Run, tiny: Model) -> None:
    first, second = (tiny.tokenizer.encode(word)[0] for word in (" the", "a"))
    table = tiny.transformer.embedding.weight.double().numpy()
    direction = table[first] - table[second]
    words = ["a", "b", "c", "d", " the"]
    value = embed("--direction", '" the" - "a"', *words, "--json").json
    by_hand = {word: table[tiny.tokenizer.encode(word)[0]] @ direction / np.linalg.norm(direction) for word in words}
    assert [each["text"] for each in value["words"]] == sorted(words, key=lambda word: -by_hand[word])
    for each in value["words"]:
        assert each["projection"] == pytest.approx(by_hand[each["text"]], abs=1e-9)
    assert value["excluded"] == []  # words that are asked for are shown
    piped = rows(embed("--direction", '" the" - "a"', "--lines", stdin="\n".join(words).encode()))
    assert [float(row[0]) for row in piped] == [each["projection"] for each in value["words"]]


@pytest.mark.parametrize("stdin", [None, b""])
def test_without_words_the_ends_of_the_table_are_shown(embed: Run, stdin: bytes | None) -> None:
    done = embed("--direction", '" the" - "a"', "--nearest", "3", "--json", stdin=stdin)
    assert len(done.json["words"]) == 6
    assert len(done.json["excluded"]) == 2
    assert not set(done.json["excluded"]) & {each["id"] for each in done.json["words"]}


# --- Several vectors


def test_similarity_is_a_table_with_labels(embed: Run) -> None:
    vectors = np.array(numbers(embed("the king", "cat", "a\nb")))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    head, *body = rows(embed("the king", "cat", "a\nb", "--similarity"))
    assert head == ["", '"the king"', '"cat"', '"a\\nb"']
    assert [row[0] for row in body] == head[1:]
    assert np.array([row[1:] for row in body], dtype=float) == pytest.approx(unit @ unit.T, abs=1e-6)
    value = embed("the king", "cat", "a\nb", "--similarity", "--json").json
    assert np.array(value["similarity"]) == pytest.approx(unit @ unit.T, abs=1e-6)
    assert [item["text"] for item in value["items"]] == ["the king", "cat", "a\nb"]


def test_with_pool_none_each_token_is_an_item(embed: Run, tiny: Model) -> None:
    ids = tiny.tokenizer.encode("the king")
    value = embed("the king", "--similarity", "--pool", "none", "--json").json
    assert [item["tokens"] for item in value["items"]] == [[id_] for id_ in ids]
    assert len(value["similarity"]) == len(ids)


def test_a_plot_gives_points_and_files(embed: Run, tmp_path: Path) -> None:
    words = ("a", "b", "c", " the")
    value = embed(*words, "--table", "embedding", "--plot", "--json").json
    assert [item["text"] for item in value["items"]] == list(words)
    assert sum(item["x"] for item in value["items"]) == pytest.approx(0, abs=1e-9)
    assert 1 >= value["explained_variance"][0] >= value["explained_variance"][1] >= 0
    points = rows(embed(*words, "--table", "embedding", "--plot"))
    assert [(float(x), float(y)) for x, y, _ in points] == [(item["x"], item["y"]) for item in value["items"]]
    for name, start in (("p.png", b"\x89PNG"), ("p.svg", b"<?xml")):
        done = embed(*words, "--table", "embedding", "--plot-file", tmp_path / name)
        assert (done.code, done.out.decode()) == (0, f"{tmp_path / name}\n")
        assert (tmp_path / name).read_bytes().startswith(start)
    first = (tmp_path / "p.svg").read_bytes()
    embed(*words, "--table", "embedding", "--plot-file", tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_bytes() == first


def test_without_matplotlib_the_extra_is_named(embed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = error(embed("a", "b", "--plot-file", tmp_path / "p.png"))
    assert code == 2
    assert "gptcli[plot]" in said


# --- Wrong use


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("a", "--nearest", "3", "--plot"), "ask for different things"),
        (("a", "--similarity", "--plot"), "ask for different things"),
        (("--direction", '"a"', "--expression", '"b"'), "ask for different things"),
        (("a", "--nearest", "3", "--pool", "mean"), "--pool is about texts"),
        (("a", "--table", "embedding", "--layer", "1"), "--layer is about texts"),
        (("a", "--nearest", "3", "--normalize"), "--normalize changes no"),
        (("a", "--expression", '"b"'), "brings its own words"),
        (("--expression", '"a" - + "b"'), "at character 7"),
        (("--expression", '"a" - "the king"'), "word at character 7"),
        (("--expression", "#300"), "no token 300"),
        (("--expression", '"a" - "a"'), "cancel out"),
        (("the king", "--nearest", "3"), "tokens"),
        (("the king", "--table", "embedding"), "tokens"),
        (("the king", "--direction", '"a"'), "tokens"),
        (("a", "--layer", "3"), "out of range"),
        (("a", "--pool", "max"), "not a choice"),
        (("a", "--table", "tables"), "not a choice"),
        (("a", "--nearest", "0"), "nearest"),
        (("a", "--output", "x.csv"), "neither .npy nor .safetensors"),
        (("a", "--plot-file", "x.pdf"), "neither .png nor .svg"),
        (("a", "--plot"), "two different vectors"),
        ((), "nothing to work on"),
    ],
)
def test_wrong_use_is_told(embed: Run, args: tuple[str, ...], said: str) -> None:
    code, message = error(embed(*args))
    assert code == 2
    assert said in message
    assert "hint: " in message


def test_a_text_beyond_the_context_is_a_limit(embed: Run) -> None:
    code, message = error(embed("a", "b c " * 64))
    assert code == 4
    assert "text 2 is" in message


def test_nothing_is_shown_of_what_is_refused(embed: Run, screen: Screen) -> None:
    screen(80)
    for args in (("a", "b c " * 64), ("a", "the king", "--table", "embedding"), ("a", "--plot")):
        assert error(embed(*args, "--color", "never"))[0] in (2, 4)


def test_a_folder_that_is_not_there_is_an_error(embed: Run, tmp_path: Path) -> None:
    code, message = error(embed("a", "-o", tmp_path / "none" / "x.npy"))
    assert code == 1
    assert "none" in message


# --- On a terminal


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(
    "args",
    [
        ("the king and the cat", "宫殿里的国王" * 3),
        ("the king\n", "cat", "--pool", "none"),
        ("a", "b", "--nearest", "5"),
        ("--expression", '"a" + "b" + "c" + "d" + "e" + "f" + "g" + "h" + "i" + "j"'),
        ("--direction", '"a" - "b"', " the", "c"),
        ("--direction", '"a" - "b"'),
        ("the king and the queen of the forest", "宫殿里的国王", "cat", "--similarity"),
        (*"abcdefghijklmnopqrstuvwxyz", "--similarity", "--table", "embedding"),
        (*"abcdefghijklmnopqrstuvwxyz", "--plot", "--table", "embedding"),
        ("the king", "宫殿里的国王", "cat", "--plot"),
    ],
)
def test_no_line_is_wider_than_the_terminal(embed: Run, screen: Screen, columns: int, args: tuple[str, ...]) -> None:
    screen(columns)
    for color in ("always", "never"):
        done = embed(*args, "--color", color)
        assert done.code == 0, done.err
        text = done.out.decode()
        assert ("\x1b" in text) == (color == "always")
        assert max(cells(line) for line in ESCAPE.sub("", text).splitlines()) <= columns


def test_a_terminal_sees_the_length_and_the_first_numbers(embed: Run, screen: Screen) -> None:
    (line,) = numbers(embed("the king"))
    screen(80)
    head, shown = embed("the king").out.decode().splitlines()
    assert head == "tiny, last token, layer 2 of 2: 32 numbers each"
    assert shown.split()[:5] == ['"the', 'king"', "norm", f"{math.hypot(*line):.4g}", f"{line[0]:.3f}"]


def test_bars_are_as_long_as_they_say() -> None:
    assert [bar(share, 4) for share in (0, 0.5, 0.53125, 1, 2, -1)] == ["", "██", "██▏", "████", "████", ""]
    assert signed_bar(1, 3) == "   │███"
    assert signed_bar(-0.5, 3) == " ▐█│   "
    assert signed_bar(0.5, 3) == "   │█▌ "
    assert signed_bar(0, 3) == "   │   "


def test_labels_fit_in_cells_not_in_characters() -> None:
    assert cut("宫殿里的", 5) == "宫殿…"
    assert fit("宫殿", 6) == "宫殿  "
    assert cells(fit("abcdefgh", 5)) == 5


def test_a_heat_map_shows_numbers_where_there_is_room_and_says_what_it_leaves_out() -> None:
    names = [f'"word{i}"' for i in range(30)]
    matrix = [[1 - abs(i - j) / 15 for j in range(30)] for i in range(30)]
    wide = heat_map(names, matrix, 400, colored=False)
    assert len(wide) == 31
    assert wide[1].split()[:3] == ['"word0"', "1.00", "0.93"]
    assert '"word29"' in wide[0]
    narrow = heat_map(names, matrix, 80, colored=True)
    assert "\x1b[48;5;88" in narrow[1]  # the diagonal is the strongest
    assert "the first" not in "".join(narrow)
    plain = heat_map(names, matrix, 80, colored=False)
    shown = len(plain) - 2
    assert plain[-1].startswith(f"the first {shown} of 30")
    assert all(cells(line) <= 80 for line in plain)


def test_a_map_of_vectors_that_are_all_alike_uses_all_its_colours() -> None:
    lines = heat_map(["a", "b", "c"], [[1, 0.99, 0.9], [0.99, 1, 0.95], [0.9, 0.95, 1]], 80, colored=True)
    assert "\x1b" not in lines[1].split("1.00")[0].replace("\x1b[48;5;88;38;5;231m", "")
    assert lines[1].endswith(" 0.90 ")  # the least has no colour
    assert "0.90 to the strongest at 1.00" in lines[-1]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_labels_of_a_plot_never_overlap_and_every_point_is_there(width: int) -> None:
    generator = np.random.default_rng(1)
    points = [(float(x), float(y)) for x, y in generator.normal(size=(40, 2))]
    names = [f'"word {i:02d}"' for i in range(40)]
    lines, dropped = scatter(names, points, width, 20)
    assert len(lines) == 20
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert sum(name in text for name in names) == 40 - dropped
    assert dropped < 40
    if width == 200:
        assert dropped <= 1
    marks = {(round((x - min(p[0] for p in points)) / np.ptp([p[0] for p in points]) * (width - 1))) for x, _ in points}
    assert marks <= {column for line in lines for column, char in enumerate(line) if char == "●"}


def test_marks_of_a_plot_keep_their_order() -> None:
    lines, dropped = scatter(["left", "up", "down"], [(-1, 0), (1, 2), (1, -2)], 40, 9)
    assert dropped == 0
    assert "up" in lines[0]
    assert lines[0].rstrip().endswith("●")
    assert lines[4].startswith("● left")
    assert "down" in lines[8]


def test_control_characters_do_not_reach_the_terminal(embed: Run, screen: Screen) -> None:
    screen(80)
    for args in (
        ("a\x1b[31m\x07b",),
        ("\x1b", "--nearest", "3"),
        ("a\x1b", "b\nc", "--similarity"),
        ("\x1b", "b", "--plot"),
    ):
        text = embed(*args, "--color", "never").out.decode()
        assert "\x1b" not in text
        assert "\x07" not in text
