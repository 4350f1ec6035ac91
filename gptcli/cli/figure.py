"""Pictures in files, by matplotlib: an extra, imported only here."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from gptcli.errors import UsageError


def need_matplotlib(instead: str) -> None:
    """Raise UsageError where matplotlib is missing; ``instead`` says how to do without."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(
            "drawing into a file needs matplotlib, which is not installed", f"pip install 'gptcli[plot]', or {instead}"
        ) from None


def figure(kind: str, size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """The bytes of a ``png`` or ``svg`` of ``size`` inches, in whose axes ``draw`` has drawn.

    The same drawing gives the same bytes, by the same matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    plain: Any = {
        "svg.hashsalt": "gptcli",
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(plain):
        made = Figure(figsize=size, dpi=150, layout="constrained")
        draw(made.add_subplot())
        written = io.BytesIO()
        made.savefig(written, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return written.getvalue()
