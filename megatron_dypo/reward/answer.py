r"""Finds the final answer of a response: its last box, what follows its last ``####``, or its last number."""

from __future__ import annotations

import re
from collections import deque
from typing import Literal

from megatron_dypo.reward.boxed import last_boxed
from megatron_dypo.reward.characters import plain

Extract = Literal["boxed", "marked", "number"]

_MARK = "####"
# A sign counts where no digit, letter or bracket stands before it: the last number of "12-5" is 5.
_DIGITS = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(rf"(?:(?<![0-9A-Za-z)\]}}.,])-\s?)?(?:\\?\$\s?)?{_DIGITS}(?:/{_DIGITS})?(?:\s?\\?%)?")
_DASH = re.compile("[\u2012-\u2015](?=\\s)")  # of a sentence: no sign stands apart from its number
_CURRENCY = re.compile(r"\\?\$\s?")


def final_answer(text: str, extract: Extract) -> str | None:
    r"""The final answer of a response as it stands there; None without one. Time is linear in ``len(text)``.

    boxed   the content of the last complete ``\boxed{}``
    marked  or, without a box, the rest of the line after the last ``####``
    number  or, without either, the last number: ``$1,234.50`` (without its currency sign), ``-3/4``, ``50%``
    """
    answer = last_boxed(text)
    if answer is None and extract != "boxed":
        answer = _marked(text)
    if answer is None and extract == "number":
        answer = _last_number(text)
    return answer


def _marked(text: str) -> str | None:
    _, mark, rest = text.rpartition(_MARK)
    lines = rest.lstrip().splitlines() if mark else []
    return lines[0].strip() if lines else None


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(plain(_DASH.sub(" ", text))), maxlen=1)
    return _CURRENCY.sub("", last[0][0]) if last else None
