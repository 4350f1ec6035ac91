"""How a single token is shown: on one line, with what can't be seen made visible."""

from __future__ import annotations

from gptcli.cli.out import harmless


def visible(data: bytes) -> str:
    """Token bytes on one line: text where they are text, backslash escapes for line ends and halves of characters."""
    try:
        text = data.decode("utf-8").replace("\\", "\\\\")
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="backslashreplace")
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def quoted(data: bytes) -> str:
    """Token bytes between quotes, so that a space at either end is seen: ``" the"``. A quote inside has a backslash."""
    shown = visible(data).replace('"', '\\"')
    return f'"{shown}"'


def label(text: str) -> str:
    """A text as ``quoted`` shows a token's."""
    return quoted(text.encode("utf-8", errors="surrogatepass"))
