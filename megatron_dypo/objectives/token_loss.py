"""The part of the loss that is local to a token: summands and analytic dL/dlogp, over packed per-token streams.

    GRPO  w (-min(rho A, clip(rho) A) + kl (exp(ref - logp) - (ref - logp) - 1))     rho = exp(logp - base)   (Eq. 21)
    GAL   C (constant slope; its value is the coefficient pass's)                                             (Eq. 16)
    SFT   -v logp                                                                                             (Eq. 20)

Legend: N loss tokens of a micro-batch, packed without prompt or padding; t a slice of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dypo.objectives.correction import Correction

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


@dataclass
class TokenStreams:
    """One micro-batch's per-token inputs, each [N] fp32: coefficients of the token's sequence (``SequenceTerms``), and
    log-probs in nats of the old policy, the reference (None where no term reads it) and the rollout engine.

    ``totals`` gathers, in float64, the sums that metrics are made of, unweighted by alpha and gamma.
    """

    advantage_N: Tensor
    grpo_N: Tensor
    grpo_slope_N: Tensor
    gal_slope_N: Tensor
    sft_N: Tensor
    old_N: Tensor
    rollout_N: Tensor
    is_rollout_N: Tensor
    reference_N: Tensor | None
    objective: Objective
    correction: Correction
    alpha: float = 0.5
    totals: dict[str, Tensor] = field(default_factory=dict)

    def terms(self, logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, Tensor]:
        """(loss summands [t], dL/dlogp [t]) of the tokens ``t``, given their log-probs under the current policy."""
        objective, advantage_t, old_t = self.objective, self.advantage_N[t], self.old_N[t]
        reference_t = None if self.reference_N is None else self.reference_N[t]
        weight_t = self.grpo_N[t] * self.correction.weight(old_t - self.rollout_N[t])

        if objective.ratio_level == "token":
            # a teacher micro-batch has no reference: any base serves, its GRPO weight is 0
            base_t = old_t if objective.ratio_base == "old" or reference_t is None else reference_t
            ratio_t = (logp_t - base_t).clamp(max=60.0).exp()
            free_t = ratio_t * advantage_t
            bounded_t = ratio_t.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage_t
            clipped_t = bounded_t < free_t
            surrogate_t = torch.where(clipped_t, bounded_t, free_t)
            slope_t = torch.where(clipped_t, 0.0, -free_t)
        else:  # the response's ratio is known from the coefficient pass and its slope is constant
            surrogate_t = slope_t = torch.zeros_like(logp_t)
            clipped_t = torch.zeros_like(logp_t, dtype=torch.bool)

        grpo_t, grpo_slope_t = weight_t * -surrogate_t, weight_t * slope_t + self.grpo_slope_N[t]
        if reference_t is not None:
            gap_t = reference_t - logp_t
            growth_t = gap_t.clamp(max=60.0).expm1()  # finite in fp32, and exact where the policies are close
            kl_t = weight_t * (growth_t - gap_t)  # k3: unbiased, never negative
            grpo_t = grpo_t + objective.kl_coef * kl_t
            grpo_slope_t = grpo_slope_t + weight_t * objective.kl_coef * -growth_t
            self._add("loss/kl", kl_t / (self.alpha or 1.0))
        summands_t = grpo_t - self.sft_N[t] * logp_t
        slopes_t = grpo_slope_t + self.gal_slope_N[t] - self.sft_N[t]

        rollout_t = self.is_rollout_N[t]
        self._add("loss/grpo", grpo_t / (self.alpha or 1.0))
        self._add("loss/sft", -self.sft_N[t] * logp_t / (objective.gamma or 1.0))
        self._add("grad_share/grpo", grpo_slope_t.abs())
        self._add("grad_share/gal", self.gal_slope_N[t].abs())
        self._add("grad_share/sft", self.sft_N[t].abs())
        self._add("clipped", (clipped_t & (self.grpo_N[t] > 0)).float())
        self._add("rollout_tokens", rollout_t)
        if entropy_t is not None:
            self._add("entropy", entropy_t * rollout_t)
        return summands_t, slopes_t

    def _add(self, name: str, values_t: Tensor) -> None:
        self.totals[name] = self.totals.get(name, 0.0) + values_t.detach().double().sum()


def dypo_loss(
    logp_N: Tensor, streams: TokenStreams, entropy_N: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The token-local loss of one micro-batch, differentiable in ``logp_N`` [N], and its metric sums.

    The value leaves out what is not local to a token (``BatchTerms.gal_loss``, ``grpo_sequence_loss``); the gradient is
    complete.
    """
    summands_N, slopes_N = streams.terms(logp_N.detach(), entropy_N, slice(0, len(logp_N)))
    loss = summands_N.double().sum() + (slopes_N.detach().double() * (logp_N - logp_N.detach()).double()).sum()
    return loss, streams.totals
