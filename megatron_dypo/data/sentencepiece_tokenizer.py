"""A folder's SentencePiece model (``tokenizer.model``), run by the sentencepiece library itself.

transformers would rebuild it for the library tokenizers, and there indentation and prefix spaces get other ids
(docs/data.md has the counts). What is left to do here: the model's control pieces are special tokens, and what lies
between them is decoded by sentencepiece.
"""

from __future__ import annotations

import itertools
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

ROLES = ("unk", "bos", "eos", "pad")


class SentencePieceTokenizer(SentencePieceBackend):
    """transformers' interface to the model: ``from_pretrained(folder)`` reads the chat template and the settings.

    What the settings leave open is the model's own: which pieces begin and end a text, and a begin token before every
    prompt that is not a chat. Raises ValueError for ``legacy: false``, which no library but transformers tokenizes.
    """

    def __init__(self, **options: Any):
        if options.get("legacy") is False:
            raise ValueError("tokenizer_config.json has legacy: false: save it as a tokenizer.json with transformers")
        model = SentencePieceProcessor(model_file=options["vocab_file"])
        for role in ROLES:
            index = getattr(model, f"{role}_id")()
            if index >= 0:
                options.setdefault(f"{role}_token", model.id_to_piece(index))
        control = [model.id_to_piece(i) for i in range(len(model)) if model.is_control(i)]
        options["extra_special_tokens"] = [*(options.get("extra_special_tokens") or ()), *control]
        begins = options.setdefault("add_bos_token", True) and options.get("bos_token") is not None
        ends = options.setdefault("add_eos_token", False)
        pattern = {(True, True): "bos_eos", (True, False): "bos", (False, True): "eos"}
        super().__init__(**options, special_tokens_pattern=pattern.get((bool(begins), bool(ends)), "none"))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of the pieces; added tokens stand for themselves, and each run between them is a text of its own."""
        runs = itertools.groupby(tokens, key=self.added_tokens_encoder.__contains__)
        return "".join("".join(run) if added else self.sp_model.decode_pieces(list(run)) for added, run in runs)
