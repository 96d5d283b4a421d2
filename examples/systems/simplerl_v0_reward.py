"""The rewards of SimpleRL-Zero (v0): 1 for a right answer, -0.5 for a wrong one, -1 for a response without a box."""

from __future__ import annotations

from megatron_dypo.reward import last_boxed
from megatron_dypo.reward.equivalence import equivalent
from megatron_dypo.reward.math import bare_truth, compare
from megatron_dypo.reward.normalize import canonical

RIGHT, WRONG, NO_BOX = 1.0, -0.5, -1.0


def score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float:
    """A response's reward; right is what `reward.function: math` calls right."""
    answer = last_boxed(solution_str)
    if answer is None:
        return NO_BOX
    verdict = compare(canonical(answer), bare_truth(ground_truth))
    return RIGHT if (verdict if isinstance(verdict, bool) else equivalent(*verdict)) else WRONG
