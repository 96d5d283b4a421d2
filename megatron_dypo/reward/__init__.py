"""Rewards: compare a response's final answer with the ground truth, use a task's own score, or call a user's function.

    response --answer--> final answer --scorers--> score, or a job --worker_pool--> graders --> score or fault

    math    math.py decides most answers, equivalence.py asks math-verify about the rest; by normalize (one form),
            numbers and exact (values), units with unit_names, lists, and regions (conditions as intervals)
    choice  choice                   letters of options; needs no process
    others  reasoning-gym's scores and users' functions are called in a process always

Worker processes run ``worker_main.py`` with ``grader_process.py``, ``graders.py`` and ``equivalence.py``:
math-verify hangs on some inputs, its own time limits use SIGALRM, which works only on the main thread, and
users' functions may do anything. Penalties for format and length apply only in training.
"""

from megatron_dypo.reward.answer import final_answer, last_boxed
from megatron_dypo.reward.function import RewardFunction, build_reward
from megatron_dypo.reward.worker_pool import Score

__all__ = ["RewardFunction", "Score", "build_reward", "final_answer", "last_boxed"]
