"""Apply a tokenizer's chat template, and find the tokens that end a response.

The ends are those named by the model folder's ``generation_config.json``, and the tokenizer's own. transformers stops
at the former, vLLM at both. Llama-3-Instruct ends a turn with ``<|eot_id|>`` while its first release's tokenizer names
``<|end_of_text|>``; Qwen2.5-Instruct has ``<|im_end|>`` and ``<|endoftext|>``.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from megatron_dypo.errors import UserError

log = logging.getLogger(__name__)

_CLOCK = re.compile(r"\bstrftime_now\b")
_TAIL = 400  # characters: longer than the header of any answer
_PROBE = "PROBE7"  # an assistant message that no template should change


class ChatTemplate:
    """The chat template of a transformers tokenizer; to the template, the time is midnight of ``day``.

    Raises whatever Jinja and transformers raise for messages that the template refuses.
    """

    def __init__(self, backend: Any, day: date):
        self._backend, self.day = backend, day

    @property
    def text(self) -> str:
        """Return its source; all sources, if there are several by name."""
        template = self._backend.chat_template
        return template if isinstance(template, str) else repr(sorted(template.items()))

    @property
    def reads_clock(self) -> bool:
        """Return whether prompts depend on the day."""
        return _CLOCK.search(self.text) is not None

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of the messages and of the assistant's header."""
        return self._apply(messages, True, tokenize=True, return_dict=False)

    def text_before_answer(self, messages: list[dict[str, str]]) -> str:
        """Return the end of the prompt made of the messages, as text."""
        return self._apply(messages, True)[-_TAIL:]

    @functools.cached_property
    def opening(self) -> str:
        """Return what the template writes before an answer: a header, perhaps a thought's tag; "" if nothing.

        Templates that refuse a lone question, or depend on it, count as writing nothing.
        """
        question = [{"role": "user", "content": _PROBE}]
        try:
            before, after = self._apply(question, False), self._apply(question, True)
        except (TemplateError, TypeError, ValueError):
            return ""
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        return after[same:]

    @functools.cached_property
    def closing(self) -> str:
        """Return what the template writes after an assistant's message; "" if nothing, or if it refuses such a chat."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            return self._apply(chat, False).partition(_PROBE)[2]
        except (TemplateError, TypeError, ValueError):
            return ""

    def end_of_answer(self, ends: tuple[int, ...]) -> int | None:
        """Return the first of ``ends`` in ``closing``; None if there is none."""
        ids = self._backend(self.closing, add_special_tokens=False)["input_ids"] if self.closing else []
        return next((index for index in ids if index in ends), None)

    def _apply(self, messages: list[dict[str, str]], answer: bool, tokenize: bool = False, **options: Any) -> Any:
        now = datetime.combine(self.day, time())
        return self._backend.apply_chat_template(
            messages, add_generation_prompt=answer, tokenize=tokenize, strftime_now=now.strftime, **options
        )


def today() -> date:
    """Return the current day in UTC, the same on machines in all time zones."""
    return datetime.now(UTC).date()


def end_ids(backend: Any, folders: list[Path], vocab_size: int) -> tuple[int, ...]:
    """Return the tokenizer's end token, then every end that ``folders`` name, in their order.

    The first folder is the tokenizer's. Ids of the others count if they are special tokens of this tokenizer, and are
    otherwise ignored with a warning. Raises UserError for an end that is not a token id.
    """
    special = {index for index, token in backend.added_tokens_decoder.items() if token.special}
    found = [backend.eos_token_id]
    for number, folder in enumerate(folders):
        for index in named_ends(folder):
            if index < vocab_size and (number == 0 or index in special):
                found.append(index)
                if index not in backend.added_tokens_decoder and index != backend.eos_token_id:
                    token = backend.convert_ids_to_tokens(index)
                    why = "not a special token of the tokenizer, but still ends responses"
                    log.warning("%s: its end token %d (%r) is %s", folder, index, token, why)
            else:
                why = "beyond the model's vocabulary" if index >= vocab_size else "not a special token of the tokenizer"
                log.warning("%s: its end token %d is %s: ignored", folder, index, why)
    return tuple(dict.fromkeys(found))


def named_ends(folder: Path) -> list[int]:
    """Return ``eos_token_id`` of ``generation_config.json``, or else of ``config.json``, as transformers does."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = _object(path).get("eos_token_id") if path.is_file() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, got {value!r:.80}")
        return ids
    return []


def _object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object")
    return tree
