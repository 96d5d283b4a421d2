"""From a graded batch to each training sequence's coefficients: everything that is global is decided here.

L = (1/Q) sum_q [Hard: gamma SFT | Mid: alpha (1/k) sum_i GRPO_i + (1 - alpha) GAL | Easy: 0] (Eq. 24). Every normaliser
is a count over the global batch, and GAL's pair weights are known from the coefficient pass; what is left is local to a
token (token_loss.py). Each rank computes this for the whole batch: O(prompts x k) numbers, in float64. ``Correction``
says how much a token (or response) counts when the engine sampled it from a slightly other policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dypo.kernels.grouped_loss import LARGEST, correction_weight
from megatron_dypo.objectives.dypo import gal_coefficients, group_advantages, pair_statistics
from megatron_dypo.objectives.recipes import RECIPES
from megatron_dypo.records import Group, Kind, Sequence

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


@dataclass(frozen=True)
class Correction:
    """``truncate``: weight min(ratio, cap); ``mask``: 0 outside [1/cap, cap], else 1; ``none``: 1."""

    kind: str = "none"
    cap: float = 2.0

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Weight from log(old policy / engine's policy), in nats, elementwise."""
        return correction_weight(log_ratio, self.kind, self.cap)

    def binds(self, log_ratio: Tensor) -> Tensor:
        """Whether the weight is capped (truncate) or 0 (mask), elementwise."""
        if self.kind == "truncate":
            return log_ratio.clamp(max=LARGEST).exp() > self.cap
        return self.weight(log_ratio) == 0


@dataclass(frozen=True)
class SequenceSums:
    """Sums over one response's tokens, in nats: policy now, behaviour policy, reference, rollout engine."""

    now: float
    old: float
    reference: float
    rollout: float


@dataclass(frozen=True)
class SequenceTerms:
    """Coefficients of one sequence; each token's loss is formed from them alone.

    ``grpo`` weighs a token's -surrogate + KL; ``dlogp_grpo`` and ``dlogp_gal`` are constant dL/dlogp_t (sequence-level
    ratio, GAL); ``sft`` weighs -logp_t.
    """

    advantage: float = 0.0
    grpo: float = 0.0
    dlogp_grpo: float = 0.0
    dlogp_gal: float = 0.0
    sft: float = 0.0


@dataclass
class BatchTerms:
    """Coefficients in the order of the sequences, and what the coefficient pass already knows: the loss terms that are
    not local to a token (unweighted), and the pairs' statistics (None without a pair)."""

    sequences: list[SequenceTerms]
    gal_loss: float = 0.0
    grpo_sequence_loss: float = 0.0
    clipped_tokens: int = 0
    eta: float | None = None
    spread: float | None = None
    saturated: float | None = None


def alpha(objective: Objective) -> float:
    """GRPO's share in this recipe."""
    fixed = RECIPES[objective.method].alpha
    return objective.alpha if fixed is None else fixed


def needs_reference(objective: Objective) -> bool:
    """Whether any term reads reference log-probs."""
    uses_gal = RECIPES[objective.method].samples and alpha(objective) < 1
    return uses_gal or objective.kl_coef > 0 or objective.ratio_base == "reference"


def keeps_reference(objective: Objective) -> bool:
    """Whether that takes a copy of the weights; the previous rollout's log-probs are at hand."""
    return needs_reference(objective) and objective.reference != "previous"


def _per_token(objective: Objective, override: bool | None) -> bool:
    return objective.scale == "token" if override is None else override


def ratio_unit(objective: Objective, tokens: int) -> float:
    """What a sum over a response's ``tokens`` is multiplied by in its sequence-level ratio: mean, or sum."""
    return 1.0 if objective.scale == "trajectory" else 1 / tokens


def sequence_terms(
    groups: list[Group],
    sequences: list[Sequence],
    sums: list[SequenceSums | None],
    objective: Objective,
    correction: Correction,
    max_response_tokens: int,
) -> BatchTerms:
    """Coefficients of ``sequences``, all those of the mini-batch ``groups``; ``sums[i]`` belongs to rollout sequence i.

    Coefficients carry alpha, 1 - alpha, gamma and every normaliser; the returned losses carry the normalisers only.
    """
    members: dict[int, list[int]] = {}
    for place, sequence in enumerate(sequences):
        members.setdefault(sequence.group, []).append(place)
    prompts = len(members) if objective.normalize == "active" else len(groups)
    mid = [places for places in members.values() if sequences[places[0]].kind == Kind.ROLLOUT]
    mid_tokens = sum(sequences[place].loss_tokens for places in mid for place in places)
    share = alpha(objective)
    terms = [SequenceTerms()] * len(sequences)
    batch = BatchTerms(terms)
    eta, squares, saturated, pairs = [], 0.0, 0, 0

    for places in members.values():
        group = groups[sequences[places[0]].group]
        if sequences[places[0]].kind == Kind.TEACHER:
            for place in places:
                length = sequences[place].loss_tokens if _per_token(objective, objective.sft_length_normalize) else 1
                terms[place] = SequenceTerms(sft=objective.gamma / (prompts * len(places) * length))
            continue
        k = len(places)
        rewards = torch.tensor(
            [group.responses[sequences[place].sample].reward for place in places], dtype=torch.float64
        )
        advantages = group_advantages(rewards.unsqueeze(0), objective.advantage_std)[0].tolist()
        lengths = [sequences[place].loss_tokens for place in places]
        slopes = [0.0] * k
        if share < 1:
            by_mean = _per_token(objective, objective.gal_length_normalize)
            units = [1 / n if by_mean else 1.0 for n in lengths]
            log_ratios = torch.tensor(
                [(sums[place].now - sums[place].reference) * unit for place, unit in zip(places, units, strict=True)],
                dtype=torch.float64,
            )
            loss, coefficients, difficulty = gal_coefficients(log_ratios, rewards, objective.beta_gal)
            batch.gal_loss += loss.item() / prompts
            slopes = [(1 - share) / prompts * c * unit for c, unit in zip(coefficients.tolist(), units, strict=True)]
            square, full, count = pair_statistics(log_ratios, rewards, objective.beta_gal)
            eta.append(difficulty.item() * count)
            squares, saturated, pairs = squares + square, saturated + full, pairs + count
        for place, advantage, n, slope in zip(places, advantages, lengths, slopes, strict=True):
            weight = {
                "scale": share / (prompts * k * (n if objective.scale == "token" else 1)),
                "token_mean": share
                * len(mid)
                / prompts
                / mid_tokens,  # equals `scale: token` where all lengths are equal
                "constant": share / (prompts * k * (objective.aggregation_constant or max_response_tokens)),
            }[objective.aggregation]
            dlogp_sequence = 0.0
            if objective.ratio_level == "sequence" and share > 0:
                by_sum = objective.scale == "trajectory"
                unit = ratio_unit(objective, n)
                surrogate, dlogp_s, clipped = _sequence_surrogate(sums[place], advantage, unit, objective, correction)
                batch.clipped_tokens += n * clipped
                once = weight if by_sum and objective.aggregation == "scale" else weight * n
                dlogp_sequence = -once * dlogp_s * unit
                batch.grpo_sequence_loss -= once * surrogate / share
            terms[place] = SequenceTerms(advantage, weight, dlogp_sequence, slope)

    if pairs:
        batch.eta, batch.spread, batch.saturated = sum(eta) / pairs, math.sqrt(squares / pairs), saturated / pairs
    return batch


def _sequence_surrogate(
    sums: SequenceSums, advantage: float, unit: float, objective: Objective, correction: Correction
) -> tuple[float, float, bool]:
    """(surrogate, its derivative in the response's log-ratio, clipped?) of a sequence-level ratio, with correction."""
    base = sums.old if objective.ratio_base == "old" else sums.reference
    ratio = math.exp(min((sums.now - base) * unit, 60.0))
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    surrogate = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    clipped = ratio > high if advantage > 0 else ratio < low and advantage < 0
    weight = correction.weight(torch.tensor((sums.old - sums.rollout) * unit, dtype=torch.float64)).item()
    return weight * surrogate, weight * (0.0 if clipped else ratio * advantage), clipped
