r"""Read the option that an answer names: ``C``, ``(C)``, ``C.``, ``C) some text``, ``option C``; or a digit."""

from __future__ import annotations

import re
from collections import deque

from megatron_dypo.reward.answer import Extract, final_answer
from megatron_dypo.reward.math import bare_truth
from megatron_dypo.reward.normalize import canonical, unicode_math

_LABEL = re.compile(
    r"(?:(?:the )?(?:final |correct )?(?:answer|option|choice)(?: is)?\s?:? ?)?"
    r"(?:\(([A-Za-z]|[0-9])\)|([A-Za-z]|[0-9])(?:[).:](?=\s|$)|$))(?: (.*))?",
    re.IGNORECASE | re.DOTALL,
)
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|rm)\s*\{([^{}]*)\}")
_SECOND = re.compile(r"(?:or|and)\b|[,/&]|.*\([A-Z]\)|.*\b(?:or|and) [A-Z]\b", re.DOTALL)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice)(?:\s{1,3}is)?\s{0,3}:?\s{0,3}[*$]{0,3}"
    r"(?:\(([A-Z]|[0-9])\)|([A-Z]|[0-9])(?=[).:,;*$!]|\s*$|\s*\n))",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\s*[*$]{0,3}\(?([A-Z]|[0-9])\)?[*$.]{0,3}\s*")
_LONGEST = 2_000  # characters of a label with its text


def label(answer: str) -> str | None:
    """Return the one option that all of ``answer`` names, in upper case; None if it names none, or two."""
    text = canonical(_WRAPPER.sub(r"\1", answer[: _LONGEST + 1])).replace("**", "")
    match = _LABEL.fullmatch(text) if len(text) <= _LONGEST else None
    if not match or (match[3] and _SECOND.match(match[3])):
        return None
    return (match[1] or match[2]).upper()


def chosen(response: str, extract: Extract) -> str | None:
    """Return the option that a response's final answer chooses; with ``number``, also the last phrase naming one.

    Such a phrase is "the answer is (C)", or a last line of nothing but ``C``.
    """
    answer = final_answer(response, "boxed" if extract == "boxed" else "marked")
    if answer is not None:
        return label(answer)
    if extract != "number":
        return None
    text = unicode_math(response)
    if phrases := deque(_PHRASE.finditer(text), maxlen=1):
        return (phrases[0][1] or phrases[0][2]).upper()
    alone = _ALONE.fullmatch(text.rstrip().rpartition("\n")[2])
    return alone[1] if alone else None


def true_label(ground_truth: str) -> str | None:
    """Return the option that a ground truth names, or None."""
    return label(bare_truth(ground_truth))
