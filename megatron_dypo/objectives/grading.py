"""Dynamic difficulty grading (paper 3.1) and group advantages (Eq. 22). Legend: Q prompts, k responses each."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.records import Regime

_CORRECTION = {"population": 0, "sample": 1}


def grade(rewards: Tensor, reward_threshold: float = 0.5, hard_max_solved: int = 0) -> list[Regime]:
    """Regime of each row of ``rewards`` [Q, k]: Easy if all are right, Hard if at most ``hard_max_solved``, else Mid.

    Exclusive and exhaustive for every k >= 1; Easy wins where both would hold, and k = 1 has no Mid.
    """
    rewards = torch.as_tensor(rewards)
    solved = (rewards >= reward_threshold).sum(-1).tolist()
    k = rewards.shape[-1]
    return [Regime.EASY if s == k else Regime.HARD if s <= hard_max_solved else Regime.MID for s in solved]


def group_advantages(rewards: Tensor, normalize_std: bool | str = True, eps: float = 1e-6) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) within each row of ``rewards`` [Q, k] -> float64 [Q, k] (Eq. 22).

    ``normalize_std``: True or "population", "sample" (k - 1), or False or "none" (Dr. GRPO: no division). A row of
    ties, and k = 1, give zeros.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    centred = rewards - rewards.mean(-1, keepdim=True)
    centred = torch.where((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0, centred)  # ties: exactly 0
    kind = {True: "population", False: "none"}.get(normalize_std, normalize_std)
    if kind == "none" or rewards.shape[-1] == 1:
        return centred
    return centred / (rewards.std(-1, keepdim=True, correction=_CORRECTION[kind]) + eps)
