"""Rewards: the last boxed answer of a response against the ground truth, 1 or 0.

    response --boxed--> answer --math--> 1, 0 or undecided --workers (processes)--> worker: math-verify --> 1 or 0

Only ``worker.py`` imports math-verify, and it runs in processes of its own: math-verify has inputs that never end, and
its own time limits rest on SIGALRM, which works on no thread but the main one.
"""

from megatron_dypo.reward.boxed import last_boxed
from megatron_dypo.reward.function import MathReward

__all__ = ["MathReward", "last_boxed"]
