"""Where gptcli keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def token_cache() -> Path:
    """The folder of prepared training data: ``gptcli/tokens`` in the user's cache folder."""
    return _cache() / "tokens"


def native_cache() -> Path:
    """The folder of what was compiled for this machine: ``gptcli/native`` in the user's cache folder."""
    return _cache() / "native"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptcli"
