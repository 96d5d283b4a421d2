"""What a worker process calls on a job's arguments: math-verify, a reasoning-gym task's score, a user's function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_dypo.reward.harmless import evaluates, harmless

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
    if evaluates(dataset) and not harmless(answer):
        return 0.0
    try:
        value = dataset.score_answer(answer, entry=item)
    except Exception:  # several tasks read an answer without a check: what they cannot read is wrong
        return 0.0
    return score_of(value)


@lru_cache(maxsize=16)
def _dataset(source: str) -> Any:
    from megatron_dypo.data.reasoning_gym_task import dataset

    return dataset(source)


def _own(function: str) -> Grader:
    """A user's function, called as verl calls it."""
    where, _, name = function.rpartition(":")
    compute = getattr(_module(where), name, None)
    if compute is None:
        raise AttributeError(f"{where} has no {name}")
    keywords = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"))
    inspect.signature(compute).bind(**keywords)

    def grade(data_source: str, solution: str, ground_truth: str, extra_info: dict) -> float:
        return score_of(
            compute(data_source=data_source, solution_str=solution, ground_truth=ground_truth, extra_info=extra_info)
        )

    return grade


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        sys.path.insert(0, os.getcwd())  # as ``python -m`` would find it
        return importlib.import_module(where)
    path = Path(where).resolve()
    if not path.is_file():
        raise FileNotFoundError("no such file")
    sys.path.insert(0, str(path.parent))  # for modules beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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
