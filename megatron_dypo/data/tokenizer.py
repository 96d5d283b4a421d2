"""Convert text <-> token ids, with a model folder's tokenizer or the built-in one. Ids are never re-tokenised."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from megatron_dypo.config.schema import Config
from megatron_dypo.data.arithmetic import arithmetic_tokens
from megatron_dypo.data.chat_template import ChatTemplate, end_ids, today
from megatron_dypo.data.traces import END_MARKERS, without_ends, without_opening
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape, hf_folder
from megatron_dypo.records import Prompt
from megatron_dypo.runtime.determinism import stable_hash


class Tokenizer:
    """Text <-> int32 ids, the same in data preparation, training and evaluation.

    - The ids of a **prompt** are what the model is asked with: a chat through the chat template, with the assistant's
      header; a plain string after the tokenizer's prefix (a begin token, or nothing), once, and without its suffix. A
      template that reads the clock reads ``day``.
    - The ids of a **trace** are what the model should say next. They end with ``eos_id`` and contain no other end: end
      markers at the end of the text are removed, one of ``end_ids`` inside is an error. What the prompt already opened
      (``<think>``) is not opened again.
    - A **response** ends at any of ``end_ids``, which belongs to it, for every engine and in the loss.

    ``eos_id`` is the end that the template writes after an assistant's message if it is one of ``end_ids``, else the
    first of these, the tokenizer's own.
    """

    def __init__(self, backend, *end_ids: int, plain_chat: bool = False, day: date | None = None):
        self._backend, self.end_ids, self._plain_chat = backend, end_ids, plain_chat
        self.size = len(backend)
        self.set_day(day or today())
        end = self.template.end_of_answer(end_ids) if self.template else None
        self.eos_id = end_ids[0] if end is None else end
        texts = [backend.decode([end], skip_special_tokens=False) for end in end_ids]
        self._ends = tuple(filter(None, texts))  # a model's end may not be a token of the tokenizer
        added = [str(token) for token in backend.added_tokens_decoder.values() if token.special]
        self._special = list(dict.fromkeys([*backend.all_special_tokens, *added]))
        self._markers = (*self._ends, *END_MARKERS)
        plain, whole = backend("a", add_special_tokens=False)["input_ids"], backend("a")["input_ids"]
        places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        self._begin = whole[: places[0]] if places else []

    def set_day(self, day: date) -> None:
        """Set the day that a template reading the clock sees."""
        self.day = day
        self.template = ChatTemplate(self._backend, day) if self._backend.chat_template else None

    @property
    def reads_clock(self) -> bool:
        """Return whether the ids of chats depend on the day."""
        return self.template is not None and self.template.reads_clock

    @property
    def template_digest(self) -> str | None:
        """Return a hash of the chat template, or None."""
        return None if self.template is None else f"{stable_hash(self.template.text):016x}"

    @property
    def vocabulary(self) -> int:
        """Return a 63-bit hash of every token and its id."""
        return stable_hash(*sorted(self._backend.get_vocab().items()))

    @property
    def digest(self) -> int:
        """Return a 63-bit hash of every token and its id, and of the end tokens."""
        return stable_hash(self.vocabulary, *sorted(self.end_ids))

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """Return the ids of a prompt, as described in the class.

        Raises UserError naming a prompt that the template or the tokenizer refuses, and for a chat without a chat
        template (unless plain joining is on).
        """
        try:
            return np.asarray(self._prompt_ids(prompt), dtype=np.int32)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"data: prompt {prompt.id} cannot be tokenized: {type(error).__name__}: {reason}") from None

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if prompt.messages and self.template:
            return self.template.ids(list(prompt.messages))
        if prompt.messages and not self._plain_chat:
            raise UserError(
                f"data: prompt {prompt.id} is a chat, and the tokenizer has no chat template (was "
                "chat_template.jinja left behind?); data.plain_chat: true joins the messages' texts with newlines"
            )
        ids = self._backend(joined(prompt), add_special_tokens=False)["input_ids"]
        return ids if self._begin and ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def encode_trace(self, trace: str, prompt: Prompt | None = None) -> np.ndarray:
        """Return the ids of a trace after ``prompt`` (None: any chat). Raises UserError for an end token in it."""
        opening = self.opening(prompt)
        text = self.without_ends(without_opening(trace, opening, self._special))
        ids = self._backend(text, add_special_tokens=False)["input_ids"]
        if not set(self.end_ids).isdisjoint(ids):
            where = f"prompt {prompt.id}: " if prompt else ""
            raise UserError(f"data: {where}a trace holds an end token before its end: {trace!r:.80}")
        return np.asarray([*ids, self.eos_id], dtype=np.int32)

    def opening(self, prompt: Prompt | None = None) -> str:
        """Return the text right before an answer to ``prompt`` (None: what the template writes before answers)."""
        if self.template and (prompt is None or prompt.messages):
            return self.template.text_before_answer(list(prompt.messages)) if prompt else self.template.opening
        return joined(prompt) if prompt else ""

    def end_inside(self, trace: str) -> str | None:
        """Return the end token that a trace contains before its end, or None."""
        text = self.without_ends(trace)
        return next((end for end in self._ends if end in text), None)

    def without_ends(self, text: str) -> str:
        """Return ``text`` without the end markers, of this model or others, at its end."""
        return without_ends(text, self._markers)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of a response without special tokens and its end."""
        said = ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids
        return self._backend.decode(said.tolist(), skip_special_tokens=True)

    def spelled(self, text: str) -> list[str]:
        """Return the special tokens spelled out in a text."""
        return [token for token in self._special if token in text]

    def show(self, ids: np.ndarray) -> str:
        """Return the text of the ids, special tokens included."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Save it as in a Hugging Face folder."""
        self._backend.save_pretrained(folder)


def joined(prompt: Prompt) -> str:
    """Join a prompt into one text, if there is no chat template."""
    return prompt.text or "\n".join(message["content"] for message in prompt.messages)


def load_tokenizer(config: Config, shape: ModelShape, day: date | None = None) -> Tokenizer:
    """Load the run's tokenizer; ``day`` is what a template that reads the clock sees (default: today).

    Raises UserError if it has no end token or its ids do not fit the model's vocabulary.
    """
    model = config.model
    folder = model.tokenizer or model.hf
    if folder is None:
        backend, name = arithmetic_backend(), "model.tokenizer: the built-in tokenizer"
    else:
        from megatron_dypo.data.tokenizer_backends import load_backend

        name = f"model.tokenizer: {folder}"
        try:
            backend = load_backend(Path(hf_folder(folder)), shape.vocab_size)
            if not backend.decode(backend("1 + 1 = 2")["input_ids"]):
                raise ValueError("it yields no tokens")
        except Exception as error:  # whatever transformers and tokenizers raise for foreign files
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: cannot be loaded: {type(error).__name__}: {reason}") from None
    if backend.eos_token_id is None:
        raise UserError(f"{name}: has no end-of-sequence token")
    if backend.chat_template and "\ufeff" in str(backend.chat_template):
        raise UserError(f"{name}: the chat template holds a byte order mark, which would be in every prompt: remove it")
    tokens = 1 + max(backend.get_vocab().values(), default=-1)  # ids need not be dense
    if tokens > shape.vocab_size:
        raise UserError(f"{name}: has {tokens} tokens, more than the model's vocabulary of {shape.vocab_size}")
    folders = [Path(hf_folder(each)) for each in dict.fromkeys((folder, model.hf)) if each]
    return Tokenizer(backend, *end_ids(backend, folders, shape.vocab_size), plain_chat=config.data.plain_chat, day=day)


def arithmetic_backend():
    """Build the built-in tokenizer: ``arithmetic.py`` and special tokens; a chat is its texts, one per line."""
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    backend = PreTrainedTokenizerFast(tokenizer_object=arithmetic_tokens(), **special)
    backend.chat_template = "{{ messages | map(attribute='content') | join('\n') }}"
    return backend
