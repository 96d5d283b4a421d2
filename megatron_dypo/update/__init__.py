"""From graded groups to optimizer updates.

Two passes make every token's gradient local: the log-prob pass (old policy, reference) yields each response's sums, the
coefficients follow from one small exchange, and the training pass needs no other token. One packing plan serves all
passes, so the first ratio is exactly 1.
"""

from megatron_dypo.update.passes import logprob_passes
from megatron_dypo.update.step import Outcome, run_updates, update_policy
from megatron_dypo.update.warm_up import warm_up
from megatron_dypo.update.work import Work, make_work

__all__ = ["Outcome", "Work", "logprob_passes", "make_work", "run_updates", "update_policy", "warm_up"]
