"""The graders that a worker process calls: math-verify, a reasoning-gym task's score, a user's function.

A few reasoning-gym tasks pass the answer to ``eval`` or to sympy's parser, which evaluates too. A policy rewarded by
them finds that out: one answer could then make every later one right. So for these tasks an answer may contain numbers,
operators, single letters and the functions of school mathematics, or quoted plain words, or be one word; no attributes,
no other names.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from megatron_dypo.runtime.user_code import load_function

_EVALUATES = re.compile(r"\b(?:eval|exec)\(|parse_expr|sympify")
_PLAIN = re.compile(r"[A-Za-z0-9]+")  # a single word names something and does nothing
_HEXADECIMAL = re.compile(r"\b0[xX][0-9A-Fa-f]+\b")
_QUOTED = re.compile(r"'[A-Za-z0-9 .,-]*'|\"[A-Za-z0-9 .,-]*\"")
_NAME = re.compile(r"[^\W\d]\w*")  # in any alphabet
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")
_KNOWN = {
    "sqrt", "cbrt", "root", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "log", "ln", "exp", "abs", "Abs", "pi", "oo", "True", "False", "None", "and", "or", "not", "Rational",
}  # fmt: skip


def evaluates_answers(task: Any) -> bool:
    """Return whether the module of a task's class evaluates text."""
    return bool(_EVALUATES.search(inspect.getsource(sys.modules[type(task).__module__])))


def is_safe_expression(answer: str) -> bool:
    """Return whether evaluating the answer cannot do more than take time."""
    if _PLAIN.fullmatch(answer.strip()):
        return True
    text = _HEXADECIMAL.sub(" ", answer)
    if "(" not in text:  # a call might evaluate the quoted text
        text = _QUOTED.sub(" ", text)
    if _ATTRIBUTE.search(text) or any(sign in text for sign in ("__", "'", '"', "\\", "`", "@", ":=")):
        return False
    return all(len(name) == 1 or name in _KNOWN for name in _NAME.findall(text))


Grader = Callable[..., float]


class Unscored(Exception):
    """Raised if a function returns something that is not a score."""


def load(function: str) -> Grader:
    """Return the grader of a ``reward.function``, fully imported. Raises anything that a user's module raises."""
    if function == "math":
        from megatron_dypo.reward import equivalence

        equivalence.load()
        return equivalence.equivalent
    if function == "reasoning_gym":
        return _task_score
    return _own(function)


def _task_score(source: str, index: int, question: str, truth: str, answer: str) -> float:
    """Return the task's score of an answer, partial credit included; the item is rebuilt from its seed.

    Raises Unscored if that yields a different item: a few tasks iterate over sets, whose order differs between
    processes.
    """
    dataset = _dataset(source)
    item = dataset[index]
    if question != item["question"] if question else truth != str(item["answer"]):
        raise Unscored("the task builds another item in each process: set PYTHONHASHSEED for the whole run")
    if evaluates_answers(dataset) and not is_safe_expression(answer):
        return 0.0
    try:
        value = dataset.score_answer(answer, entry=item)
    except Exception:  # several tasks parse an answer unchecked: an unreadable one is wrong
        return 0.0
    return score_of(value)


@lru_cache(maxsize=16)
def _dataset(source: str) -> Any:
    from megatron_dypo.data.tasks import dataset

    return dataset(source)


def _own(function: str) -> Grader:
    """Return a user's function, called as verl calls it."""
    compute = load_function(function)
    keywords = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
    inspect.signature(compute).bind(**keywords)

    def grade(data_source: str, solution: str, ground_truth: str, extra_info: dict) -> float:
        return score_of(
            compute(data_source=data_source, solution_str=solution, ground_truth=ground_truth, extra_info=extra_info)
        )

    return grade


def score_of(value: Any) -> float:
    """Return a number, a bool, or the ``score`` of a dict as a float. Raises Unscored for anything else."""
    if isinstance(value, dict):
        if "score" not in value:
            raise Unscored("returned a dict without a score")
        value = value["score"]
    if isinstance(value, str) or (not hasattr(value, "__float__") and not hasattr(value, "__index__")):
        raise Unscored(f"returned {type(value).__name__}, not a number")
    score = float(value)
    if not math.isfinite(score):
        raise Unscored(f"returned {score}, not a number")
    return score
