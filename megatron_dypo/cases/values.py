"""Compute PPO's numbers of a case: each token's advantage and return by GAE, and the critic's loss.

Legend: n tokens of one response.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dypo.config.schema import Objective
from megatron_dypo.objectives.token_advantages import Sums, gae, token_rewards
from megatron_dypo.objectives.value_loss import value_loss


def value_advantages(
    old_values: list[Tensor], log_ratios: list[Tensor], rewards: list[float], objective: Objective
) -> dict[str, list[Tensor]]:
    """Return advantages before and after whitening, and returns, each a list of [n] by response.

    ``log_ratios``: log(old policy / reference).
    """
    raw = []
    for values_n, log_ratio_n, reward in zip(old_values, log_ratios, rewards, strict=True):
        rewards_n = token_rewards(reward, log_ratio_n, objective.kl_in_reward)
        raw.append(gae(rewards_n, values_n, objective.gae_gamma, objective.gae_lambda))
    sums = sum(map(Sums.of, raw), Sums())
    return {
        "advantages_raw": raw,
        "returns": [raw_n + values_n for raw_n, values_n in zip(raw, old_values, strict=True)],
        "advantages": [sums.whiten(raw_n) for raw_n in raw],
    }


def value_update(
    values: list[Tensor], old_values: list[Tensor], returns: list[Tensor], weights: list[float], objective: Objective
) -> dict[str, float | list[list[float]]]:
    """Return the critic's loss and its derivatives; ``weights`` are per token of each response."""
    loss, slopes = 0.0, []
    for values_n, old_n, returns_n, weight in zip(values, old_values, returns, weights, strict=True):
        weight_n = values_n.new_full(values_n.shape, weight)
        summands_n, slope_n = value_loss(values_n, old_n, returns_n, weight_n, objective.value_clip)
        loss += summands_n.sum().item()
        slopes.append(slope_n.tolist())
    return {"value_loss": loss, "dloss_dvalue": slopes}
