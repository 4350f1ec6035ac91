"""Words as single tokens: only such a word has a row in the embedding table."""

from __future__ import annotations

from gptcli.errors import UsageError
from gptcli.text.expression import quote
from gptcli.text.tokenizer import Tokenizer


def single_token(tokenizer: Tokenizer, word: str, *, special: bool = False) -> int:
    """The id of the one token that a word is.

    Raises UsageError for a word of several tokens; the hint offers the forms of it that are one.
    """
    ids = tokenizer.encode(word, special=special, follows=True)
    if len(ids) == 1:
        return ids[0]
    if not ids:
        raise UsageError("an empty word has no row in the table", "give a word")
    pieces = " + ".join(quote(tokenizer.token_text(id_)) for id_ in ids[:6]) + (" + ..." if len(ids) > 6 else "")
    found = forms(tokenizer, word)
    if word.endswith("\n") and word.count("\n") == 1 and not found:
        hint = "the line end belongs to it: --lines takes each line as a word, --strip takes it off"
    elif found:
        hint = "one token each: " + ", ".join(map(quote, found))
    else:
        hint = "no other form of it, with a space before it or a capital, is one token either: choose another word"
    raise UsageError(f"{_short(word)} is {len(ids)} tokens ({pieces}), and a row of the table is one token", hint)


def forms(tokenizer: Tokenizer, word: str) -> list[str]:
    """The forms of a word that are single tokens: with and without a space before it, as it is, small, with a capital,
    all capitals; without the word itself.
    """
    bare = word.strip()
    ways = dict.fromkeys([bare, bare.lower(), bare[:1].upper() + bare[1:].lower(), bare.upper()])
    tries = [space + way for way in ways if way for space in (" ", "")]
    return [form for form in tries if form != word and len(tokenizer.encode(form, follows=True)) == 1]


def _short(word: str) -> str:
    shown = quote(word)
    return shown if len(shown) <= 60 else shown[:58] + '..."'
