"""PRIME's numbers of a case: its process reward model's update, each token's advantage, and which groups are kept.

Legend: n tokens of one response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.dypo import grade
from megatron_dypo.objectives.token_advantages import Sums, largest_to_go, leave_one_out, outcome_loss
from megatron_dypo.records import Regime

SCALE_FLOOR = 1e-6


def process_update(ratios: list[Tensor], rewards: list[float], objective: Objective) -> dict[str, Any]:
    """The model's loss and its derivatives, from each response's log-ratios [n] to the reference."""
    losses, slopes = [], []
    for ratio_n, reward in zip(ratios, rewards, strict=True):
        right = float(reward >= objective.reward_threshold)
        loss, slope = outcome_loss(objective.process_beta * ratio_n.sum().item(), right)
        losses.append(loss)
        slopes.append(objective.process_beta / len(ratios) * slope)
    return {
        "loss": sum(losses) / len(losses),
        "dloss_dprm_logp": [[slope] * len(ratio_n) for slope, ratio_n in zip(slopes, ratios, strict=True)],
        "slope_of_response": slopes,
    }


def process_advantages(
    ratios: list[Tensor], rewards: list[float], prompts: list[Any], objective: Objective
) -> dict[str, list[Tensor]]:
    """Process rewards and advantages before and after whitening, each a list of [n] by response."""
    scale = largest_to_go(ratios) + SCALE_FLOOR
    process = [ratio_n / scale for ratio_n in ratios]
    raw = []
    for i, process_n in enumerate(process):
        others = [j for j, prompt in enumerate(prompts) if prompt == prompts[i] and j != i]
        outcomes, means = [rewards[j] for j in others], [process[j].mean().item() for j in others]
        as_code = objective.process_baseline == "code"
        raw.append(leave_one_out(rewards[i], process_n, outcomes, means, as_code=as_code))
    sums = sum(map(Sums.of, raw), Sums())
    return {
        "process_rewards": process,
        "advantages_raw": raw,
        "advantages": [sums.whiten(raw_n, sample=True) for raw_n in raw],
    }


def kept(solved: Any, config: Config) -> dict[str, list[bool]]:
    """Which groups train, by how many of their responses are right."""
    k, objective = config.rollout.samples_per_prompt, config.objective
    if not isinstance(solved, list) or not all(type(each) is int and 0 <= each <= k for each in solved):
        raise UserError(f"settings.solved: expected a list of whole numbers from 0 to {k}")
    rewards = torch.tensor([[1.0] * each + [0.0] * (k - each) for each in solved]).reshape(-1, k)
    limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
    return {"kept": [regime == Regime.MID for regime in grade(rewards, objective.reward_threshold, *limits)]}
