"""Backgrounds from pale to strong, for values shown by colour: surprise, attention, similarity.

Each sets the background and the text, from the 256 colours that terminals have had for decades, so that it reads on
light and on dark. Nothing is coloured for the least values: the terminal's own colours are the lowest step.
"""

from __future__ import annotations

from collections.abc import Sequence

_RESET = "\x1b[0m"
_BLACK, _WHITE = 16, 231

# Background and text, from weak to strong.
HEAT: Sequence[tuple[int, int]] = (
    *((background, _BLACK) for background in (230, 229, 222, 215, 209, 202)),
    *((background, _WHITE) for background in (160, 88)),
)
COLD: Sequence[tuple[int, int]] = (
    *((background, _BLACK) for background in (195, 159, 117, 75)),
    *((background, _WHITE) for background in (33, 27, 20, 17)),
)


def shade(text: str, strength: float, scale: Sequence[tuple[int, int]] = HEAT) -> str:
    """``text`` on the background for ``strength`` from 0 (none) to 1 (the strongest); values beyond are cut off.

    Only what stands between line ends is coloured. Taking the escapes away gives ``text`` again, byte for byte.
    """
    step = min(len(scale), int(max(0.0, strength) * (len(scale) + 1)))  # 0 is no colour
    if step == 0:
        return text
    background, front = scale[step - 1]
    start = f"\x1b[48;5;{background};38;5;{front}m"
    return "\n".join(f"{start}{line}{_RESET}" if line else "" for line in text.split("\n"))
