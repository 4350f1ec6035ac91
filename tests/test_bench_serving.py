"""The benchmark of serving does what it says, on the shipped model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PATIENCE

pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
ROOT = Path(__file__).parent.parent


def test_it_compares_a_server_with_decoding() -> None:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "serving.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["of_decode"]) == {"decode, batch 8", "gptcli, streaming", "gptcli, whole"}
    assert 0 < result["first_token_seconds"]["gptcli"]["p50"] <= result["first_token_seconds"]["gptcli"]["p95"]
