"""Answers that a reasoning-gym task would evaluate as Python: which of them are mathematics and nothing else.

A few tasks hand the answer to ``eval`` or to sympy's parser, which evaluates, too. A policy that is rewarded for it
finds that out: one answer could then make every later one right. So in these tasks an answer may hold numbers,
operators, single letters and the functions of school mathematics, or quoted plain words, or be one word; no attribute,
no other name.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

_EVALUATES = re.compile(r"\b(?:eval|exec)\(|parse_expr|sympify")
_PLAIN = re.compile(r"[A-Za-z0-9]+")  # one word by itself names something, and does nothing
_HEXADECIMAL = re.compile(r"\b0[xX][0-9A-Fa-f]+\b")
_QUOTED = re.compile(r"'[A-Za-z0-9 .,-]*'|\"[A-Za-z0-9 .,-]*\"")
_NAME = re.compile(r"[^\W\d]\w*")  # of any alphabet
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")
_KNOWN = {
    *("sqrt", "cbrt", "root", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("log", "ln", "exp", "abs", "Abs", "pi", "oo", "True", "False", "None", "and", "or", "not", "Rational"),
}


def evaluates(task: Any) -> bool:
    """Whether the module of a task's class evaluates text."""
    return bool(_EVALUATES.search(inspect.getsource(sys.modules[type(task).__module__])))


def harmless(answer: str) -> bool:
    """Whether evaluating the answer can do no more than take its time."""
    if _PLAIN.fullmatch(answer.strip()):
        return True
    text = _HEXADECIMAL.sub(" ", answer)
    if "(" not in text:  # a call might evaluate what is quoted
        text = _QUOTED.sub(" ", text)
    if _ATTRIBUTE.search(text) or any(sign in text for sign in ("__", "'", '"', "\\", "`", "@", ":=")):
        return False
    return all(len(name) == 1 or name in _KNOWN for name in _NAME.findall(text))
