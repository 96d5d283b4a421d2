r"""Generate tasks: ``reasoning_gym:TASK?option=value&...`` -> prompts, some with two algorithmic teachers.

The teachers solve a sum in different orders, so their traces differ in every intermediate result:

    left   7 - 2 + 8:  first 7-2=5 then 5+8=13 \boxed{13}
    last   7 - 2 + 8:  last 7+8=15 back 15-2=13 \boxed{13}

reasoning-gym seeds item i with seed + i (0 + i without one): use distant seeds for training and held-out sets. Overlaps
are removed anyway.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from megatron_dypo.config.yaml_text import parse_yaml
from megatron_dypo.errors import UserError
from megatron_dypo.records import Prompt, Teacher

log = logging.getLogger(__name__)
PREFIX = "reasoning_gym:"


def _worked_sum(expression: str, backwards: bool, words: tuple[str, str]) -> str:
    """Write out ``a + b - c ...`` term by term, from the left or from the last term back."""
    first, *rest = expression.split()
    steps = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    total, lines = int(first), []
    for i, (sign, term) in enumerate(reversed(steps) if backwards else steps):
        after = total + term if sign == "+" else total - term
        lines.append(f"{words[min(i, 1)]} {total}{sign}{term}={after}")
        total = after
    return " ".join(lines) + f" \\boxed{{{total}}}"


def _left(item: dict) -> str:
    return _worked_sum(item["metadata"]["expression"], False, ("first", "then"))


def _last(item: dict) -> str:
    return _worked_sum(item["metadata"]["expression"], True, ("last", "back"))


TEACHERS: dict[str, dict[str, Callable[[dict], str]]] = {"chain_sum": {"left": _left, "last": _last}}


def dataset(task: str) -> Any:
    """Build the data set of ``TASK?option=value&...``, the same in every process; the default ``seed`` is 0.

    Raises whatever the task raises for invalid options.
    """
    import reasoning_gym

    name, _, query = task.partition("?")
    options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    return reasoning_gym.create_dataset(name, **{"seed": 0} | {option: parse_yaml(value) for option, value in options})


def generate(source: str) -> list[Prompt]:
    """Generate all items of the task. Raises UserError for an unknown task or option.

    ``extra`` holds what ``dataset`` rebuilds an item from, so that ``reward.function: reasoning_gym`` can score it.
    """
    task = source.removeprefix(PREFIX)
    name = task.partition("?")[0]
    import reasoning_gym

    if name not in reasoning_gym.factory.DATASETS:
        raise UserError(f"{source}: reasoning-gym has no task {name!r}")
    try:
        items = list(dataset(task))
    except Exception as error:  # whatever a task raises for invalid options
        raise UserError(f"{source}: {error}") from None
    teachers = TEACHERS.get(name, {})
    if not teachers:
        log.warning("%s: no built-in teacher for this task; its Hard prompts train nothing", source)
    return [
        Prompt(
            id=f"{name}-{i}",
            ground_truth=str(item["answer"]),
            teachers=tuple(Teacher(teacher, write(item)) for teacher, write in teachers.items()),
            source=PREFIX + name,
            text=item["question"],
            extra=json.dumps({"dataset": task, "index": i}),
        )
        for i, item in enumerate(items)
    ]
