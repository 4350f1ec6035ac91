"""A completion that nobody waits for any more stops between two tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.core import complete as core
from tests.serve.running import running


def test_whoever_hangs_up_stops_the_search(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def endless(model: Any, prefix: str, *, clock: Callable[[], float], **asked: Any) -> Any:
        begun.set()
        try:
            while True:
                clock()
        finally:
            stopped.set()

    with running(tiny_folder, tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr(core, "complete", endless)
            connection = server.connection()
            connection.request("POST", "/gptcli/complete", b'{"prefix": "a"}', {"Content-Type": "application/json"})
            assert begun.wait(60)
            connection.close()
            assert stopped.wait(60)
        answer = server.post("/gptcli/complete", {"prefix": "a"})  # the next one is answered
        assert (answer.status, len(answer.json["completions"])) == (200, 3)
