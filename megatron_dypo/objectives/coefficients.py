"""Compute each training sequence's coefficients from a graded batch: everything global is decided here.

L = (1/Q) sum_q [Hard: gamma SFT | Mid: alpha (1/k) sum_i GRPO_i + (1 - alpha) GAL | Easy: 0] (Eq. 24). Every normaliser
is a count over the global batch, and GAL's pair weights are known from the coefficient pass; the rest is local to a
token (token_loss.py). Each rank computes this for the whole batch: O(prompts x k) numbers, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_dypo.kernels.token_functions import LARGEST
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.dypo import gal_coefficients, group_advantages, pair_statistics
from megatron_dypo.objectives.recipes import (
    Term,
    has_ratio,
    recipe,
    shares,
    trained_responses,
    trained_sources,
    update_terms,
)
from megatron_dypo.objectives.sequence_ratio import ratio_unit, sequence_surrogate
from megatron_dypo.records import Group, Kind, Sequence

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


@dataclass(frozen=True)
class SequenceSums:
    """Sums over one response's tokens, in nats: policy now, behaviour policy, reference, rollout engine."""

    now: float
    old: float
    reference: float
    rollout: float


@dataclass
class SequenceTerms:
    """Coefficients of one sequence, a row of the ``source``'s; each token's loss depends on nothing else global.

    ``grpo`` weighs a token's -surrogate + KL; ``dlogp_grpo`` (sequence-level ratio) and ``slope`` are constant
    dL/dlogp_t; ``nll`` weighs -logp_t (times exp(``tilt`` H_t), if any sequence is tilted), ``shaped`` -f(p_t) and
    ``entropy`` -H_t.
    """

    advantage: float = 0.0
    grpo: float = 0.0
    dlogp_grpo: float = 0.0
    slope: float = 0.0
    nll: float = 0.0
    shaped: float = 0.0
    entropy: float = 0.0
    tilt: float = 0.0
    source: Kind = Kind.ROLLOUT

    def add(self, column: str, value: float) -> None:
        """Add to a column."""
        setattr(self, column, getattr(self, column) + value)


@dataclass
class BatchTerms:
    """Coefficients in the order of the sequences, with the terms' shares included; the unweighted loss terms that are
    not local to a token; and the pairs' statistics (None without a pair)."""

    sequences: list[SequenceTerms]
    share: dict[str, float]
    gal_loss: float = 0.0
    grpo_sequence_loss: float = 0.0
    clipped_tokens: int = 0
    eta: float | None = None
    spread: float | None = None
    saturated: float | None = None


def needs_reference(objective: Objective) -> bool:
    """Return whether any term reads reference log-probs."""
    side = recipe(objective).side
    beside = has_ratio(objective) and (objective.kl_coef > 0 or objective.ratio_base == "reference")
    aside = side == "prm" or (side == "critic" and objective.kl_in_reward > 0)
    return aside or _open(objective, "gal") or beside


def keeps_reference(objective: Objective) -> bool:
    """Return whether the reference needs a copy of the weights; ``previous`` needs only the last rollout's
    log-probs.
    """
    return needs_reference(objective) and objective.reference != "previous"


def needs_entropies(objective: Objective) -> bool:
    """Return whether any coefficient reads a sequence's mean entropy."""
    return recipe(objective).has("tilted") and objective.tilt_level == "sequence"


def needs_sums(objective: Objective) -> bool:
    """Return whether any coefficient reads the current policy's sums over a whole sequence."""
    by_ratio = has_ratio(objective) and objective.ratio_level == "sequence"
    return by_ratio or _open(objective, "gal") or needs_entropies(objective)


def _open(objective: Objective, rule: str) -> bool:
    first = 1  # no share that a reference depends on changes with the step
    return any(term.rule == rule and shares(objective, first)[term.name] > 0 for term in recipe(objective).terms)


def _per_token(objective: Objective, override: bool | None) -> bool:
    return objective.scale == "token" if override is None else override


def member_advantages(group: Group, objective: Objective) -> list[float]:
    """Return advantages of a group's responses and then of its scored traces, relative to all of them."""
    rewards = torch.tensor([group.baseline], dtype=torch.float64)
    return group_advantages(rewards, objective.advantage_std)[0].tolist()


def sequence_terms(
    groups: list[Group],
    sequences: list[Sequence],
    sums: list[SequenceSums | None],
    objective: Objective,
    correction: Correction,
    max_response_tokens: int,
    *,
    step: int,
    deferred: bool = False,
    entropies: list[float] | None = None,
) -> BatchTerms:
    """Return coefficients of ``sequences``, all of the mini-batch ``groups``; ``sums[i]`` is of rollout sequence i.

    ``deferred``: the mini-batch is of deferred groups. ``entropies``: means over each sequence's tokens, in nats, if
    ``needs_entropies``. Coefficients include each term's share at ``step`` and every normaliser; the returned losses
    include the normalisers only.
    """
    members: dict[int, dict[Kind, list[int]]] = {}
    for place, sequence in enumerate(sequences):
        members.setdefault(sequence.group, {}).setdefault(sequence.kind, []).append(place)
    share = shares(objective, step)
    counts = {kind: Count.of(kind, members.values(), sequences) for kind in Kind}
    prompts = sum(not group.expert for group in groups)
    if objective.normalize == "active":
        trained = [g for g in members if members[g].keys() & trained_sources(objective, groups[g], deferred)]
        prompts = sum(not groups[g].expert for g in trained)
    sampled = [group for group in groups if Kind.ROLLOUT in recipe(objective).sources(group)]
    tokens = sum(len(group.responses[i].ids) for group in sampled for i in trained_responses(objective, group))
    if recipe(objective).scores_traces:
        tokens += counts[Kind.TEACHER].tokens
    batch = _CoefficientPass(
        groups,
        sequences,
        share,
        {place: known for place, known in enumerate(sums) if known is not None},
        objective,
        correction,
        constant=objective.aggregation_constant or max_response_tokens,
        prompts=prompts,
        sampled_prompts=len(sampled),
        sampled_tokens=tokens,
        counts=counts,
        entropies=entropies or [],
    )
    for g, places in members.items():
        for term in update_terms(objective, deferred):
            if term.source in places and term.trains(groups[g]):
                RULES[term.rule](batch, term, share[term.name], places[term.source])
    if objective.entropy_coef:  # the bonus trains whatever a term could train
        packed_tokens = sum(count.tokens for count in counts.values())
        for terms in batch.result.sequences:
            terms.entropy = objective.entropy_coef / packed_tokens
    batch.finish()
    return batch.result


@dataclass(frozen=True)
class Count:
    """The number of groups with sequences of a kind in the mini-batch, and the loss tokens of all these sequences."""

    groups: int
    tokens: int

    @classmethod
    def of(cls, kind: Kind, members: Iterable[dict[Kind, list[int]]], sequences: list[Sequence]) -> Count:
        """Count one kind; ``members`` lists each group's sequences by kind."""
        groups = sum(kind in places for places in members)
        return cls(groups, sum(sequence.loss_tokens for sequence in sequences if sequence.kind == kind))


@dataclass
class _CoefficientPass:
    """One mini-batch on its way to coefficients: the rules add each group's numbers to its sequences' columns.

    ``prompts`` is Q, without experts' rows; ``sampled_*`` count the members of groups that train on responses,
    including those not packed because they would train nothing, but not the tokens of masked ones; ``counts`` count
    what is packed of each kind. All are counts over the global batch.
    """

    groups: list[Group]
    sequences: list[Sequence]
    share: dict[str, float]
    sums: dict[int, SequenceSums]  # of rollouts, by index
    objective: Objective
    correction: Correction
    constant: int
    prompts: int
    sampled_prompts: int
    sampled_tokens: int
    counts: dict[Kind, Count]
    entropies: list[float]

    def __post_init__(self) -> None:
        self.result = BatchTerms([SequenceTerms(source=sequence.kind) for sequence in self.sequences], self.share)
        self._eta: list[float] = []
        self._squares, self._saturated, self._pairs = 0.0, 0, 0

    def finish(self) -> None:
        """Compute the pairs' statistics, once all groups have been seen."""
        if self._pairs:
            self.result.eta = sum(self._eta) / self._pairs
            self.result.spread = math.sqrt(self._squares / self._pairs)
            self.result.saturated = self._saturated / self._pairs

    def group(self, places: list[int]) -> Group:
        """Return the group that the sequences belong to."""
        return self.groups[self.sequences[places[0]].group]

    def one(self, term: Term, share: float, places: list[int]) -> None:
        """Add a mean over the traces drawn and each one's tokens (or their sum), or over all traces' tokens.

        Teachers' traces are averaged over all prompts, experts' as a batch of their own.
        """
        by_mean = _per_token(self.objective, self.objective.sft_length_normalize)
        count = self.counts[term.source]
        population = count.groups if term.source == Kind.EXPERT else self.prompts
        for place in places:
            if self.objective.demo_aggregation == "token_mean":  # these groups' share of the prompts, times that mean
                weight = share * count.groups / population / count.tokens
            else:
                length = self.sequences[place].loss_tokens if by_mean else 1
                weight = share / (population * len(places) * length)
            self._weigh(term, place, weight, self.objective.tilt_demo)

    def sign(self, term: Term, share: float, places: list[int]) -> None:
        """Weigh a right response's -logp by ``weight_right``, a wrong one's by -1, without baseline or ratio."""
        objective, group = self.objective, self.group(places)
        for place in places:
            sequence = self.sequences[place]
            is_right = group.responses[sequence.sample].reward >= objective.reward_threshold
            weight = self._token_weight(share, len(group.baseline), sequence.loss_tokens)
            sign, tilt = (objective.weight_right, objective.tilt_right) if is_right else (-1.0, 0.0)
            self._weigh(term, place, weight * sign, tilt)

    def _weigh(self, term: Term, place: int, weight: float, tilt: float) -> None:
        """Weigh a sequence in the term's column; a tilted term also by exp(tilt H), with H per token or its mean."""
        terms = self.result.sequences[place]
        if term.tilts and self.objective.tilt_level == "sequence":
            weight *= math.exp(min(tilt * self.entropies[place], LARGEST))
        elif term.tilts:
            terms.tilt = tilt
        terms.add(term.column, weight)

    def advantage(self, term: Term, share: float, places: list[int]) -> None:
        """Add advantages within the group; its members include scored traces, and masked responses.

        A sequence-level ratio is computed in the coefficient pass.
        """
        objective, group = self.objective, self.group(places)
        advantages = member_advantages(group, objective)
        k = len(advantages)
        if term.source == Kind.TEACHER:
            advantages = advantages[len(group.responses) :]
        else:
            advantages = [advantages[self.sequences[place].sample] for place in places]
        for place, advantage in zip(places, advantages, strict=False):
            terms, n = self.result.sequences[place], self.sequences[place].loss_tokens
            weight = self._token_weight(share, k, n)
            if not term.has_ratio:
                terms.shaped = advantage * weight
                continue
            terms.advantage, terms.grpo = advantage, weight
            if objective.ratio_level == "sequence" and share > 0:
                by_sum = objective.scale == "trajectory"
                unit = ratio_unit(objective, n)
                surrogate, dlogp_s, clipped = sequence_surrogate(
                    self.sums[place], advantage, unit, objective, self.correction
                )
                self.result.clipped_tokens += n * clipped
                once = terms.grpo if by_sum and objective.aggregation == "scale" else terms.grpo * n
                terms.dlogp_grpo = -once * dlogp_s * unit
                self.result.grpo_sequence_loss -= once * surrogate / share

    def _token_weight(self, share: float, k: int, n: int) -> float:
        """Return a token's weight before its advantage, in a sequence of ``n`` tokens, one of ``k`` members."""
        aggregation = self.objective.aggregation
        if aggregation == "token_mean":  # equals `scale: token` if all lengths are equal
            return share * self.sampled_prompts / self.prompts / self.sampled_tokens
        if aggregation == "constant":
            return share / (self.prompts * k * self.constant)
        return share / (self.prompts * k * (n if self.objective.scale == "token" else 1))

    def stream(self, term: Term, share: float, places: list[int]) -> None:
        """Add the weight of each response; its tokens' advantages are a separate stream."""
        k = len(self.group(places).responses)
        for place in places:
            self.result.sequences[place].grpo = self._token_weight(share, k, self.sequences[place].loss_tokens)

    def gal(self, term: Term, share: float, places: list[int]) -> None:
        """Add the pair coefficients (Eq. 16) of packed responses; a term without a share is not computed."""
        if share <= 0:
            return
        objective = self.objective
        of_group = self.group(places).rewards
        rewards = torch.tensor([of_group[self.sequences[place].sample] for place in places], dtype=torch.float64)
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


RULES = {
    "one": _CoefficientPass.one,
    "advantage": _CoefficientPass.advantage,
    "stream": _CoefficientPass.stream,
    "gal": _CoefficientPass.gal,
    "sign": _CoefficientPass.sign,
}
