"""The scorer of each reward function: (prompt, response) -> a score or a job for a worker process; and penalties.

A job is JSON, the arguments of the worker's grader (``graders.py``); equal jobs of a batch run once. Penalties for
format and length apply in training and never in evaluation; the length penalty is DAPO's soft overlong punishment: zero
up to ``overlong_tokens`` before the limit, then linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_dypo.reward.answer import Extract, final_answer, last_boxed
from megatron_dypo.reward.choice import chosen, true_label
from megatron_dypo.reward.lists import is_several, order_matters
from megatron_dypo.reward.math import bare_truth, compare
from megatron_dypo.reward.normalize import canonical

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Reward
    from megatron_dypo.records import Prompt

Scorer = Callable[["Prompt", str, Extract], "float | str"]


def score_math(prompt: Prompt, text: str, extract: Extract) -> float | str:
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


def score_choice(prompt: Prompt, text: str, extract: Extract) -> float | str:
    label = chosen(text, extract)
    return float(label is not None and label == true_label(prompt.ground_truth))


def score_task(prompt: Prompt, text: str, extract: Extract) -> float | str:
    answer = final_answer(text, extract)
    task = _extra(prompt)
    if answer is None:
        return 0.0
    return json.dumps([task.get("dataset"), task.get("index"), prompt.text, prompt.ground_truth, answer])


def score_custom(prompt: Prompt, text: str, extract: Extract) -> float | str:
    """Build the job of a user's function, which gets the whole response; ``extract`` is ignored."""
    return json.dumps([prompt.source, text, prompt.ground_truth, _extra(prompt) | {"id": prompt.id}])


SCORERS: dict[str, Scorer] = {"math": score_math, "choice": score_choice, "reasoning_gym": score_task}


def unusable(function: str, prompt: Prompt) -> str | None:
    """Return why this function could never score responses to ``prompt``, or None."""
    if function == "choice" and true_label(prompt.ground_truth) is None:
        return f"ground truth {prompt.ground_truth[:60]!r} names no option (one letter or digit)"
    if function == "reasoning_gym" and not {"dataset", "index"} <= _extra(prompt).keys():
        return "extra_info holds no reasoning-gym dataset and index"
    return None


def _extra(prompt: Prompt) -> dict:
    return json.loads(prompt.extra) if prompt.extra else {}


_THINK = re.compile("</?think>")


def penalty(settings: Reward, text: str, tokens: int, limit: int) -> float:
    """Return the penalty (>= 0) on the reward of the response ``text`` of ``tokens`` tokens, at most ``limit``."""
    cost = 0.0 if has_form(settings.format, text) else settings.format_penalty
    over = tokens - (limit - settings.overlong_tokens)
    if settings.overlong_tokens and over > 0:
        cost += settings.overlong_penalty * min(1.0, over / settings.overlong_tokens)
    return cost


def has_form(form: str, text: str) -> bool:
    """Check the format: ``boxed``, a complete box; ``think``, one pair of tags and a box after it. Linear time.

    The thought begins the response; the chat template may have opened it already.
    """
    if form == "think":
        tags = _THINK.findall(text.lstrip().removeprefix("<think>"))
        if tags != ["</think>"]:
            return False
        text = text.rpartition("</think>")[2]
    return form == "none" or last_boxed(text) is not None
