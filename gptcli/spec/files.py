"""The names of the files that hold the tokenizer in a model folder."""

from __future__ import annotations

# What holds the vocabulary.
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
# What holds it as well, and gptcli does not read (SentencePiece's: a protobuf, no pickle).
UNREAD = ("tokenizer.model",)
# What tells more of it, where it is there: special tokens, and how a conversation is written.
BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
