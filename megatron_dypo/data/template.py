"""A tokenizer's chat template: the prompt that it makes of messages, what it writes around an answer, its clock."""

from __future__ import annotations

import functools
import itertools
import re
from datetime import UTC, date, datetime, time
from typing import Any

from jinja2 import TemplateError

_CLOCK = re.compile(r"\bstrftime_now\b")
_TAIL = 400  # characters: longer than any header of an answer
_PROBE = "PROBE7"  # an assistant's message that a template has no reason to change


class ChatTemplate:
    """The template of a transformers tokenizer that has one. What it asks the clock for is the midnight of ``day``.

    Raises whatever Jinja and transformers raise on messages that the template refuses.
    """

    def __init__(self, backend: Any, day: date):
        self._backend, self.day = backend, day

    @property
    def text(self) -> str:
        """Its source; of several by name, all."""
        template = self._backend.chat_template
        return template if isinstance(template, str) else repr(sorted(template.items()))

    @property
    def reads_clock(self) -> bool:
        """Whether prompts depend on the day."""
        return _CLOCK.search(self.text) is not None

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The messages and the beginning of the assistant's answer."""
        return self._apply(messages, True, tokenize=True, return_dict=False)

    def text_before_answer(self, messages: list[dict[str, str]]) -> str:
        """The end of the prompt that the messages become, as text."""
        return self._apply(messages, True)[-_TAIL:]

    @functools.cached_property
    def opening(self) -> str:
        """What the template writes before an answer: a header, with some models the begin of a thought; "" if nothing.

        Templates that refuse a lone question, or depend on it, are taken to write nothing.
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
        """What the template writes after an assistant's message; "" if nothing, or if it refuses such a chat."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            return self._apply(chat, False).partition(_PROBE)[2]
        except (TemplateError, TypeError, ValueError):
            return ""

    def end_of_answer(self, ends: tuple[int, ...]) -> int | None:
        """The first of the ``ends`` in the ``closing``; None if there is none."""
        ids = self._backend(self.closing, add_special_tokens=False)["input_ids"] if self.closing else []
        return next((index for index in ids if index in ends), None)

    def _apply(self, messages: list[dict[str, str]], answer: bool, tokenize: bool = False, **options: Any) -> Any:
        now = datetime.combine(self.day, time())
        return self._backend.apply_chat_template(
            messages, add_generation_prompt=answer, tokenize=tokenize, strftime_now=now.strftime, **options
        )


def today() -> date:
    """The same on machines of all time zones."""
    return datetime.now(UTC).date()
