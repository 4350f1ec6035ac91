"""Labels and bars of a known width in cells, for the views of ``gptcli embed``."""

from __future__ import annotations

from gptcli.cli.tokens import quoted

_EIGHTHS = " ▏▎▍▌▋▊▉"


def label(text: str) -> str:
    """A text on one line, in quotes, so that a space at either end is seen."""
    return quoted(text.encode("utf-8", errors="surrogatepass"))


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def fitted(text: str, width: int) -> str:
    """``text``, its end left out where it is wider than ``width`` cells."""
    if cells(text) <= width:
        return text
    from rich.cells import set_cell_size

    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""


def padded(text: str, width: int) -> str:
    """``fitted``, filled up with spaces to exactly ``width`` cells."""
    text = fitted(text, width)
    return text + " " * (width - cells(text))


def bar(share: float, width: int) -> str:
    """A bar to the right, ``share`` of ``width`` cells long, in eighths of a cell."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def signed_bar(share: float, half: int) -> str:
    """A bar from a middle line, to the right above 0 and to the left below; ``2 * half + 1`` cells."""
    halves = round(min(1.0, abs(share)) * half * 2)
    if share < 0:
        return ("▐" * (halves % 2) + "█" * (halves // 2)).rjust(half) + "│" + " " * half
    return " " * half + "│" + ("█" * (halves // 2) + "▌" * (halves % 2)).ljust(half)
