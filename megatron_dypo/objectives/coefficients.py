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
from megatron_dypo.objectives.recipes import recipe, shares
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


@dataclass
class SequenceTerms:
    """Coefficients of one sequence; each token's loss is formed from them alone.

    ``grpo`` weighs a token's -surrogate + KL; ``dlogp_grpo`` (sequence-level ratio) and ``slope`` are constant
    dL/dlogp_t; ``nll`` weighs -logp_t.
    """

    advantage: float = 0.0
    grpo: float = 0.0
    dlogp_grpo: float = 0.0
    slope: float = 0.0
    nll: float = 0.0


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


def needs_reference(objective: Objective) -> bool:
    """Whether any term reads reference log-probs."""
    return _open(objective, "gal") or objective.kl_coef > 0 or objective.ratio_base == "reference"


def keeps_reference(objective: Objective) -> bool:
    """Whether that takes a copy of the weights; the previous rollout's log-probs are at hand."""
    return needs_reference(objective) and objective.reference != "previous"


def _open(objective: Objective, rule: str) -> bool:
    return any(term.rule == rule and shares(objective)[term.name] > 0 for term in recipe(objective).terms)


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

    Coefficients carry each term's share and every normaliser; the returned losses carry the normalisers only.
    """
    members: dict[int, dict[Kind, list[int]]] = {}
    for place, sequence in enumerate(sequences):
        members.setdefault(sequence.group, {}).setdefault(sequence.kind, []).append(place)
    sampled = [places[Kind.ROLLOUT] for places in members.values() if Kind.ROLLOUT in places]
    batch = _CoefficientPass(
        groups,
        sequences,
        {place: known for place, known in enumerate(sums) if known is not None},
        objective,
        correction,
        constant=objective.aggregation_constant or max_response_tokens,
        prompts=len(members) if objective.normalize == "active" else len(groups),
        sampled_prompts=len(sampled),
        sampled_tokens=sum(sequences[place].loss_tokens for places in sampled for place in places),
    )
    share = shares(objective)
    for g, places in members.items():
        for term in recipe(objective).terms:
            if term.source in places and term.trains(groups[g].regime):
                RULES[term.rule](batch, share[term.name], places[term.source])
    batch.finish()
    return batch.result


@dataclass
class _CoefficientPass:
    """One mini-batch on its way to coefficients: the rules add each group's numbers to its sequences' columns.

    ``prompts`` is Q; ``sampled_*`` count what trains on responses; all are counts over the global batch.
    """

    groups: list[Group]
    sequences: list[Sequence]
    sums: dict[int, SequenceSums]  # of rollouts, by place
    objective: Objective
    correction: Correction
    constant: int
    prompts: int
    sampled_prompts: int
    sampled_tokens: int

    def __post_init__(self) -> None:
        self.result = BatchTerms([SequenceTerms() for _ in self.sequences])
        self._eta: list[float] = []
        self._squares, self._saturated, self._pairs = 0.0, 0, 0

    def finish(self) -> None:
        """The pairs' statistics, once all groups have been seen."""
        if self._pairs:
            self.result.eta = sum(self._eta) / self._pairs
            self.result.spread = math.sqrt(self._squares / self._pairs)
            self.result.saturated = self._saturated / self._pairs

    def rewards(self, places: list[int]) -> Tensor:
        """Of responses of one group, float64 [k]."""
        group = self.groups[self.sequences[places[0]].group]
        rewards = [group.responses[self.sequences[place].sample].reward for place in places]
        return torch.tensor(rewards, dtype=torch.float64)

    def one(self, share: float, places: list[int]) -> None:
        """A mean over the traces drawn, and over each one's tokens or their sum."""
        by_mean = _per_token(self.objective, self.objective.sft_length_normalize)
        for place in places:
            length = self.sequences[place].loss_tokens if by_mean else 1
            self.result.sequences[place].nll += share / (self.prompts * len(places) * length)

    def advantage(self, share: float, places: list[int]) -> None:
        """Advantages within the group; a sequence-level ratio is the coefficient pass's."""
        objective, k = self.objective, len(places)
        advantages = group_advantages(self.rewards(places).unsqueeze(0), objective.advantage_std)[0].tolist()
        for place, advantage in zip(places, advantages, strict=True):
            terms, n = self.result.sequences[place], self.sequences[place].loss_tokens
            terms.advantage, terms.grpo = advantage, self._token_weight(share, k, n)
            if objective.ratio_level == "sequence" and share > 0:
                by_sum = objective.scale == "trajectory"
                unit = ratio_unit(objective, n)
                surrogate, dlogp_s, clipped = _sequence_surrogate(
                    self.sums[place], advantage, unit, objective, self.correction
                )
                self.result.clipped_tokens += n * clipped
                once = terms.grpo if by_sum and objective.aggregation == "scale" else terms.grpo * n
                terms.dlogp_grpo = -once * dlogp_s * unit
                self.result.grpo_sequence_loss -= once * surrogate / share

    def _token_weight(self, share: float, k: int, n: int) -> float:
        """What weighs a token of a response of ``n`` tokens, one of ``k``, before its advantage."""
        aggregation = self.objective.aggregation
        if aggregation == "token_mean":  # equals `scale: token` where all lengths are equal
            return share * self.sampled_prompts / self.prompts / self.sampled_tokens
        if aggregation == "constant":
            return share / (self.prompts * k * self.constant)
        return share / (self.prompts * k * (n if self.objective.scale == "token" else 1))

    def gal(self, share: float, places: list[int]) -> None:
        """The pairs' coefficients (Eq. 16); a term without a share is not computed."""
        if share <= 0:
            return
        objective, rewards = self.objective, self.rewards(places)
        by_mean = _per_token(objective, objective.gal_length_normalize)
        units = [1 / self.sequences[place].loss_tokens if by_mean else 1.0 for place in places]
        sums = [self.sums[place] for place in places]
        log_ratios = torch.tensor(
            [(sum_.now - sum_.reference) * unit for sum_, unit in zip(sums, units, strict=True)], dtype=torch.float64
        )
        loss, coefficients, difficulty = gal_coefficients(log_ratios, rewards, objective.beta_gal)
        self.result.gal_loss += loss.item() / self.prompts
        for place, coefficient, unit in zip(places, coefficients.tolist(), units, strict=True):
            self.result.sequences[place].slope += share / self.prompts * coefficient * unit
        square, full, count = pair_statistics(log_ratios, rewards, objective.beta_gal)
        self._eta.append(difficulty.item() * count)
        self._squares, self._saturated, self._pairs = (
            self._squares + square,
            self._saturated + full,
            self._pairs + count,
        )


RULES = {"one": _CoefficientPass.one, "advantage": _CoefficientPass.advantage, "gal": _CoefficientPass.gal}


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
