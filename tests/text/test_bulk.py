"""Work on all cores: side by side, in order, a little ahead, and failures in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gptcli.text.bulk import cores, in_order
from tests.conftest import PATIENCE


def test_there_is_a_core() -> None:
    assert cores() >= 1


def test_work_is_done_side_by_side_and_answered_in_order() -> None:
    both = threading.Barrier(2, timeout=PATIENCE)  # passes only where two are at work at once

    def work(number: int) -> int:
        both.wait()
        return number

    assert list(in_order(work, range(10), threads=2)) == list(range(10))


def test_work_is_taken_up_only_a_little_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    answers = in_order(lambda number: number, items(), threads=3)
    for number in range(100):
        assert next(answers) == number
        assert len(taken) <= number + 1 + 2 * 3
    answers.close()


def test_what_fails_comes_behind_the_answers_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise ValueError("the fourth")

    def work(number: int) -> int:
        if number == 2:
            raise KeyError("the second")
        return number

    unlike_2 = filter(lambda number: number != 2, items())
    for source, failure, before in ((items(), KeyError, [1]), (unlike_2, ValueError, [1, 3])):
        answers = in_order(work, source, threads=2)
        assert [next(answers) for _ in before] == before
        with pytest.raises(failure):
            next(answers)
