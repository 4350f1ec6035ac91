"""Which signals a process listens to; without torch."""

from __future__ import annotations

import signal


def not_ignored(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those of some signals that are heard: what nohup, or a shell's ``&``, has had ignored stays ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
