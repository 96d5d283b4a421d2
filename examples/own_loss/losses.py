"""Example losses for objective.loss_function: PPO's clipped surrogate, GSPO's and CISPO's, as in verl.

Each takes a micro-batch of responses (megatron_dypo.objectives.own_loss.PolicyLossBatch) and returns a loss per token,
before any normaliser, and optionally metrics. Legend: N tokens, S responses.
"""

import torch


def clipped(batch):
    """Compute the loss of `objective.surrogate: clip`."""
    ratio_N = torch.exp(batch.log_prob - batch.old_log_prob)
    low, high = 1 - batch.objective.clip_low, 1 + batch.objective.clip_high
    free_N, bounded_N = ratio_N * batch.advantages, ratio_N.clamp(low, high) * batch.advantages
    return -torch.minimum(free_N, bounded_N), {"clip_frac": (bounded_N < free_N).float()}


def gspo(batch):
    """Use one ratio per response, from the mean of its tokens' log-ratios (GSPO, arXiv 2507.18071)."""
    ratio_S = torch.exp(batch.sequence_mean(batch.log_prob - batch.old_log_prob))
    ratio_N = batch.per_token(ratio_S)
    low, high = 1 - batch.objective.clip_low, 1 + batch.objective.clip_high
    return -torch.minimum(ratio_N * batch.advantages, ratio_N.clamp(low, high) * batch.advantages)


def cispo(batch):
    """Weigh the log-prob by a bounded, detached ratio: every token keeps a gradient (CISPO, arXiv 2506.13585)."""
    ratio_N = torch.exp(batch.log_prob - batch.old_log_prob).detach()
    bounded_N = ratio_N.clamp(1 - batch.objective.clip_low, 1 + batch.objective.clip_high)
    return -bounded_N * batch.advantages * batch.log_prob
