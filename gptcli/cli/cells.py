"""Texts and bars measured in cells, the columns of a terminal: a wide character takes two, a combining one none."""

from __future__ import annotations

_EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")


def cells(text: str) -> int:
    """How many columns a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cut(text: str, room: int, *, end: str = "…") -> str:
    """Text in at most ``room`` cells; what is cut ends with a mark."""
    if cells(text) <= room:
        return text
    if room <= 0:
        return ""
    from rich.cells import set_cell_size

    return set_cell_size(text, max(0, room - cells(end))).rstrip() + end


def cut_token(shown: str, room: int) -> str:
    """A quoted token in at most ``room`` cells: ``" grou…"``."""
    return cut(shown, room, end='…"' if shown.endswith('"') and room > 3 else "…")


def pad(text: str, room: int) -> str:
    """Text with spaces behind it, up to ``room`` cells."""
    return text + " " * (room - cells(text))


def pad_left(text: str, room: int) -> str:
    """Text with spaces before it, up to ``room`` cells."""
    return " " * (room - cells(text)) + text


def fit(text: str, room: int) -> str:
    """Text in exactly ``room`` cells: cut, or with spaces behind it."""
    return pad(cut(text, room), room)


def bar(share: float, room: int) -> str:
    """A bar for ``share``, from 0 to 1, of ``room`` cells, to an eighth of a cell."""
    eighths = round(min(1.0, max(0.0, share)) * room * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8]


def signed_bar(share: float, half: int) -> str:
    """A bar from a middle line, to the right above 0 and to the left below; ``2 * half + 1`` cells."""
    halves = round(min(1.0, abs(share)) * half * 2)
    if share < 0:
        return ("▐" * (halves % 2) + "█" * (halves // 2)).rjust(half) + "│" + " " * half
    return " " * half + "│" + ("█" * (halves // 2) + "▌" * (halves % 2)).ljust(half)
