"""Compute advantages of single tokens from a second model's values or rewards: GAE (PPO), leave-one-out (PRIME).

Each function takes whole responses. What they share (a group's means, the largest reward-to-go, a batch's mean and
variance) is passed as numbers summed over ranks, so that no split of the batch changes an advantage. All is in float64.

Legend: n tokens of one response.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def rewards_to_go(rewards_n: Tensor, discount: float = 1.0) -> Tensor:
    """Return sum_{s >= t} discount^(s - t) r_s for each token t [n]."""
    if discount == 1:
        return rewards_n.flip(0).cumsum(0).flip(0)
    later, found = 0.0, []
    for reward in reversed(rewards_n.tolist()):
        later = reward + discount * later
        found.append(later)
    return torch.tensor(found[::-1], dtype=rewards_n.dtype)


def token_rewards(outcome: float, log_ratios_n: Tensor, penalty: float) -> Tensor:
    """Return each token's reward [n]: -``penalty`` times its log-ratio to the reference, plus the outcome at the
    last.
    """
    rewards_n = -penalty * log_ratios_n
    rewards_n[-1] += outcome
    return rewards_n


def gae(rewards_n: Tensor, values_n: Tensor, discount: float, decay: float) -> Tensor:
    """Return generalised advantage estimates [n] (arXiv 1506.02438, equation 16); a response ends at value 0.

    ``discount`` is gamma, ``decay`` lambda. The returns that a critic learns are these advantages plus the values.
    """
    next_n = torch.cat([values_n[1:], values_n.new_zeros(1)])
    return rewards_to_go(rewards_n + discount * next_n - values_n, discount * decay)


@dataclass(frozen=True)
class Sums:
    """Count, sum and sum of squares of a batch's tokens; those of parts can be added."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values_n: Tensor) -> Sums:
        """Return the sums of one response."""
        return cls(len(values_n), values_n.sum().item(), values_n.square().sum().item())

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def whiten(self, values_n: Tensor, sample: bool = False) -> Tensor:
        """Return the values minus the batch's mean, over its standard deviation.

        ``sample``: the variance is the sample's, plus 1e-8 (verl, PRIME); else the population's, at least 1e-8
        (OpenRLHF, Open-Reasoner-Zero). The sample variance of one token is 0.
        """
        variance = self.spread / max(self.count - 1, 1) + 1e-8 if sample else max(self.spread / self.count, 1e-8)
        return (values_n - self.total / self.count) / math.sqrt(variance)

    @property
    def spread(self) -> float:
        """Return the sum of squared distances from the mean."""
        mean = self.total / self.count
        return max(self.squares - self.count * mean * mean, 0.0)


SCALE_FLOOR = 1e-6  # added to ``largest_to_go``


def largest_to_go(responses: Iterable[Tensor]) -> float:
    """Return the largest |reward-to-go| of any token, by which PRIME divides its process rewards; 0 without a token."""
    return max((rewards_to_go(rewards_n).abs().max().item() for rewards_n in responses), default=0.0)


def outcome_loss(logit: float, outcome: float) -> tuple[float, float]:
    """Return (-log likelihood of an outcome 0 or 1 with this logit, its derivative in it), without overflow."""
    small = math.exp(-abs(logit))
    likely = 1 / (1 + small) if logit > 0 else small / (1 + small)
    return max(logit, 0.0) - logit * outcome + math.log1p(small), likely - outcome


def outcome_updates(log_ratios: Iterable[float], outcomes: Sequence[float], beta: float) -> list[tuple[float, float]]:
    """Return (loss, dL/dlogp of each token) per response, from its summed log-ratio; L is the mean loss."""
    found = [outcome_loss(beta * ratio, outcome) for ratio, outcome in zip(log_ratios, outcomes, strict=True)]
    return [(loss, beta / len(found) * slope) for loss, slope in found]


def group_advantages(
    outcomes: list[float], means: Mapping[int, float], process: Mapping[int, Tensor], *, as_code: bool
) -> dict[int, Tensor]:
    """Return ``leave_one_out`` [n] of each response of a group in ``process``, by its index in ``outcomes``.

    ``means``: the mean process reward over tokens of each response that has any.
    """
    return {
        own: leave_one_out(
            outcomes[own],
            process_n,
            outcomes[:own] + outcomes[own + 1 :],
            [mean for other, mean in means.items() if other != own],
            as_code=as_code,
        )
        for own, process_n in process.items()
    }


def leave_one_out(
    outcome: float, process_n: Tensor, outcomes: list[float], means: list[float], *, as_code: bool
) -> Tensor:
    """Return PRIME's advantages [n] of a response, before whitening (arXiv 2502.01456, equation 5).

    The outcome less the mean of the others' ``outcomes``, plus the reward-to-go of the process rewards less a baseline
    of the others' ``means`` over tokens. The paper's baseline is the mean of these; with ``as_code`` it is that of
    PRIME's published code, which differs by (q_t - own mean) / (k - 1). Without other responses a baseline is 0.
    """
    relative_n = process_n - _mean(means)
    if as_code and means:
        relative_n = relative_n + (process_n - process_n.mean()) / len(means)
    return outcome - _mean(outcomes) + rewards_to_go(relative_n)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
