"""Each recipe as a tuple of terms: the table behind ``objective.method``.

A term says whose tokens it trains (``source``), in which regimes (``when``), what weighs a sequence (``rule``, decided
in coefficients.py for the whole batch), which function of a token's log-prob it is (``token``, a column of
kernels/grouped_loss.py), and its share of the loss (``share``, a name in ``shares``). Terms add up; one prompt may feed
several. No recipe's name is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dypo.records import Kind, Regime

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective

MID, HARD, ALL = frozenset({Regime.MID}), frozenset({Regime.HARD}), frozenset(Regime)
SOLVED = frozenset({Regime.EASY, Regime.MID})
ROLLOUT, TEACHER = Kind.ROLLOUT, Kind.TEACHER


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    ``rule``: ``advantage`` (within the group), ``gal`` (the pairs' coefficient) or ``one`` (a mean over the traces
    drawn). ``token``: ``surrogate`` (clipped ratio, and KL), ``slope`` (a constant dL/dlogp), ``nll`` (-logp) or
    ``shaped`` (``objective.shape`` of a trace's probability, without a ratio).
    """

    source: Kind
    rule: str
    token: str
    when: frozenset[Regime] = ALL
    share: str = "one"

    @property
    def name(self) -> str:
        """The term's name in metrics: ``loss/<name>``, ``grad_share/<name>``."""
        return {"surrogate": "grpo", "slope": "gal", "nll": "sft", "shaped": "shaped"}[self.token]

    @property
    def has_ratio(self) -> bool:
        """Whether the term compares with the old policy, and so has a KL term beside it."""
        return self.name == "grpo"

    def trains(self, regime: Regime | None) -> bool:
        """Whether the term trains a group of this regime (None: no responses, so not graded)."""
        return regime is None or regime in self.when


@dataclass(frozen=True)
class Recipe:
    """The terms, and whose rewards an advantage is relative to: the group's ``rollouts``, or ``rollouts+demo``, its
    rollouts and the traces drawn for it, which are then scored as they are."""

    terms: tuple[Term, ...]
    baseline: str = "rollouts"

    @property
    def samples(self) -> bool:
        """Whether any term trains on responses; without one nothing is sampled."""
        return any(term.source == ROLLOUT for term in self.terms)

    @property
    def scores_traces(self) -> bool:
        """Whether drawn traces get a reward."""
        return self.baseline == "rollouts+demo"

    def has(self, token: str) -> bool:
        """Whether any term is this function of a token."""
        return any(term.token == token for term in self.terms)

    def sources(self, regime: Regime | None) -> list[Kind]:
        """Kinds of sequences that a group of this regime trains on."""
        return sorted({term.source for term in self.terms if term.trains(regime)})


RECIPES = {
    "dypo": Recipe(
        (
            Term(TEACHER, "one", "nll", HARD, share="gamma"),
            Term(ROLLOUT, "advantage", "surrogate", MID, share="alpha"),
            Term(ROLLOUT, "gal", "slope", MID, share="1-alpha"),
        )
    ),
    "grpo": Recipe((Term(ROLLOUT, "advantage", "surrogate"),)),
    "luffy": Recipe(
        (Term(ROLLOUT, "advantage", "surrogate"), Term(TEACHER, "advantage", "shaped")), baseline="rollouts+demo"
    ),
    "switch": Recipe(
        (Term(TEACHER, "one", "nll", HARD, share="gamma"), Term(ROLLOUT, "advantage", "surrogate", SOLVED))
    ),
    "sft": Recipe((Term(TEACHER, "one", "nll", share="gamma"),)),
}


def recipe(objective: Objective) -> Recipe:
    """The recipe that ``objective.method`` names."""
    return RECIPES[objective.method]


def learning_sources(objective: Objective, regime: Regime | None, rewards: list[float]) -> list[Kind]:
    """Kinds of sequences of a group that its rewards or traces train, given its rewards (``Group.baseline``).

    Where all rewards are equal, every advantage is 0, and every pair's coefficient.
    """
    tied = all(reward == rewards[0] for reward in rewards)
    terms = [term for term in recipe(objective).terms if term.trains(regime)]
    return sorted({term.source for term in terms if not tied or term.rule == "one"})


def trained_sources(objective: Objective, regime: Regime | None, rewards: list[float]) -> list[Kind]:
    """Kinds of sequences of a group that get any gradient: as ``learning_sources``, or of entropy or KL."""
    terms = [term for term in recipe(objective).terms if term.trains(regime)]
    held = {term.source for term in terms if objective.entropy_coef or (term.has_ratio and objective.kl_coef)}
    return sorted({*learning_sources(objective, regime, rewards), *held})


def packed_sources(objective: Objective, regime: Regime | None, rewards: list[float]) -> list[Kind]:
    """Kinds of sequences of a group that are packed: those that train, and traces whose tokens a token mean counts."""
    counted = {Kind.TEACHER} if recipe(objective).scores_traces and objective.aggregation == "token_mean" else set()
    return sorted({*trained_sources(objective, regime, rewards), *counted})


def shares(objective: Objective) -> dict[str, float]:
    """Each term's share of the loss, by the term's name."""
    values = {"one": 1.0, "alpha": objective.alpha, "1-alpha": 1 - objective.alpha, "gamma": objective.gamma}
    return {term.name: values[term.share] for term in recipe(objective).terms}


def total(losses: Mapping[str, float], objective: Objective) -> float:
    """The loss, from each term's own by the term's name."""
    loss = 0.0
    for name, share in shares(objective).items():
        loss += share * losses[name]
    return loss
