"""DYPO's difficulty grading (paper 3.1), group advantages (Eq. 22) and Group Alignment Loss (Eq. 14-16, 23).

GAL over the pairs P = {(s, f): r_s > r_f}, d_sf = s_s - s_f, is L = mean_P -log sigmoid(beta d). Its gradient is sum_i
C_i grad s_i with C_s = -(beta/|P|) sum_f (1 - sigmoid(beta d_sf)) and C_f = +(beta/|P|) sum_s (1 - sigmoid(beta d_sf)):
once the k numbers s_i are known, every token's gradient is local, so a group may be cut anywhere. Legend: Q prompts, k
responses each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_dypo.records import Regime

_CORRECTION: dict[bool | str, int] = {True: 0, "population": 0, "sample": 1}


def grade(
    rewards: Tensor,
    reward_threshold: float = 0.5,
    hard_max_solved: int = 0,
    gate: str = "reward",
    easy_min_solved: int | None = None,
) -> list[Regime]:
    """Return the regime of each row of ``rewards`` [Q, k]; rewards of at least ``reward_threshold`` are right.

    With ``gate: advantage`` a row is Hard if it has no positive advantage, which means that all rewards are equal.
    """
    rewards = torch.as_tensor(rewards)
    solved, k = (rewards >= reward_threshold).sum(-1).tolist(), rewards.shape[-1]
    if gate == "reward":
        return [Regime.of(each, k, hard_max_solved, easy_min_solved) for each in solved]
    tied = (rewards == rewards[..., :1]).all(-1).tolist()
    return [Regime.HARD if tie else Regime.of(each, k, -1) for tie, each in zip(tied, solved, strict=True)]


def group_advantages(rewards: Tensor, normalize_std: bool | str = True, eps: float = 1e-6) -> Tensor:
    """Return A_i = (r_i - mean) / (std + eps) within each row of ``rewards`` [Q, k], float64 [Q, k] (Eq. 22).

    ``normalize_std``: True or "population", "sample" (k - 1), or False or "none" (Dr. GRPO: no division). A row of
    ties, and k = 1, give zeros.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    centred = rewards - rewards.mean(-1, keepdim=True)
    centred = torch.where((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0, centred)  # ties: exactly 0
    if normalize_std in (False, "none") or rewards.shape[-1] == 1:
        return centred
    return centred / (rewards.std(-1, keepdim=True, correction=_CORRECTION[normalize_std]) + eps)


def gal_coefficients(log_ratios: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss [], coefficients [k], eta []), float64, from the trajectories' log-ratios to the reference (nats).

    eta = mean over pairs of (1 - sigmoid(beta d))^2, the paper's discrimination difficulty. Without pairs all are 0.
    """
    d_kk, pairs_kk = _pair_differences(log_ratios, rewards)
    count = pairs_kk.sum()
    if count == 0:
        zero = torch.zeros((), dtype=torch.float64)
        return zero, torch.zeros_like(d_kk[0]), zero
    weight_kk = torch.where(pairs_kk, torch.sigmoid(-beta * d_kk), 0.0)
    loss = torch.where(pairs_kk, -logsigmoid(beta * d_kk), 0.0).sum() / count
    coefficients = beta * (weight_kk.sum(0) - weight_kk.sum(1)) / count
    return loss, coefficients, weight_kk.square().sum() / count


def pair_statistics(log_ratios: Tensor, rewards: Tensor, beta: float) -> tuple[float, int, int]:
    """Return (sum of d^2 over pairs, saturated pairs: weight < 0.01 or > 0.99, pairs)."""
    d_kk, pairs_kk = _pair_differences(log_ratios, rewards)
    d_P = d_kk[pairs_kk]
    weight_P = torch.sigmoid(-beta * d_P)
    return d_P.square().sum().item(), int(((weight_P < 0.01) | (weight_P > 0.99)).sum()), d_P.numel()


def _pair_differences(log_ratios: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    s_k = torch.as_tensor(log_ratios, dtype=torch.float64)
    r_k = torch.as_tensor(rewards, dtype=torch.float64)
    return s_k.unsqueeze(1) - s_k.unsqueeze(0), r_k.unsqueeze(1) > r_k.unsqueeze(0)
