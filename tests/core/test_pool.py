"""Rows that come and go: which prompts are read together, and that nobody can tell from what comes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptcli.core.model import Transformer
from gptcli.core.pool import Pool
from gptcli.core.prefixes import Prefixes
from gptcli.core.stepping import SHORT, Stepping
from gptcli.spec.config import ModelConfig, RopeScaling
from tests.core.test_model import GPT2, LLAMA_LIKE, visible_model

CONFIG = ModelConfig(**{**GPT2, "context": 400})


def prompt(number: int, length: int) -> list[int]:
    """Ids that begin unlike any other prompt's."""
    return [(number * 29 + place * 7) % CONFIG.vocab_size for place in range(length)]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return visible_model(CONFIG).bfloat16()  # whose products PyTorch rounds otherwise for every number of rows


def pool_of(model: Transformer, built: Path, *, prefixes: Prefixes | None = None) -> Pool:
    stepping = Stepping(model, built, lean=True)
    stepping.prepare()
    return Pool(model, stepping, prefixes)


def lived(pool: Pool, number: int, steps: int = 3) -> list[torch.Tensor]:
    """The logits of some steps of all rows, each of which goes on with tokens of its own."""
    return [pool.step([(7 * step + row) % 40 for row in range(number)]) for step in range(steps)]


@pytest.mark.parametrize("remember", [False, True])
def test_prompts_that_are_read_together_are_what_they_are_alone(
    model: Transformer, built: Path, remember: bool
) -> None:
    """To the bit, and so is all that follows; one of them goes on from what was known."""
    prompts = [prompt(number, length) for number, length in enumerate((1, 5, 17, 40, 64, 3))]
    prefixes = Prefixes(1 << 24) if remember else None
    pool = pool_of(model, built, prefixes=prefixes)
    if remember:
        pool.enter(prompts[3][:20])
        pool.leave(0)
    entered = pool.enter_first(prompts)
    assert [known for _, known in entered] == [0, 0, 0, 20 if remember else 0, 0, 0]
    steps = lived(pool, len(prompts))
    for row, ids in enumerate(prompts):
        alone = pool_of(model, built)
        logits, known = alone.enter(ids)
        assert known == 0
        assert torch.equal(logits, entered[row][0])
        for step, all_rows in enumerate(steps):
            assert torch.equal(alone.step([(7 * step + row) % 40])[0], all_rows[row])


def entered_of(pool: Pool, prompts: list[list[int]]) -> int:
    return len(pool.enter_first(prompts))


def test_who_goes_together(model: Transformer, built: Path) -> None:
    def new() -> Pool:
        return pool_of(model, built, prefixes=Prefixes(1 << 24))

    short = [prompt(number, 20) for number in range(6)]
    assert entered_of(new(), short) == 6
    assert entered_of(new(), [*short[:2], prompt(9, SHORT + 1), *short[2:]]) == 2  # which is long
    assert entered_of(new(), [prompt(9, SHORT + 1), *short]) == 1
    assert entered_of(new(), [prompt(number, 60) for number in range(8)]) == 4  # of 256 tokens
    # What begins like another one waits for it, and is not computed twice.
    pool = new()
    alike = [short[0], [*short[0][:8], 1, 2], short[1]]
    assert entered_of(pool, alike) == 1
    (_, known), *others = pool.enter_first(alike[1:])
    assert (known, len(others)) == (8, 1)
    # A beginning that is known keeps nobody waiting.
    system = prompt(1, 100)
    pool = new()
    pool.enter(system)
    turns = [[*system, *prompt(number + 2, 9)] for number in range(3)]
    assert [known for _, known in pool.enter_first(turns)] == [100, 100, 100]
    assert [known for _, known in pool.enter_first(turns)] == [109]  # wholly known: there is nothing to read


def test_without_the_native_step_prompts_go_one_by_one(model: Transformer) -> None:
    stepping = Stepping(model, lean=True)
    stepping.prepare()
    assert entered_of(Pool(model, stepping), [prompt(1, 5), prompt(2, 5)]) == 1


def test_a_prompt_that_is_turned_as_a_whole_is_not_read_natively(built: Path) -> None:
    """Dynamic scaling turns all tokens of a prompt by its length; a step turns each by its own place."""
    scaling = RopeScaling("dynamic", 2.0, original_context=8)
    turned = visible_model(ModelConfig(**{**LLAMA_LIKE, "context": 32, "rope_scaling": scaling}))
    pool = pool_of(turned, built)
    assert entered_of(pool, [[1, 2, 3], [4, 5, 6]]) == 1
    logits, _ = pool.enter(list(range(1, 13)))
    torch.testing.assert_close(logits, turned(torch.arange(1, 13)[None])[0, -1], atol=1e-4, rtol=0)
