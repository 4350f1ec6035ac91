"""Sizes for people: powers of 1,000, as disks and cards are sold."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def byte_text(count: float, decimals: int = 1) -> str:
    """``124.4 MB``; whole bytes below a thousand."""
    return scaled(count, "B", decimals)


def scaled(count: float, unit: str, decimals: int) -> str:
    """A number with a prefix for its power of 1,000: ``3.59 PFLOPs``."""
    power = 0
    while round(count, decimals) >= 1000 and power < len(_PREFIXES) - 1:
        count, power = count / 1000, power + 1
    digits = decimals if power else 0
    return f"{count:,.{digits}f} {_PREFIXES[power]}{unit}"
