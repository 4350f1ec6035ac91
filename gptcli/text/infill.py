"""Filling in between a prefix and a suffix, by models that learnt it: three special tokens mark the parts.

A causal model writes the middle last: PREFIX prefix SUFFIX suffix MIDDLE, and goes on from there. Which tokens those
are tells only the vocabulary; a model without them has not learnt it. (Bavarian et al. 2022, "Efficient Training of
Language Models to Fill in the Middle", section 3.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptcli.text.tokenizer import Tokenizer

# The marks before prefix, suffix and middle: of OpenAI's, Qwen's and Gemma's tokenizers, StarCoder's, SantaCoder's,
# Granite's, CodeLlama's and DeepSeek's.
_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
# With which such models end what they fill in, besides the end of text that their configuration names.
_ENDS = ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>")
_OTHER_ENDS = ("<fim_pad>", "<file_sep>", "<fim-pad>", "▁<EOT>", "<｜end▁of▁sentence｜>")


@dataclass(frozen=True)
class Infill:
    """How a tokenizer has it.

    Attributes:
        prefix, suffix, middle: ids of the marks.
        ends: texts of special tokens with which a middle ends.
    """

    prefix: int
    suffix: int
    middle: int
    ends: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Infill | None:
        """None where there are no such tokens."""
        special = tokenizer.special_tokens
        for marks in _MARKS:
            if all(mark in special for mark in marks):
                ends = tuple(end for end in (*_ENDS, *_OTHER_ENDS, *marks) if end in special)
                prefix, suffix, middle = (special[mark] for mark in marks)
                return cls(prefix, suffix, middle, ends)
        return None

    def prompt(self, tokenizer: Tokenizer, before: Sequence[int], after: str) -> list[int]:
        """The ids to go on from, with the middle between ``before`` and ``after``.

        The tokenizer's start token goes first where it has one. Special tokens written out in ``after`` are text.
        """
        start = [] if tokenizer.start_id is None else [tokenizer.start_id]
        return [*start, self.prefix, *before, self.suffix, *tokenizer.encode(after), self.middle]
