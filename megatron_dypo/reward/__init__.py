"""Rewards: the final answer of a response against the ground truth, a task's own score, or a user's function.

    response --answer--> final answer --scorers--> score, or a job --worker_pool--> graders --> score or fault

    math    math.py decides most answers, equivalence.py asks math-verify about the rest; by normalize (one form),
            numbers and exact (values), units with unit_names, lists, and regions (conditions as intervals)
    choice  choice                   letters of options; needs no process
    others  reasoning-gym's scores and users' functions are called in a process always

What runs in worker processes is ``worker_main.py`` with ``grader_process.py``, ``graders.py`` and ``equivalence.py``:
math-verify has inputs that never end, its own time limits rest on SIGALRM, which works on the main thread alone, and
users' functions may do anything. Penalties for form and length are the trainer's alone.
"""

from megatron_dypo.reward.answer import final_answer, last_boxed
from megatron_dypo.reward.function import RewardFunction, build_reward
from megatron_dypo.reward.worker_pool import Score

__all__ = ["RewardFunction", "Score", "build_reward", "final_answer", "last_boxed"]
