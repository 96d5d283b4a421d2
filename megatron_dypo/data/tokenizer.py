"""Text <-> token ids: a model folder's tokenizer, or the built-in one for arithmetic. Ids are never re-tokenised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from megatron_dypo.config.schema import Config
from megatron_dypo.data.arithmetic import arithmetic_tokens
from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape, hf_folder
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.seeding import stable_hash


class Tokenizer:
    """Prompts, traces and responses as int32 ids; ``eos_id`` ends every trace and every finished response."""

    def __init__(self, backend, eos_id: int):
        self._backend, self.eos_id = backend, eos_id
        self.size = len(backend)

    @property
    def digest(self) -> int:
        """63-bit hash of every token and its id, and of the end token."""
        return stable_hash(self.eos_id, *sorted(self._backend.get_vocab().items()))

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """The ids the policy is asked with: through the chat template where messages and a template exist.

        Raises UserError naming a prompt that the template or the tokenizer refuses.
        """
        try:
            return np.asarray(self._prompt_ids(prompt), dtype=np.int32)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"data: prompt {prompt.id} cannot be tokenized: {type(error).__name__}: {reason}") from None

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt.messages and self._backend.chat_template:
            return self._backend.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        text = prompt.text or "\n".join(message["content"] for message in prompt.messages)
        return self._backend(text)["input_ids"]

    def encode_trace(self, trace: str) -> np.ndarray:
        """A teacher's trace and the end token."""
        return np.asarray([*self._backend(trace, add_special_tokens=False)["input_ids"], self.eos_id], dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of a response, special tokens left out."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """As a Hugging Face folder has it."""
        self._backend.save_pretrained(folder)


def load_tokenizer(config: Config, shape: ModelShape) -> Tokenizer:
    """The run's tokenizer. Raises UserError where it has no end token or its ids do not fit the model's vocabulary."""
    folder = config.model.tokenizer or config.model.hf
    if folder is None:
        backend, name = arithmetic_backend(), "model.tokenizer: the built-in tokenizer"
    else:
        from megatron_dypo.data.backend import load_backend

        name = f"model.tokenizer: {folder}"
        try:
            backend = load_backend(Path(hf_folder(folder)), shape.vocab_size)
            if not backend.decode(backend("1 + 1 = 2")["input_ids"]):
                raise ValueError("it gives no tokens")
        except Exception as error:  # whatever transformers and tokenizers raise on files that are not theirs
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: cannot be loaded: {type(error).__name__}: {reason}") from None
    if backend.eos_token_id is None:
        raise UserError(f"{name}: has no end-of-sequence token")
    tokens = 1 + max(backend.get_vocab().values(), default=-1)  # ids need not be dense
    if tokens > shape.vocab_size:
        raise UserError(f"{name}: has {tokens} tokens, more than the model's vocabulary of {shape.vocab_size}")
    return Tokenizer(backend, backend.eos_token_id)


def arithmetic_backend():
    """The built-in tokens (``arithmetic.py``) with their pad, end and unknown token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=arithmetic_tokens(), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
