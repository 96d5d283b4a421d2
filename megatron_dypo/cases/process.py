"""Compute PRIME's numbers for a case: its process reward model's update, token advantages, and the groups it keeps.

Legend: n tokens of one response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.dypo import grade
from megatron_dypo.objectives.token_advantages import (
    SCALE_FLOOR,
    Sums,
    group_advantages,
    largest_to_go,
    outcome_updates,
)
from megatron_dypo.records import Regime


def process_update(ratios: list[Tensor], rewards: list[float], objective: Objective) -> dict[str, Any]:
    """Return the model's loss and its derivatives, from each response's log-ratios [n] to the reference."""
    outcomes = [float(reward >= objective.reward_threshold) for reward in rewards]
    updates = outcome_updates([ratio_n.sum().item() for ratio_n in ratios], outcomes, objective.process_beta)
    slopes = [slope for _, slope in updates]
    return {
        "loss": sum(loss for loss, _ in updates) / len(updates),
        "dloss_dprm_logp": [[slope] * len(ratio_n) for slope, ratio_n in zip(slopes, ratios, strict=True)],
        "slope_of_response": slopes,
    }


def process_advantages(
    ratios: list[Tensor], rewards: list[float], prompts: list[Any], objective: Objective
) -> dict[str, list[Tensor]]:
    """Return process rewards and advantages before and after whitening, each a list of [n] by response."""
    scale, as_code = largest_to_go(ratios) + SCALE_FLOOR, objective.process_baseline == "code"
    process = [ratio_n / scale for ratio_n in ratios]
    found: dict[int, Tensor] = {}
    for prompt in dict.fromkeys(prompts):
        places = [i for i, each in enumerate(prompts) if each == prompt]
        mine = {sample: process[i] for sample, i in enumerate(places)}
        means = {sample: process_n.mean().item() for sample, process_n in mine.items()}
        raw_of = group_advantages([rewards[i] for i in places], means, mine, as_code=as_code)
        found |= {places[sample]: raw_n for sample, raw_n in raw_of.items()}
    raw = [found[i] for i in range(len(ratios))]
    sums = sum(map(Sums.of, raw), Sums())
    return {
        "process_rewards": process,
        "advantages_raw": raw,
        "advantages": [sums.whiten(raw_n, sample=True) for raw_n in raw],
    }


def kept(solved: Any, config: Config) -> dict[str, list[bool]]:
    """Return which groups train, from their numbers of right responses."""
    k, objective = config.rollout.samples_per_prompt, config.objective
    if not isinstance(solved, list) or not all(type(each) is int and 0 <= each <= k for each in solved):
        raise UserError(f"settings.solved: expected a list of whole numbers from 0 to {k}")
    rewards = torch.tensor([[1.0] * each + [0.0] * (k - each) for each in solved]).reshape(-1, k)
    limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
    return {"kept": [regime == Regime.MID for regime in grade(rewards, objective.reward_threshold, *limits)]}
