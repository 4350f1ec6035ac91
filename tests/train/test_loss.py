"""Cross entropy in chunks: the loss and the gradients of the plain one, without its logits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptcli.core.build import random_model
from gptcli.core.model import Transformer
from gptcli.spec.config import ModelConfig
from gptcli.train import loss as module
from gptcli.train.data import IGNORED, Batches, Corpus
from gptcli.train.loss import Objective, cross_entropy
from tests.core.test_model import CONFIGS, some_ids
from tests.train.small import CONTEXT, VOCAB, corpus, model

N, C, V = 11, 5, 7


def plain(vectors: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(vectors @ unembedding.t(), targets, reduction="sum", ignore_index=IGNORED)


def some(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors, unembedding = (torch.randn(size, C, generator=generator) for size in (N, V))
    return vectors, unembedding, torch.randint(V, (N,), generator=generator)


def with_gradients(function: Any, vectors: Tensor, unembedding: Tensor, targets: Tensor) -> list[Tensor]:
    """A loss, scaled as a mean would be, and its gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (vectors, unembedding)]
    total = function(*leaves, targets)
    (total / 3).backward()
    return [total.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def rows_a_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int = V) -> None:
    monkeypatch.setitem(module.LOGIT_CHUNKS, "cpu", rows * vocabulary)


IGNORING = {
    "none": [],
    "some": [0, 4, 7],
    "a whole chunk": [2, 3, 4, 5],
    "the last": [10],
    "all but one": [i for i in range(N) if i != 6],
}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("ignored", IGNORING)
def test_loss_and_gradients_are_those_of_plain_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows: int, ignored: str
) -> None:
    rows_a_chunk(monkeypatch, rows)
    vectors, unembedding, targets = some()
    targets[IGNORING[ignored]] = IGNORED
    made = with_gradients(cross_entropy, vectors, unembedding, targets)
    wanted = with_gradients(plain, vectors, unembedding, targets)
    assert made[0].dtype is torch.float32
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not made[1][IGNORING[ignored]].any()


def test_where_all_is_ignored_nothing_is_learnt() -> None:
    vectors, unembedding, targets = some()
    total, *gradients = with_gradients(cross_entropy, vectors, unembedding, torch.full_like(targets, IGNORED))
    assert total.item() == 0.0
    assert len(gradients) == 2
    assert not any(gradient.any() for gradient in gradients)


def test_a_chunk_smaller_than_a_row_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.LOGIT_CHUNKS, "cpu", 1)
    made, wanted = with_gradients(cross_entropy, *some()), with_gradients(plain, *some())
    torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 100])
def test_in_bfloat16_the_error_is_that_of_the_type(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Beside plain cross entropy of the same bfloat16 logits."""
    rows_a_chunk(monkeypatch, rows, 400)
    generator = torch.Generator().manual_seed(1)
    vectors, unembedding = (torch.randn(size, 32, generator=generator).bfloat16() for size in (50, 400))
    targets = torch.randint(400, (50,), generator=generator)
    exact = with_gradients(plain, vectors.double(), unembedding.double(), targets)

    def errors(function: Any) -> list[float]:
        made = with_gradients(function, vectors, unembedding, targets)
        return [float((one.double() - other).norm() / other.norm()) for one, other in zip(made, exact, strict=True)]

    ours = errors(cross_entropy)
    theirs = errors(lambda *tensors: plain(*tensors))
    assert ours[0] < 1e-3
    assert all(one < 1.2 * other for one, other in zip(ours[1:], theirs[1:], strict=True)), (ours, theirs)


def test_scaling_the_loss_rounds_each_gradient_for_itself() -> None:
    """A scale that is rounded to bfloat16 first would make all of them too long, or too short, by the same part."""
    vectors, unembedding, targets = some()
    vectors = vectors.bfloat16().requires_grad_()
    cross_entropy(vectors, unembedding, targets).backward(retain_graph=True)
    assert vectors.grad is not None
    whole = vectors.grad.float()
    vectors.grad = None
    (cross_entropy(vectors, unembedding, targets) * (1 / 3)).backward()
    assert torch.equal(vectors.grad, (whole * torch.tensor(1 / 3)).bfloat16())


class Watched(TorchDispatchMode):
    """Which operations ran, and the elements of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_all_never_exist(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    vocabulary, count, rows = 500, 96, 4
    rows_a_chunk(monkeypatch, rows, vocabulary)
    vectors = torch.randn(count, 8).to(dtype).requires_grad_()
    unembedding = torch.randn(vocabulary, 8, requires_grad=True)
    with Watched() as watched:
        cross_entropy(vectors, unembedding, torch.arange(count)).backward()
    # The gradient of the unembedding is larger than a chunk's logits here, and nothing is larger than that.
    assert watched.largest == max(rows, 8) * vocabulary < count * vocabulary / 10


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters say that they require one even then."""
    rows_a_chunk(monkeypatch, 4)
    vectors, unembedding, targets = some()
    wanted = cross_entropy(vectors, unembedding.requires_grad_(), targets)
    with torch.no_grad(), Watched() as watched:
        made = cross_entropy(vectors, unembedding, targets)
    assert torch.allclose(made, wanted, rtol=1e-6)
    assert not made.requires_grad
    assert watched.names.count("mm") == 3  # the logits of three chunks
    assert not {"exp_", "scatter_add_"} & set(watched.names)


@pytest.mark.parametrize("learns", ["vectors", "unembedding"])
def test_only_the_gradients_that_are_needed_are_made(monkeypatch: pytest.MonkeyPatch, learns: str) -> None:
    rows_a_chunk(monkeypatch, 4)
    vectors, unembedding, targets = some()
    both = with_gradients(cross_entropy, vectors, unembedding, targets)
    leaf = vectors if learns == "vectors" else unembedding
    leaf.requires_grad_()
    with Watched() as watched:
        (cross_entropy(vectors, unembedding, targets) / 3).backward()
    assert watched.names.count("mm") == 2 * 3
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, both[1 if learns == "vectors" else 2])
    assert (vectors.grad is None) == (learns != "vectors")
    assert (unembedding.grad is None) == (learns != "unembedding")


# --- The objective: a whole model


def all_gradients(one: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in one.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradients_are_those_of_its_logits(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """A tied table gets both of its gradients: as what is looked up and as what is multiplied with."""
    rows_a_chunk(monkeypatch, 5, VOCAB)
    batch = Batches(corpus(), 3, CONTEXT, 0).at(0)
    ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets.copy())
    targets[0, :3] = IGNORED
    one, other = (model(tie_word_embeddings=tied) for _ in range(2))
    loss = Objective(one, torch.float32)(ids, targets)
    wanted = F.cross_entropy(other(ids).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-6)
    theirs = all_gradients(other)
    assert ("unembedding.weight" in theirs) == (not tied)
    assert all_gradients(one).keys() == theirs.keys()
    for name, gradient in all_gradients(one).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_objective_in_bfloat16_is_near_the_one_in_float32() -> None:
    batch = Batches(corpus(), 4, CONTEXT, 0).at(0)
    ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
    one, other = model(), model()
    losses = []
    for each, dtype in ((one, torch.float32), (other, torch.bfloat16)):
        loss = Objective(each, dtype)(ids, targets)
        assert loss.dtype is torch.float32
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    exact = all_gradients(one)
    for name, gradient in all_gradients(other).items():
        assert gradient.dtype is torch.float32
        if not name.endswith("key.bias"):
            assert (gradient - exact[name]).norm() < 0.03 * exact[name].norm(), name


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.position == "rope"])
def test_every_axis_learns_in_bfloat16_what_it_does_in_float32(name: str) -> None:
    """Norms of queries, of keys and of what was made stay float32 beside matrices that are multiplied in bfloat16."""
    ids = some_ids(CONFIGS[name], 2, 12)
    gradients, losses = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of torch, where types do not fit its fast norms
        for dtype in (torch.float32, torch.bfloat16):
            one = random_model(CONFIGS[name], 1)
            loss = Objective(one, dtype)(ids[:, :-1], ids[:, 1:])
            loss.backward()
            losses.append(loss.item())
            gradients.append(all_gradients(one))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert gradients[0].keys() == dict(one.named_parameters()).keys()
    for of, gradient in gradients[1].items():
        assert gradient.dtype is torch.float32
        if not of.endswith("key.bias"):
            assert (gradient - gradients[0][of]).norm() < 0.05 * gradients[0][of].norm(), of


@pytest.mark.parametrize("windows", [(), (3, None)], ids=["all", "windows"])
def test_documents_side_by_side_lose_what_each_loses_alone(windows: tuple[int | None, ...]) -> None:
    """With positions that are relative, so that a document is the same wherever it stands in a row."""
    config = ModelConfig(
        **{"family": "gpt2", "vocab_size": VOCAB, "context": 12, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2},
        head_dim=8,
        mlp_width=32,
        position="rope",
        windows=windows,
    )
    one: Transformer = random_model(config, 3)
    for parameter in one.parameters():
        parameter.data.mul_(5)  # far from even, so that a look across the border shows
    tokens = np.array([0, 5, 6, 7, 0, 9, 8, 7, 6, 5, 0, 3, 1], np.uint16)
    batches = Batches(Corpus("x", np.tile(tokens, 3), 3, 30), 1, 12, 0, mask_documents=True)
    objective = Objective(one, torch.float32)
    row = tokens.astype("int64")[None]
    ids, targets = torch.from_numpy(row[:, :-1]), torch.from_numpy(row[:, 1:])
    documents = torch.from_numpy(batches._documents(row[:, :-1]))
    assert documents.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2]]
    apart = sum(objective(ids[:, part], targets[:, part]).item() for part in (slice(0, 4), slice(4, 10), slice(10, 12)))
    assert objective(ids, targets, documents).item() == pytest.approx(apart, rel=1e-5)
    assert objective(ids, targets).item() != pytest.approx(apart, rel=1e-3)
