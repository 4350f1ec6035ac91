"""Work on many things, on all cores, with the answers in order and a few of them at a time in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Item], Answer], items: Iterable[Item], threads: int | None = None) -> Iterator[Answer]:
    """``work`` of each item, on so many threads (default: one for each core), the answers in the order of the items.

    What takes them out sets the pace: never are more than twice as many items as threads taken up ahead of it. What
    an item or its work raises comes in its place, behind the answers of the items before it.

    It pays where the work leaves the interpreter's lock alone, as tiktoken does.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    threads = threads or cores()
    waiting: deque[Future[Answer]] = deque()
    pool = ThreadPoolExecutor(threads)
    failure: BaseException | None = None
    source = iter(items)
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            waiting.append(pool.submit(work, item))
            while waiting and (len(waiting) >= 2 * threads or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)
