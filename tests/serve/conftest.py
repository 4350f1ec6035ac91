"""A server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcli.serve.limits import Limits
from tests.serve.running import Running, running

TEXT = "Once upon a time there was"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
LIMITS = Limits(body_bytes=20_000, choices=12, waiting=16, rows=4, stops=4, inputs=5)


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_folder, tmp_path_factory.mktemp("s"), LIMITS) as server:
        yield server
