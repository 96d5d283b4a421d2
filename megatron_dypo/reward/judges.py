"""What each reward function decides on its own, and what it asks a worker process: (prompt, response) -> score or job.

A job is JSON, the arguments of the worker's grader (``graders.py``); equal jobs of a batch are done once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_dypo.reward.answer import Extract, final_answer
from megatron_dypo.reward.choice import chosen, true_label
from megatron_dypo.reward.lists import is_several, order_matters
from megatron_dypo.reward.math import bare_truth, compare
from megatron_dypo.reward.spelling import canonical

if TYPE_CHECKING:
    from megatron_dypo.records import Prompt

Judge = Callable[["Prompt", str, Extract], "float | str"]

_OWN = re.compile(r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|[^:]*\.py):[A-Za-z_]\w*", re.ASCII)


def is_own(function: str) -> bool:
    """Whether ``reward.function`` has the form ``package.module:function`` or ``path/file.py:function``."""
    return _OWN.fullmatch(function) is not None


def by_math(prompt: Prompt, text: str, extract: Extract) -> float | str:
    answer = final_answer(text, extract)
    if answer is None:
        return 0.0
    truth = bare_truth(prompt.ground_truth)
    ordered = order_matters(_question(prompt)) if is_several(truth) else None
    verdict = compare(canonical(answer), truth, ordered)
    return float(verdict) if isinstance(verdict, bool) else json.dumps(verdict)


def _question(prompt: Prompt) -> str:
    asked = (message["content"] for message in reversed(prompt.messages) if message["role"] == "user")
    return prompt.text or next(asked, "")


def by_choice(prompt: Prompt, text: str, extract: Extract) -> float | str:
    label = chosen(text, extract)
    return float(label is not None and label == true_label(prompt.ground_truth))


def by_task(prompt: Prompt, text: str, extract: Extract) -> float | str:
    answer = final_answer(text, extract)
    task = _extra(prompt)
    if answer is None:
        return 0.0
    return json.dumps([task.get("dataset"), task.get("index"), prompt.text, prompt.ground_truth, answer])


def by_own(prompt: Prompt, text: str, extract: Extract) -> float | str:
    """``extract`` plays no part: the function gets the whole response."""
    return json.dumps([prompt.source, text, prompt.ground_truth, _extra(prompt) | {"id": prompt.id}])


JUDGES: dict[str, Judge] = {"math": by_math, "choice": by_choice, "reasoning_gym": by_task}


def unusable(function: str, prompt: Prompt) -> str | None:
    """Why this function could never score responses to ``prompt``; None where it can."""
    if function == "choice" and true_label(prompt.ground_truth) is None:
        return f"ground truth {prompt.ground_truth[:60]!r} names no option (one letter or digit)"
    if function == "reasoning_gym" and not {"dataset", "index"} <= _extra(prompt).keys():
        return "extra_info holds no reasoning-gym dataset and index"
    return None


def _extra(prompt: Prompt) -> dict:
    return json.loads(prompt.extra) if prompt.extra else {}
