"""Vectors of texts and the geometry of the table, each beside a slow way to the same numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gptcli.core.build import Model, open_model, random_model
from gptcli.core.embedding import (
    Pool,
    Rows,
    Vector,
    cosines,
    one_text_vector,
    principal_components,
    resolve_layer,
    text_vectors,
)
from gptcli.core.embedding_file import save_vectors
from gptcli.core.files import write_whole
from gptcli.errors import CorruptError, LimitError, OutputError, UsageError
from gptcli.spec.config import read_config
from gptcli.text.tokenizer import Tokenizer
from tests.conftest import ROOT

TEXTS = [[5], list(range(10, 40)), [7, 7, 7], [40, 3, 9, 200, 17], list(range(100, 164)), [299, 1]]
POOLS: tuple[Pool, ...] = ("last", "mean", "none")


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    return open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), dtype="float32")


@pytest.fixture(scope="module")
def fable() -> Model:
    folder = ROOT / "weights" / "fable"
    return open_model(folder, Tokenizer.from_folder(folder), dtype="float32")


@pytest.fixture(scope="module")
def other(tiny_folder: Path) -> Model:
    """An untied model with rotary positions, and more rows than its tokenizer has tokens."""
    config = dataclasses.replace(read_config(tiny_folder), vocab_size=320, position="rope", norm="rmsnorm", tied=False)
    transformer = random_model(config, 3).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_folder(tiny_folder)
    return Model("other", config, transformer, tokenizer, torch.device("cpu"), torch.float32)


def one(model: Model, word: str) -> int:
    (id_,) = model.tokenizer.encode(word)
    return id_


# --- Texts


@pytest.mark.parametrize("kind", ["tiny", "other"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2])
def test_a_batch_gives_what_each_text_alone_gives(
    kind: str, pool: Pool, layer: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Model = request.getfixturevalue(kind)
    for limit in ("_AT_ONCE", "_AT_ONCE_TAPPED"):
        monkeypatch.setattr(f"gptcli.core.embedding.{limit}", 70)  # several batches
    monkeypatch.setattr("gptcli.core.embedding._WINDOW", 4)
    found = list(text_vectors(model, TEXTS, pool=pool, layer=layer))
    assert [list(vector.ids) for vector in found] == TEXTS
    for ids, vector in zip(TEXTS, found, strict=True):
        alone = one_text_vector(model, ids, pool=pool, layer=layer)
        assert vector.values.shape == alone.shape == ((len(ids), 32) if pool == "none" else (32,))
        torch.testing.assert_close(vector.values, alone, atol=2e-6, rtol=1e-5)


def test_layer_0_is_embedding_plus_position_by_hand(tiny: Model) -> None:
    (vector,) = text_vectors(tiny, [[11, 22, 33]], pool="none", layer=0)
    table, positions = tiny.transformer.embedding.weight, tiny.transformer.positions
    assert positions is not None
    for place, id_ in enumerate((11, 22, 33)):
        assert vector.values[place].tolist() == (table[id_] + positions.weight[place]).tolist()


def test_the_last_layer_is_what_the_unembedding_reads(tiny: Model) -> None:
    ids = [40, 3, 9, 200, 17]
    (vector,) = text_vectors(tiny, [ids])
    logits = tiny.transformer(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(tiny.transformer.unembedding.weight @ vector.values, logits)


def test_the_mean_is_the_mean_of_the_tokens_and_normalized_is_of_length_1(tiny: Model) -> None:
    ids = [40, 3, 9, 200, 17]
    (each,) = text_vectors(tiny, [ids], pool="none", layer=1)
    (mean,) = text_vectors(tiny, [ids], pool="mean", layer=1)
    by_hand = [math.fsum(row[place] for row in each.values.tolist()) / 5 for place in range(32)]
    assert mean.numbers() == pytest.approx(by_hand, abs=1e-6)
    (unit,) = text_vectors(tiny, [ids], pool="mean", layer=1, normalize=True)
    assert unit.norm == pytest.approx(1, abs=1e-6)
    assert unit.numbers() == pytest.approx([value / mean.norm for value in mean.numbers()], abs=1e-6)


def test_the_mean_leaves_out_a_start_token_unless_it_is_alone(tiny: Model) -> None:
    tiny.tokenizer.start_id = 0
    (each,) = text_vectors(tiny, [[0, 3, 9]], pool="none")
    with_start, alone = text_vectors(tiny, [[0, 3, 9], [0]], pool="mean")
    torch.testing.assert_close(with_start.values, each.values[1:].mean(0))
    assert alone.values.tolist() == pytest.approx(each.values[0].tolist(), abs=1e-5)


def test_layers_are_counted_from_both_ends() -> None:
    assert [resolve_layer(layer, 6) for layer in (0, 6, -1, -7)] == [0, 6, 6, 0]
    for layer in (7, -8):
        with pytest.raises(UsageError, match="out of range"):
            resolve_layer(layer, 6)


def test_texts_that_do_not_fit_are_refused_before_any_is_computed(tiny: Model) -> None:
    with pytest.raises(LimitError, match="text 2 is 65 tokens"):
        next(text_vectors(tiny, [[1], [1] * 65]))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        next(text_vectors(tiny, [[1], [300]]))


def test_damaged_weights_are_told(tiny: Model) -> None:
    tiny.transformer.norm.weight = torch.nn.Parameter(torch.full((32,), math.nan))
    with pytest.raises(CorruptError, match="not finite"):
        list(text_vectors(tiny, [[1]]))


# --- The table


def brute_force(rows: list[list[float]], vector: list[float], exclude: set[int]) -> list[tuple[float, int]]:
    """Every row's cosine in float64 by plain loops, best first."""
    norm = math.sqrt(math.fsum(x * x for x in vector))
    found = []
    for id_, row in enumerate(rows):
        length = math.sqrt(math.fsum(x * x for x in row))
        if id_ not in exclude:
            found.append((math.fsum(x * y for x, y in zip(row, vector, strict=True)) / (length * norm), id_))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("rows_at_once", [7, 16384])
def test_neighbours_equal_brute_force(tiny: Model, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptcli.core.embedding._ROWS", rows_at_once)
    weights = {17: 1.0, 60: -0.5, 280: 2.0}
    table = tiny.transformer.embedding.weight.tolist()
    vector = [table[17][i] - 0.5 * table[60][i] + 2 * table[280][i] for i in range(32)]
    rows = Rows(tiny)
    assert rows.combination(weights).tolist() == pytest.approx(vector, abs=1e-12)
    found = rows.nearest(rows.combination(weights), 20, exclude=weights)
    slow = brute_force(table, vector, set(weights))[:20]
    assert [near.id for near in found] == [id_ for _, id_ in slow]
    assert [near.cosine for near in found] == pytest.approx([cosine for cosine, _ in slow], abs=1e-6)
    assert rows.nearest(rows.combination({5: 3.0}), 1)[0].id == 5  # nothing is excluded unbidden


def test_projections_equal_the_dot_product_with_the_unit_direction(tiny: Model) -> None:
    rows = Rows(tiny)
    direction = rows.combination({17: 1.0, 60: -1.0})
    norm = math.sqrt(math.fsum(x * x for x in direction.tolist()))
    table = tiny.transformer.embedding.weight.tolist()
    for along in rows.project(direction, [3, 17, 60, 299]):
        row = table[along.id]
        by_hand = math.fsum(x * y for x, y in zip(row, direction.tolist(), strict=True)) / norm
        assert along.projection == pytest.approx(by_hand, abs=1e-9)
        assert along.cosine == pytest.approx(by_hand / math.sqrt(math.fsum(x * x for x in row)), abs=1e-9)


def test_the_ends_of_a_direction_are_those_of_all_rows(tiny: Model) -> None:
    rows = Rows(tiny)
    direction = rows.combination({17: 1.0, 60: -1.0})
    order = [id_ for _, id_ in brute_force(tiny.transformer.embedding.weight.tolist(), direction.tolist(), {17, 60})]
    found = rows.ends(direction, 5, exclude=(17, 60))
    assert [along.id for along in found] == order[:5] + order[-5:]
    assert [along.cosine for along in found] == sorted((along.cosine for along in found), reverse=True)
    assert len(rows.ends(direction, 1000)) == 300


def test_untied_output_rows_are_a_table_of_their_own_and_padding_is_no_word(other: Model) -> None:
    ours, theirs = Rows(other), Rows(other, "unembedding")
    assert len(ours.weight) == len(theirs.weight) == 300
    assert ours.row(9).tolist() == other.transformer.embedding.weight[9].tolist()
    assert theirs.row(9).tolist() == other.transformer.unembedding.weight[9].tolist() != ours.row(9).tolist()
    assert max(near.id for near in ours.nearest(ours.row(5), 1000)) == 299
    for id_ in (-1, 300):
        with pytest.raises(UsageError, match=f"no token {id_}"):
            ours.row(id_)


def test_words_that_cancel_out_have_no_neighbours(tiny: Model) -> None:
    with pytest.raises(UsageError, match="cancel out"):
        Rows(tiny).combination({5: 0.0})
    with pytest.raises(UsageError, match="cancel out"):
        Rows(tiny).combination({5: 1.0 - 1.0, 6: 0.0})


def test_a_row_of_zeros_is_no_neighbour_and_no_fault(tiny: Model) -> None:
    weight = tiny.transformer.embedding.weight.clone()
    weight[3] = 0
    tiny.transformer.embedding.weight = torch.nn.Parameter(weight)
    rows = Rows(tiny)
    (zero,) = (near for near in rows.nearest(rows.row(5), 300) if near.id == 3)
    assert zero.cosine == 0
    assert rows.project(rows.row(5), [3])[0].cosine == 0


# --- Several vectors


def vectors(matrix: Any) -> list[Vector]:
    return [Vector((0,), torch.tensor(row, dtype=torch.float32)) for row in matrix]


def test_similarity_is_the_cosine_of_each_with_each() -> None:
    found = np.array(cosines(vectors([[3, 4], [4, 3], [-6, -8], [0, 0]])))
    assert found == pytest.approx(np.array([[1, 0.96, -1, 0], [0.96, 1, -0.96, 0], [-1, -0.96, 1, 0], [0, 0, 0, 0]]))


def test_components_are_those_of_the_eigen_decomposition() -> None:
    matrix = np.random.default_rng(5).normal(size=(12, 7)) * [5, 3, 1, 1, 1, 1, 1] + 10
    found = principal_components(vectors(matrix))
    values, axes = np.linalg.eigh(np.cov(matrix.astype("f4").astype("f8").T, bias=True))
    points = np.array(found.points)
    for number in (0, 1):
        axis = axes[:, -1 - number]
        axis = axis * np.sign(axis[np.abs(axis).argmax()])
        assert points[:, number] == pytest.approx((matrix.astype("f4") - matrix.astype("f4").mean(0)) @ axis, abs=1e-4)
        assert found.explained[number] == pytest.approx(values[-1 - number] / values.sum())
    again = principal_components(vectors(matrix))
    assert again == found


def test_a_picture_needs_two_different_vectors() -> None:
    for matrix in ([[1.0, 2.0]], [[1.0, 2.0]] * 3):
        with pytest.raises(UsageError, match="two different"):
            principal_components(vectors(matrix))
    two = principal_components(vectors([[0.0, 0.0], [3.0, 4.0]]))
    assert [x for x, _ in two.points] == pytest.approx([-2.5, 2.5])
    assert two.explained == pytest.approx((1, 0))
    assert principal_components(vectors([[1.0], [3.0]])).points == ((-1.0, 0.0), (1.0, 0.0))


# --- Files


def test_files_hold_the_vectors_and_can_be_read_without_a_pickle(tiny: Model, tmp_path: Path) -> None:
    found = list(text_vectors(tiny, TEXTS, pool="none"))
    rows = torch.cat([vector.values for vector in found]).numpy()
    save_vectors(tmp_path / "v.npy", found, {})
    array = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert array.dtype == np.float32
    assert np.array_equal(array, rows)
    save_vectors(tmp_path / "v.safetensors", found, {"pool": "none"})
    with safe_open(tmp_path / "v.safetensors", "np") as file:
        assert np.array_equal(file.get_tensor("vectors"), rows)
        assert file.get_tensor("lengths").tolist() == [len(ids) for ids in TEXTS]
        assert file.get_tensor("tokens").tolist() == [id_ for ids in TEXTS for id_ in ids]
        assert file.metadata() == {"pool": "none"}
    save_vectors(tmp_path / "v.npy", list(text_vectors(tiny, TEXTS)), {})
    assert np.load(tmp_path / "v.npy").shape == (len(TEXTS), 32)


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.npy"
    file.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="space"):
            write_whole(file, b"new")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("out.npy", b"old")]
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_link_stays_one_and_a_pipe_is_written_into(tmp_path: Path) -> None:
    link, target, pipe = tmp_path / "link", tmp_path / "target", tmp_path / "pipe"
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, b"new")
        assert pipe.is_fifo()
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)


# --- What fable has learnt


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (" king", {" queen", " prince", " King"}),
        (" dog", {" dogs", " cat"}),
        (" he", {" she", " He"}),
        (" mother", {" father", " Mother"}),
        (" went", {" came", " go"}),
        (" two", {" three", " four"}),
        (" big", {" small"}),
    ],
)
def test_nearest_tokens_of_everyday_words_make_sense(fable: Model, word: str, expected: set[str]) -> None:
    rows, id_ = Rows(fable), one(fable, word)
    found = {fable.tokenizer.decode([near.id]) for near in rows.nearest(rows.row(id_), 10, exclude=(id_,))}
    assert expected <= found


def test_king_without_man_with_woman_is_queen(fable: Model) -> None:
    rows = Rows(fable)
    weights = {one(fable, " king"): 1.0, one(fable, " man"): -1.0, one(fable, " woman"): 1.0}
    (best,) = rows.nearest(rows.combination(weights), 1, exclude=weights)
    assert best.id == one(fable, " queen")


def bench() -> ModuleType:
    """tests/bench/analogies.py."""
    folder = ROOT / "tests" / "bench"
    spec = importlib.util.spec_from_file_location("bench_analogies", folder / "analogies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def test_the_analogy_list_is_covered_and_far_above_chance(fable: Model) -> None:
    analogies = bench()
    sections, missed = analogies.questions(analogies.read_list(analogies.LIST), fable.tokenizer)
    every = [question for section in sections.values() for question in section]
    assert missed == 0
    assert len(every) == len(set(every)) >= 100
    assert all(len(set(question)) == 4 for question in every)
    assert min(map(len, sections.values())) >= 10
    table = Rows(fable).weight
    real = analogies.score(analogies.ranks(table, every))
    chance = analogies.score(analogies.ranks(analogies.random_table(table, 0), every))
    assert real["first"] > 0.7
    assert chance["first"] < 0.01
    # As the card tells it.
    card = (ROOT / "weights" / "fable" / "README.md").read_text()
    assert f"| all | {real['questions']} | {real['first']:.0%} | {real['mean_reciprocal_rank']:.2f} |" in card


def test_the_ranks_of_analogies_are_those_of_the_nearest_tokens(fable: Model) -> None:
    analogies, rows = bench(), Rows(fable)
    for words in (
        (" man", " king", " woman", " queen"),
        (" go", " went", " see", " saw"),
        (" up", " down", " in", " big"),
    ):
        a, b, c, d = (one(fable, word) for word in words)
        weights = {b: 1.0, a: -1.0, c: 1.0}
        near = rows.nearest(rows.combination(weights), len(rows.weight), exclude=weights)
        (rank,) = analogies.ranks(rows.weight, [analogies.Question(a, b, c, d)], normalize=False)
        assert [each.id for each in near].index(d) + 1 == rank


def test_a_damaged_table_is_told_of(tiny_folder: Path) -> None:
    model = open_model(tiny_folder, Tokenizer.from_folder(tiny_folder), device="cpu", dtype="float32")
    damaged = model.transformer.embedding.weight.clone()
    damaged[7, 3] = math.nan
    model.transformer.embedding.weight = torch.nn.Parameter(damaged, requires_grad=False)
    with pytest.raises(CorruptError, match="embedding of tiny is not finite"):
        Rows(model)
