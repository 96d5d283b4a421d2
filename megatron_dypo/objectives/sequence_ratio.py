"""The surrogate of a response's one ratio (``objective.ratio_level: sequence``), computed once, in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from megatron_dypo.kernels.token_functions import LARGEST, cispo, sapo
from megatron_dypo.objectives.correction import Correction

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective
    from megatron_dypo.objectives.coefficients import SequenceSums


def ratio_unit(objective: Objective, tokens: int) -> float:
    """Return the factor of a sum over a response's ``tokens`` in its sequence-level ratio: mean, or sum."""
    return 1.0 if objective.scale == "trajectory" else 1 / tokens


def sequence_surrogate(
    sums: SequenceSums, advantage: float, unit: float, objective: Objective, correction: Correction
) -> tuple[float, float, bool]:
    """Return (surrogate, derivative in the log-ratio, clipped?) of a sequence-level ratio, with correction."""
    base = sums.old if objective.ratio_base == "old" else sums.reference
    ratio = math.exp(min((sums.now - base) * unit, LARGEST))
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    weight = correction.weight(torch.tensor((sums.old - sums.rollout) * unit, dtype=torch.float64)).item()
    if objective.surrogate == "clip":
        surrogate = min(ratio * advantage, min(max(ratio, low), high) * advantage)
        clipped = ratio > high if advantage > 0 else ratio < low and advantage < 0
        return weight * surrogate, weight * (0.0 if clipped else ratio * advantage), clipped
    ratio_, advantage_, logp_ = torch.tensor([ratio, advantage, sums.now * unit], dtype=torch.float64)
    if objective.surrogate == "cispo":
        surrogate_, slope_, clipped_ = cispo(ratio_, advantage_, logp_, objective.clip_low, objective.clip_high)
        return weight * surrogate_.item(), weight * slope_.item(), bool(clipped_)
    surrogate_, slope_ = sapo(ratio_, advantage_, objective.sapo_tau_pos, objective.sapo_tau_neg)
    return weight * surrogate_.item(), weight * slope_.item(), False
