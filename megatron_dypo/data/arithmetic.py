"""Define the built-in tokenizer's tokens, apart from ``tokenizer.py`` so that the report needs no torch."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models

# One token each, so that a generated problem is its numbers and a few words; any other character is a token itself.
WORDS = (
    "State the final answer to the following arithmetic problem: ",
    " \\boxed{",
    "first ",
    " then ",
    "last ",
    " back ",
)


def arithmetic_tokens() -> Tokenizer:
    """Build a tokenizer of printable ASCII, one token per character, and ``WORDS``: 105 tokens in all."""
    characters = ["<pad>", "<eos>", "<unk>", *string.printable[:95], "\n"]
    tokens = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, [], unk_token="<unk>"))
    tokens.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokens.decoder = decoders.Fuse()
    return tokens
