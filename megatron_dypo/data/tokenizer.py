"""Text <-> token ids: a model folder's tokenizer, or the built-in one for arithmetic. Ids are never re-tokenised."""

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
    """Text <-> int32 ids, the same in preparing data, training and evaluation. What ids they are:

    - A **prompt's** are what the model is asked with: a chat through the chat template, the assistant's header
      included; a plain string after what the tokenizer puts before a text (a begin token, or nothing), once. Nothing is
      put after it, whatever the tokenizer does. A template that reads the clock reads ``day``.
    - A **trace's** are what the model is to say next. They end with ``eos_id`` and hold no other end: markers of ends
      at the end of its text are taken off, one of ``end_ids`` inside it is an error. What the prompt's end has begun
      already (``<think>``) is not begun again.
    - A **response** ends at any of the ``end_ids``, which is part of it, for every engine and in the loss.

    ``eos_id`` is the end that the template puts after an assistant's message if it is one of ``end_ids``, else the
    first of these, which is the tokenizer's own.
    """

    def __init__(self, backend, *end_ids: int, plain_chat: bool = False, day: date | None = None):
        self._backend, self.end_ids, self._plain_chat = backend, end_ids, plain_chat
        self.size = len(backend)
        self.set_day(day or today())
        end = self.template.end_of_answer(end_ids) if self.template else None
        self.eos_id = end_ids[0] if end is None else end
        texts = [backend.decode([end], skip_special_tokens=False) for end in end_ids]
        self._ends = tuple(filter(None, texts))  # a model's end may be no token of the tokenizer
        added = [str(token) for token in backend.added_tokens_decoder.values() if token.special]
        self._special = list(dict.fromkeys([*backend.all_special_tokens, *added]))
        self._markers = (*self._ends, *END_MARKERS)
        plain, whole = backend("a", add_special_tokens=False)["input_ids"], backend("a")["input_ids"]
        places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
        self._begin = whole[: places[0]] if places else []

    def set_day(self, day: date) -> None:
        """What a template that reads the clock takes for today."""
        self.day = day
        self.template = ChatTemplate(self._backend, day) if self._backend.chat_template else None

    @property
    def reads_clock(self) -> bool:
        """Whether the ids of chats depend on the day."""
        return self.template is not None and self.template.reads_clock

    @property
    def template_digest(self) -> str | None:
        """A hash of the chat template; None where there is none."""
        return None if self.template is None else f"{stable_hash(self.template.text):016x}"

    @property
    def vocabulary(self) -> int:
        """63-bit hash of every token and its id."""
        return stable_hash(*sorted(self._backend.get_vocab().items()))

    @property
    def digest(self) -> int:
        """63-bit hash of every token and its id, and of the end tokens."""
        return stable_hash(self.vocabulary, *sorted(self.end_ids))

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """A prompt's ids, as the class says.

        Raises UserError naming a prompt that the template or the tokenizer refuses, and a chat where there is no
        template (and plain joining was not asked for).
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
        """A trace's ids, as the class says, after ``prompt`` (None: any chat). Raises UserError for an end in it."""
        opening = self.opening(prompt)
        text = self.without_ends(without_opening(trace, opening, self._special))
        ids = self._backend(text, add_special_tokens=False)["input_ids"]
        if not set(self.end_ids).isdisjoint(ids):
            where = f"prompt {prompt.id}: " if prompt else ""
            raise UserError(f"data: {where}a trace holds an end token before its end: {trace!r:.80}")
        return np.asarray([*ids, self.eos_id], dtype=np.int32)

    def opening(self, prompt: Prompt | None = None) -> str:
        """The text right before an answer to ``prompt``, or its end; None: what the template writes before answers."""
        if self.template and (prompt is None or prompt.messages):
            return self.template.text_before_answer(list(prompt.messages)) if prompt else self.template.opening
        return joined(prompt) if prompt else ""

    def end_inside(self, trace: str) -> str | None:
        """The end token that a trace holds before its end; None where it holds none."""
        text = self.without_ends(trace)
        return next((end for end in self._ends if end in text), None)

    def without_ends(self, text: str) -> str:
        """``text`` without the markers of ends, of this model's or others', that it ends with."""
        return without_ends(text, self._markers)

    def decode(self, ids: np.ndarray) -> str:
        """Text of a response, special tokens and its end left out."""
        said = ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids
        return self._backend.decode(said.tolist(), skip_special_tokens=True)

    def spelled(self, text: str) -> list[str]:
        """Special tokens that a text spells."""
        return [token for token in self._special if token in text]

    def show(self, ids: np.ndarray) -> str:
        """Text of the ids, special tokens included."""
        return self._backend.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """As a Hugging Face folder has it."""
        self._backend.save_pretrained(folder)


def joined(prompt: Prompt) -> str:
    """A prompt as one text, for where there is no chat template."""
    return prompt.text or "\n".join(message["content"] for message in prompt.messages)


def load_tokenizer(config: Config, shape: ModelShape, day: date | None = None) -> Tokenizer:
    """The run's tokenizer; ``day`` is what a template that reads the clock is given (default: today).

    Raises UserError where it has no end token or its ids do not fit the model's vocabulary.
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
        except Exception as error:  # whatever transformers and tokenizers raise on files that are not theirs
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
    """The built-in tokens (``arithmetic.py``) with their special ones; a chat is its texts, a line each."""
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    backend = PreTrainedTokenizerFast(tokenizer_object=arithmetic_tokens(), **special)
    backend.chat_template = "{{ messages | map(attribute='content') | join('\n') }}"
    return backend
