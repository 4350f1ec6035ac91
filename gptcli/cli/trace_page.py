"""A prediction as a file that can be sent to a friend: a page (``trace --html``) or a picture (``trace --svg``).

Both hold everything that they show and load nothing. What comes from outside (prompt, tokens, names) is escaped where
it is put in, and the page's policy lets no script run but the one that is shipped with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.cli.trace_html import page_parts
from gptcli.cli.trace_svg import picture
from gptcli.cli.trace_window import Window

if TYPE_CHECKING:
    from gptcli.core.trace import Trace

_TEMPLATE = "trace_page.html"
_HOLE = re.compile(r"<!--\{(\w+)\}-->")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
# Logits beyond those that are listed go to the page as a histogram with bins of this width: its temperature can be
# moved without the whole vocabulary, and the error stays below what is shown.
_BIN = 0.05


def write_html(trace: Trace, later: Sequence[Trace], prompt: str, file: Path) -> None:
    """Write one prediction, and those that came after it, as a page that needs nothing else.

    Args:
        trace: the first prediction; blocks without a kept pattern are shown without their heat map.
        later: the predictions after it, each with the token drawn before appended.
        prompt: the text as it was given.
        file: where; what was there before stays until the new is whole.

    Raises OutputError if the file can't be written.
    """
    template = resources.files("gptcli.cli").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    window = Window(trace)
    parts = page_parts(window, later, prompt)
    parts["data"] = in_script(page_data(window, later, prompt))
    script = _SCRIPT.search(template)
    assert script is not None
    digest = hashlib.sha256(script[1].encode()).digest()
    parts["script_hash"] = f"sha256-{base64.b64encode(digest).decode()}"
    # One pass, so that nothing that was put in is taken for a hole.
    _write(_HOLE.sub(lambda hole: parts[hole[1]], template), file)


def write_svg(trace: Trace, later: Sequence[Trace], prompt: str, file: Path) -> None:
    """Write one prediction, and those that came after it, as a picture; as ``write_html`` otherwise."""
    _write(picture(Window(trace), later, prompt), file)


def page_data(window: Window, later: Sequence[Trace], prompt: str) -> dict[str, Any]:
    """What the page's script works on, and what others may read from the page.

    ``patterns`` are lower triangles in thousandths: layer -> head -> row; where the page shows only the last tokens
    (``first`` is above 0), a row begins with the sum of what came before them.
    """
    trace = window.trace
    return {
        "model": trace.model.name,
        "device": str(trace.model.device),
        "dtype": trace.model.dtype_name,
        "prompt": prompt,
        "first": window.first,
        "tokens": [{"id": token.id, "text": token.text} for token in window.tokens],
        "stages": [stage.to_dict() for stage in trace.stages],
        "patterns": {str(layer): heads for layer, heads in window.patterns().items()},
        "lens": [[{"id": one.id, "probability": one.probability} for one in row] for row in window.lens()],
        "logits": _logits(trace),
        "later": [
            {"next": one.stage("probabilities").summary, "draw": one.stage("draw").summary, "ids": one.ids}
            for one in later
        ],
    }


def _logits(trace: Trace) -> dict[str, Any]:
    """The listed logits, the drawn token's, and a histogram of all that are not listed, from the largest down."""
    every: list[float] = trace.logits.float().tolist()
    listed = [one.logit for one in trace.next.top]
    rest = sorted(every, reverse=True)[len(listed) :]
    counts = [0] * (math.floor((listed[0] - rest[-1]) / _BIN) + 1 if rest else 0)
    for logit in rest:
        counts[math.floor((listed[0] - logit) / _BIN)] += 1
    return {"listed": listed, "drawn": every[trace.drawn.id], "bin": _BIN, "others": counts}


def in_script(value: Any) -> str:
    """JSON that can stand in a script element: no character in it can end the element or begin a comment."""
    made = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII, so control characters are escaped
    return re.sub("[<>&\x7f]", lambda found: f"\\u{ord(found[0]):04x}", made)


def _write(text: str, file: Path) -> None:
    from gptcli.core.files import write_whole

    write_whole(file, text.encode("utf-8", errors="backslashreplace"))
