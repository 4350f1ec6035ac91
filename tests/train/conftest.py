"""What all tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins by measuring what the machine can do, which takes longer than training these models."""
    monkeypatch.setattr("gptcli.core.runtime.measured_flops", lambda device, dtype: 1e12)
