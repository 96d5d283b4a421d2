"""Define each recipe as a tuple of terms: the table behind ``objective.method``.

A term says whose tokens it trains (``source``), in which regimes (``when``), what weighs a sequence (``rule``, decided
in coefficients.py for the whole batch), which function of a token's log-prob it is (``token``, a column of
kernels/grouped_loss.py), and its share of the loss (``share``, a name in ``SHARES``). Terms add up; one prompt may feed
several. No other module tests for a recipe's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dypo.objectives.schedule import mu
from megatron_dypo.records import Group, Kind, Regime

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective

MID, HARD, ALL = frozenset({Regime.MID}), frozenset({Regime.HARD}), frozenset(Regime)
SOLVED = frozenset({Regime.EASY, Regime.MID})
ROLLOUT, TEACHER, EXPERT = Kind.ROLLOUT, Kind.TEACHER, Kind.EXPERT

# Terms' names in metrics: ``loss/<name>``, ``grad_share/<name>``.
NAMES = {
    (ROLLOUT, "surrogate"): "grpo",
    (ROLLOUT, "slope"): "gal",
    (ROLLOUT, "tilted"): "sign",
    (TEACHER, "nll"): "sft",
    (TEACHER, "tilted"): "sft",
    (TEACHER, "shaped"): "shaped",
    (EXPERT, "shaped"): "expert",
}
# A term's share of the loss at a step (from 1).
SHARES: dict[str, Callable[[Objective, int], float]] = {
    "one": lambda objective, step: 1.0,
    "alpha": lambda objective, step: objective.alpha,
    "1-alpha": lambda objective, step: 1 - objective.alpha,
    "gamma": lambda objective, step: objective.gamma,
    "mu": lambda objective, step: mu(objective.mix, step),
    "1-mu": lambda objective, step: 1 - mu(objective.mix, step),
}
SCHEDULED = ("mu",)  # shares that change with the step, in metrics ``objective/<share>``


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    ``rule``: ``advantage`` (within the group), ``stream`` (each token's own, of a second model), ``gal`` (the pairs'
    coefficient), ``sign`` (whether it is right) or ``one`` (a mean over the traces drawn). ``token``: ``surrogate``
    (clipped ratio, and KL), ``slope`` (a constant dL/dlogp), ``nll`` (-logp), ``tilted`` (-logp, weighed by an
    exponential of the entropy) or ``shaped`` (the recipe's shape of a token's probability, without a ratio). A
    ``deferred`` term has no part in the updates of its step: its groups wait, and get an update of their own.
    """

    source: Kind
    rule: str
    token: str
    when: frozenset[Regime] = ALL
    share: str = "one"
    deferred: bool = False

    @property
    def name(self) -> str:
        """Return the term's name in metrics."""
        return NAMES[self.source, self.token]

    @property
    def has_ratio(self) -> bool:
        """Return whether the term compares with the old policy, and so has a KL term, too."""
        return self.name == "grpo"

    @property
    def column(self) -> str:
        """Return the kernel's column that weighs it; a tilted function uses that of -logp."""
        return "nll" if self.tilts else self.token

    @property
    def tilts(self) -> bool:
        """Return whether the entropy weighs its tokens."""
        return self.token in ("tilted",)

    @property
    def compares(self) -> bool:
        """Return whether its weights are differences of a group's rewards: all 0 if those are equal."""
        return self.rule in ("advantage", "gal")

    def trains(self, group: Group) -> bool:
        """Return whether the term trains a group: it is of experts alone, graded in one of its regimes, or has no
        responses and so no grade.
        """
        if group.expert or self.source == EXPERT:
            return group.expert and self.source == EXPERT
        return group.regime is None or group.regime in self.when


@dataclass(frozen=True)
class Recipe:
    """The terms, and whose rewards an advantage is relative to: the group's ``rollouts``, or ``rollouts+demo``, which
    adds the traces drawn for it and scores them. ``shape`` is that of its shaped term, unless ``objective.shape`` is
    set. ``side`` names the second model that provides each token's advantage.
    """

    terms: tuple[Term, ...]
    baseline: str = "rollouts"
    shape: str = "none"
    side: str | None = None

    @property
    def samples(self) -> bool:
        """Return whether any term trains on responses; otherwise nothing is sampled."""
        return any(term.source == ROLLOUT for term in self.terms)

    @property
    def imitates_experts(self) -> bool:
        """Return whether any term trains on the expert data set."""
        return any(term.source == EXPERT for term in self.terms)

    @property
    def scores_traces(self) -> bool:
        """Return whether drawn traces get a reward."""
        return self.baseline == "rollouts+demo"

    @property
    def defers(self) -> bool:
        """Return whether any term's groups wait for an update of their own."""
        return any(term.deferred for term in self.terms)

    def has(self, token: str) -> bool:
        """Return whether any term is this function of a token."""
        return any(term.token == token for term in self.terms)

    def sources(self, group: Group) -> list[Kind]:
        """Return the kinds of sequences that a group trains on, now or later."""
        return sorted({term.source for term in self.terms if term.trains(group)})


RECIPES = {
    "chord": Recipe(
        (Term(ROLLOUT, "advantage", "surrogate", share="1-mu"), Term(EXPERT, "one", "shaped", share="mu")),
        shape="nll",
    ),
    "dypo": Recipe(
        (
            Term(TEACHER, "one", "nll", HARD, share="gamma"),
            Term(ROLLOUT, "advantage", "surrogate", MID, share="alpha"),
            Term(ROLLOUT, "gal", "slope", MID, share="1-alpha"),
        )
    ),
    "grpo": Recipe((Term(ROLLOUT, "advantage", "surrogate"),)),
    "luffy": Recipe(
        (Term(ROLLOUT, "advantage", "surrogate"), Term(TEACHER, "advantage", "shaped")),
        baseline="rollouts+demo",
        shape="luffy",
    ),
    "relift": Recipe(
        (Term(ROLLOUT, "advantage", "surrogate"), Term(TEACHER, "one", "nll", HARD, share="gamma", deferred=True))
    ),
    "srft": Recipe(
        (
            Term(TEACHER, "one", "tilted", share="gamma"),
            Term(TEACHER, "advantage", "shaped"),
            Term(ROLLOUT, "sign", "tilted"),
        ),
        baseline="rollouts+demo",
        shape="p",
    ),
    "switch": Recipe(
        (Term(TEACHER, "one", "nll", HARD, share="gamma"), Term(ROLLOUT, "advantage", "surrogate", SOLVED))
    ),
    "ppo": Recipe((Term(ROLLOUT, "stream", "surrogate"),), side="critic"),
    "prime": Recipe((Term(ROLLOUT, "stream", "surrogate", MID),), side="prm"),
    "sft": Recipe((Term(TEACHER, "one", "nll", share="gamma"),)),
}


def recipe(objective: Objective) -> Recipe:
    """Return the recipe that ``objective.method`` names."""
    return RECIPES[objective.method]


def update_terms(objective: Objective, deferred: bool = False) -> list[Term]:
    """Return the terms of an update: the step's own, or those of ``deferred`` groups."""
    return [term for term in recipe(objective).terms if term.deferred == deferred]


def most_updates(objective: Objective) -> int:
    """Return the largest number of optimizer updates in one step."""
    return objective.updates_per_rollout + recipe(objective).defers


def has_ratio(objective: Objective) -> bool:
    """Return whether any term compares with the policy that sampled."""
    return any(term.has_ratio for term in recipe(objective).terms)


def shape(objective: Objective) -> str:
    """Return the function of a token's probability of the shaped term; ``none`` if the recipe has no such term."""
    chosen = recipe(objective)
    return (objective.shape or chosen.shape) if chosen.has("shaped") else "none"


def trained_responses(objective: Objective, group: Group) -> list[int]:
    """Return indices of the responses whose tokens carry loss: with ``mask_truncated``, those with an end token."""
    return [i for i, each in enumerate(group.responses) if each.finished or not objective.mask_truncated]


def _open_terms(objective: Objective, group: Group, deferred: bool) -> list[Term]:
    """Return the terms of an update that train a group, if it has responses that carry loss."""
    masked = bool(group.responses) and not trained_responses(objective, group)
    terms = [term for term in update_terms(objective, deferred) if term.trains(group)]
    return [term for term in terms if not (masked and term.source == ROLLOUT)]


def learning_sources(objective: Objective, group: Group, deferred: bool = False) -> list[Kind]:
    """Return the kinds of sequences of a group that its rewards or traces train.

    If all rewards are equal, every advantage and every pair's coefficient is 0.
    """
    rewards = group.baseline
    tied = all(reward == rewards[0] for reward in rewards)
    terms = _open_terms(objective, group, deferred)
    return sorted({term.source for term in terms if not (tied and term.compares)})


def trained_sources(objective: Objective, group: Group, deferred: bool = False) -> list[Kind]:
    """Return the kinds of sequences of a group with any gradient: ``learning_sources``, and those of entropy or KL."""
    terms = _open_terms(objective, group, deferred)
    beside = objective.kl_coef or objective.loss_function  # a user's loss may be any function of an advantage of 0
    held = {term.source for term in terms if objective.entropy_coef or (term.has_ratio and beside)}
    return sorted({*learning_sources(objective, group, deferred), *held})


def packed_sources(objective: Objective, group: Group, deferred: bool = False) -> list[Kind]:
    """Return the kinds of sequences of a group to pack: those that train, and traces that a token mean counts."""
    counted = {TEACHER} if recipe(objective).scores_traces and objective.aggregation == "token_mean" else set()
    return sorted({*trained_sources(objective, group, deferred), *counted})


def shares(objective: Objective, step: int) -> dict[str, float]:
    """Return each term's share of the loss at a step, by the term's name."""
    return {term.name: SHARES[term.share](objective, step) for term in recipe(objective).terms}


def scheduled(objective: Objective, step: int) -> dict[str, float]:
    """Return the recipe's shares that change with the step, by their names in ``SHARES``."""
    named = {term.share for term in recipe(objective).terms}
    return {name: SHARES[name](objective, step) for name in SCHEDULED if name in named}


def total(losses: Mapping[str, float], share: Mapping[str, float]) -> float:
    """Return the loss, from each term's own loss and share by the term's name."""
    loss = 0.0
    for name, part in share.items():
        loss += part * losses[name]
    return loss
