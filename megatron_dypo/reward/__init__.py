"""Rewards: the final answer of a response against the ground truth, a task's own score, or a user's function.

    response --answer--> final answer --judges--> score, or a job --workers (processes)--> graders --> score or fault

    math    math.py decides most answers, equivalence.py asks math-verify about the rest; by spelling (one form),
            numbers and exact (values), units with unit_names, phrases, lists, and regions (conditions as intervals)
    choice  choice                   letters of options; needs no process
    others  reasoning-gym's scores and users' functions are called in a process always

What runs in worker processes is ``worker.py`` with ``child.py``, ``graders.py`` and ``equivalence.py``: math-verify has
inputs that never end, its own time limits rest on SIGALRM, which works on no thread but the main one, and users'
functions may do anything. Penalties for form and length (``penalties.py``) are the trainer's alone.
"""

from megatron_dypo.reward.answer import final_answer
from megatron_dypo.reward.boxed import last_boxed
from megatron_dypo.reward.function import RewardFunction, build_reward
from megatron_dypo.reward.workers import Score

__all__ = ["RewardFunction", "Score", "build_reward", "final_answer", "last_boxed"]
