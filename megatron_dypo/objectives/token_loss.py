"""One micro-batch's token-local loss: the grouped loss kernel bound to its sequences, and its sums for metrics.

Legend: N loss tokens of a micro-batch, packed without prompt or padding; t a slice of them; S sequences; C coefficients
and M sums of each, in L lanes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.kernels import LossRule, empty_sums, grouped_loss, read_sums
from megatron_dypo.kernels.grouped_loss import COEFFICIENTS
from megatron_dypo.objectives.coefficients import SequenceTerms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.own_loss import OwnLoss, PolicyLossBatch, load_own_loss
from megatron_dypo.objectives.recipes import has_ratio, recipe, shape
from megatron_dypo.records import Kind

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


@dataclass
class TokenStreams:
    """Input of one micro-batch's loss: coefficients, sources, offsets [S + 1], shares, and log-probs (nats) [N].

    The coefficients are ``SequenceTerms``; log-probs are under the old policy, the rollout engine and the reference.
    Teacher traces have none of the three; rollouts have no reference if no term reads it, and ``advantage_N``, per
    token, only if a second model computes it. ``own`` is a user's loss in place of the surrogate, which sees whole
    responses, over the ranks of ``context_group``.
    """

    coefficients_CS: Tensor
    cu_seqlens: Tensor
    sources: list[Kind]
    objective: Objective
    correction: Correction
    share: dict[str, float]
    old_N: Tensor | None = None
    rollout_N: Tensor | None = None
    reference_N: Tensor | None = None
    advantage_N: Tensor | None = None
    context_group: dist.ProcessGroup | None = None
    sums_MSL: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not has_ratio(self.objective):
            self.old_N = None  # the kernel then omits ratio and KL
        named, has_responses = self.objective.loss_function, self.old_N is not None and len(self.cu_seqlens) > 1
        self.own = load_own_loss(named) if named and has_responses else None
        self.own_totals: dict[str, float] = {}
        self.sums_MSL = empty_sums(len(self.cu_seqlens) - 1, self.cu_seqlens.device)
        self.rule = LossRule(
            clip_low=self.objective.clip_low,
            clip_high=self.objective.clip_high,
            kl_coef=self.objective.kl_coef,
            ratio_level="token" if self.advantage_N is not None else self.objective.ratio_level,
            ratio_base=self.objective.ratio_base,
            correction=self.correction.kind,
            cap=self.correction.cap,
            floor=self.correction.floor,
            shape=shape(self.objective),
            shape_gamma=self.objective.shape_gamma,
            entropy=self.objective.entropy_coef > 0,
            surrogate=self.objective.surrogate,
            sapo_tau_pos=self.objective.sapo_tau_pos,
            sapo_tau_neg=self.objective.sapo_tau_neg,
            tilt=recipe(self.objective).has("tilted") and self.objective.tilt_level == "token",
        )

    @classmethod
    def of(
        cls,
        terms: SequenceOf[SequenceTerms],
        counts: SequenceOf[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        **fields: Any,
    ) -> TokenStreams:
        """Build the streams of sequences with these coefficients and numbers of loss tokens; other fields by name."""
        table_CS = torch.tensor([[getattr(term, name) for term in terms] for name in COEFFICIENTS], dtype=dtype)
        cu_seqlens = torch.tensor([0, *accumulate(counts)])
        return cls(table_CS.to(device), cu_seqlens.to(device), [term.source for term in terms], **fields)

    def terms(self, logp_t: Tensor, entropy_t: Tensor | None, t: slice) -> tuple[Tensor, ...]:
        """Return (loss summands [t], dL/dlogp [t], with an entropy bonus dL/dentropy [t]) of the tokens ``t``.

        Arguments are their log-probs and entropies under the current policy. With an ``own`` loss ``t`` covers all
        tokens.
        """
        table_CS = self.coefficients_CS
        if self.own is not None:
            table_CS = table_CS.clone()
            table_CS[COEFFICIENTS.index("advantage")] = 0.0  # removes the surrogate; KL and all other terms remain
        terms = grouped_loss(
            logp_t.detach(),
            self.cu_seqlens,
            table_CS,
            self.sums_MSL,
            self.rule,
            first=t.start,
            old=_part(self.old_N, t),
            rollout=_part(self.rollout_N, t),
            reference=_part(self.reference_N, t),
            advantage=_part(self.advantage_N, t),
            entropy=None if entropy_t is None else entropy_t.detach(),
        )
        return terms if self.own is None else self._with_own(self.own, terms, logp_t, entropy_t)

    def _with_own(
        self, own: OwnLoss, terms: tuple[Tensor, ...], logp_N: Tensor, entropy_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the user's summands and slopes."""
        if entropy_N is None or self.old_N is None or self.rollout_N is None or len(logp_N) != len(self.old_N):
            raise ValueError(f"{own}: needs all of a micro-batch's tokens, with entropies and three log-probs")
        advantage_N, weight_N = (
            self.coefficients_CS[COEFFICIENTS.index(name)].repeat_interleave(
                self.cu_seqlens.diff(), output_size=len(logp_N)
            )
            for name in ("advantage", "grpo")
        )
        batch = PolicyLossBatch(
            logp_N,
            entropy_N,
            self.old_N,
            self.rollout_N,
            self.reference_N,
            advantage_N,
            weight_N * self.correction.weight(self.old_N - self.rollout_N),
            self.cu_seqlens,
            self.objective,
            self.context_group,
        )
        summands_N, dlogp_N, dentropy_N, metrics = own.slopes(batch)
        (term,) = {term.name for term in recipe(self.objective).terms if term.has_ratio}
        sums = {f"loss_function/{name}": values_N for name, values_N in metrics.items()}
        sums |= {f"loss/{term}": summands_N / (self.share[term] or 1.0), f"grad_share/{term}": dlogp_N.abs()}
        self.own_totals = {name: values_N.double().sum().item() for name, values_N in sums.items()}
        bonus_N = terms[2] if len(terms) > 2 else torch.zeros_like(logp_N)
        return terms[0] + summands_N, terms[1] + dlogp_N, bonus_N + dentropy_N

    def loss(self, logp_N: Tensor, entropy_N: Tensor | None) -> Tensor:
        """Return the sum of all tokens' summands, float64, differentiable in ``logp_N`` and ``entropy_N`` [N]."""
        summands_N, *slopes = self.terms(logp_N, entropy_N, slice(0, len(logp_N)))
        loss = summands_N.double().sum()
        for slope_N, x_N in zip(slopes, (logp_N, entropy_N), strict=False):
            if x_N is not None:
                loss = loss + (slope_N.double() * (x_N - x_N.detach()).double()).sum()
        return loss

    @property
    def totals(self) -> dict[str, float]:
        """Return the sums behind the metrics, without the terms' shares, once ``terms`` has seen every token."""
        sums = read_sums(self.sums_MSL.cpu())
        table = dict(zip(COEFFICIENTS, self.coefficients_CS.double().cpu(), strict=True))
        tokens_S = self.cu_seqlens.diff().cpu()
        is_rollout = torch.tensor([source == Kind.ROLLOUT for source in self.sources], dtype=torch.bool)
        imitated = (-table["nll"] * sums["logp"], table["nll"].abs() * tokens_S)
        tilted = (-table["nll"] * sums["tilted"], table["nll"].abs() * sums["dlogp_tilted"])
        by_token = {  # (loss, sum of |dL/dlogp|) per sequence
            "surrogate": (sums["grpo"], sums["dlogp_grpo"]),
            "slope": (torch.zeros(()), table["slope"].abs() * tokens_S),  # its loss comes from the coefficient pass
            "nll": imitated,
            "tilted": tilted if self.rule.tilt else imitated,  # at sequence level the coefficient has it
            "shaped": (-table["shaped"] * sums["shaped"], table["shaped"].abs() * sums["dlogp_shaped"]),
        }
        totals = {
            "loss/kl": sums["kl"] / (self.share.get("grpo") or 1.0),
            "clipped": sums["clipped"] * (table["grpo"] > 0),
            "rollout_tokens": is_rollout * tokens_S,
            "entropy": is_rollout * sums["entropy"],
        }
        for term in recipe(self.objective).terms:
            own_S = torch.tensor([source == term.source for source in self.sources])
            loss_S, dlogp_S = by_token[term.token]
            totals[f"loss/{term.name}"] = own_S * loss_S / (self.share[term.name] or 1.0)
            totals[f"grad_share/{term.name}"] = own_S * dlogp_S
        if self.rule.entropy:
            totals["loss/entropy"] = -table["entropy"] * sums["entropy"]
        found = {name: total_S.sum().item() for name, total_S in totals.items()}
        return found | {name: found.get(name, 0.0) + value for name, value in self.own_totals.items()}


def dypo_loss(
    logp_N: Tensor, streams: TokenStreams, entropy_N: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Return a micro-batch's token-local loss, differentiable in ``logp_N`` and ``entropy_N`` [N], and metric sums.

    The value omits what is not token-local (``BatchTerms.gal_loss``, ``grpo_sequence_loss``); the gradient is complete.
    """
    return streams.loss(logp_N, entropy_N), streams.totals


def _part(stream_N: Tensor | None, t: slice) -> Tensor | None:
    return None if stream_N is None else stream_N[t]
