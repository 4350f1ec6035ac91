"""What gptcli remembers of its user's doings, for its user alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def state_folder() -> Path:
    """``gptcli`` in the user's state folder; it may not be there yet."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "gptcli"


def make_state_folder() -> Path:
    """The state folder, made if need be. Raises OSError."""
    folder = state_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def private_file(name: str) -> Path:
    """A file in the state folder that nobody else may read, made if need be. Raises OSError."""
    file = make_state_folder() / name
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
    with contextlib.suppress(PermissionError):  # somebody else's; whoever writes will be told
        os.chmod(file, 0o600)
    return file
