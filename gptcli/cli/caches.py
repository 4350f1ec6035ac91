"""Where gptcli keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def token_cache() -> Path:
    """The folder of prepared training data: ``gptcli/tokens`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gptcli" / "tokens"
