"""TextStream: token bytes in, text out, never half a character."""

from __future__ import annotations

import codecs


class TextStream:
    """Decodes UTF-8 as it arrives; the bytes of an unfinished character are kept back until the rest has come.

    Bytes that can never become a character turn into U+FFFD, as ``bytes.decode(errors="replace")`` would have it:
    the pieces joined are the decoding of all bytes joined.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The text that is now certain."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: a character cut short becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)
