"""What a response's form and length cost in training; evaluation never applies this.

The length's is DAPO's soft overlong punishment: nothing up to ``overlong_tokens`` before the limit, then linear.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megatron_dypo.reward.boxed import last_boxed

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Reward

_THINK = re.compile("</?think>")


def penalty(settings: Reward, text: str, tokens: int, limit: int) -> float:
    """What is taken off the reward of a response (``text``, of ``tokens`` of at most ``limit``), 0 or more."""
    cost = 0.0 if has_form(settings.format, text) else settings.format_penalty
    over = tokens - (limit - settings.overlong_tokens)
    if settings.overlong_tokens and over > 0:
        cost += settings.overlong_penalty * min(1.0, over / settings.overlong_tokens)
    return cost


def has_form(form: str, text: str) -> bool:
    """``boxed``: a complete box; ``think``: a thought in one pair of tags, and a box after it. Linear time.

    The thought begins the response; the chat template may have opened it already.
    """
    if form == "think":
        tags = _THINK.findall(text.lstrip().removeprefix("<think>"))
        if tags != ["</think>"]:
            return False
        text = text.rpartition("</think>")[2]
    return form == "none" or last_boxed(text) is not None
