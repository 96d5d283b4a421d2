"""What a worker process calls on a job's arguments: math-verify, a reasoning-gym task's score, a user's function.

A few reasoning-gym tasks hand the answer to ``eval`` or to sympy's parser, which evaluates, too. A policy that is
rewarded for it finds that out: one answer could then make every later one right. So in these tasks an answer may hold
numbers, operators, single letters and the functions of school mathematics, or quoted plain words, or be one word; no
attribute, no other name.
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
_PLAIN = re.compile(r"[A-Za-z0-9]+")  # one word by itself names something, and does nothing
_HEXADECIMAL = re.compile(r"\b0[xX][0-9A-Fa-f]+\b")
_QUOTED = re.compile(r"'[A-Za-z0-9 .,-]*'|\"[A-Za-z0-9 .,-]*\"")
_NAME = re.compile(r"[^\W\d]\w*")  # of any alphabet
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]")
_KNOWN = {
    "sqrt", "cbrt", "root", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "log", "ln", "exp", "abs", "Abs", "pi", "oo", "True", "False", "None", "and", "or", "not", "Rational",
}  # fmt: skip


def evaluates_answers(task: Any) -> bool:
    """Whether the module of a task's class evaluates text."""
    return bool(_EVALUATES.search(inspect.getsource(sys.modules[type(task).__module__])))


def is_safe_expression(answer: str) -> bool:
    """Whether evaluating the answer can do no more than take its time."""
    if _PLAIN.fullmatch(answer.strip()):
        return True
    text = _HEXADECIMAL.sub(" ", answer)
    if "(" not in text:  # a call might evaluate what is quoted
        text = _QUOTED.sub(" ", text)
    if _ATTRIBUTE.search(text) or any(sign in text for sign in ("__", "'", '"', "\\", "`", "@", ":=")):
        return False
    return all(len(name) == 1 or name in _KNOWN for name in _NAME.findall(text))


Grader = Callable[..., float]


class Unscored(Exception):
    """A function returned what is no score."""


def load(function: str) -> Grader:
    """The grader of a ``reward.function``, with everything imported. Raises whatever a user's module raises."""
    if function == "math":
        from megatron_dypo.reward import equivalence

        equivalence.load()
        return equivalence.equivalent
    if function == "reasoning_gym":
        return _task_score
    return _own(function)


def _task_score(source: str, index: int, question: str, truth: str, answer: str) -> float:
    """The task's score of an answer, partial credit included; the item is built again from its seed.

    Raises Unscored where that gives another item: a few tasks go through sets, whose order is another in each process.
    """
    dataset = _dataset(source)
    item = dataset[index]
    if question != item["question"] if question else truth != str(item["answer"]):
        raise Unscored("the task builds another item in each process: set PYTHONHASHSEED for the whole run")
    if evaluates_answers(dataset) and not is_safe_expression(answer):
        return 0.0
    try:
        value = dataset.score_answer(answer, entry=item)
    except Exception:  # several tasks read an answer without a check: what they cannot read is wrong
        return 0.0
    return score_of(value)


@lru_cache(maxsize=16)
def _dataset(source: str) -> Any:
    from megatron_dypo.data.tasks import dataset

    return dataset(source)


def _own(function: str) -> Grader:
    """A user's function, called as verl calls it."""
    compute = load_function(function)
    keywords = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
    inspect.signature(compute).bind(**keywords)

    def grade(data_source: str, solution: str, ground_truth: str, extra_info: dict) -> float:
        return score_of(
            compute(data_source=data_source, solution_str=solution, ground_truth=ground_truth, extra_info=extra_info)
        )

    return grade


def score_of(value: Any) -> float:
    """A number, a bool, or a dict with one as its ``score``, as a float. Raises Unscored for anything else."""
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
