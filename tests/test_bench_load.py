"""The benchmark of loading does what it says, on the shipped model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_it_compares_loading_with_reading_bytes() -> None:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "load.py"), "--short"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bytes"] == (ROOT / "weights" / "fable" / "model.safetensors").stat().st_size
    assert set(result["seconds"]) == {"load", "load and touch", "read", "map"}
    assert all(ratio > 0 for ratio in result["ratios"].values())
    assert "load and touch / read" in done.stderr
