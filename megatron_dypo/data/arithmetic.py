"""The built-in tokenizer's tokens. Apart from ``tokenizer.py``: the report reads them without torch."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, models

# One token each, so that a generated problem is its numbers and a few words; every other character is its own token.
WORDS = (
    "State the final answer to the following arithmetic problem: ",
    " \\boxed{",
    "first ",
    " then ",
    "last ",
    " back ",
)


def arithmetic_tokens() -> Tokenizer:
    """Printable ASCII, one token a character, plus ``WORDS``: 105 tokens in all."""
    characters = ["<pad>", "<eos>", "<unk>", *string.printable[:95], "\n"]
    tokens = Tokenizer(models.BPE({token: i for i, token in enumerate(characters)}, [], unk_token="<unk>"))
    tokens.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    tokens.decoder = decoders.Fuse()
    return tokens
