"""The objective against an independent float64 reference (reference_objective.py), and its parts' invariants.

Ours is what update.py does: coefficients of the whole batch, then token-local losses over micro-batches, divided at
random here. Inputs are representable in float32, so both precisions see the same numbers. Legend: N tokens of a
micro-batch; n of a sequence, whose leaves and gradients [2, n] are of the log-probs and of the entropies.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dypo.config.schema import Config, Mix, Objective
from megatron_dypo.objectives import (
    Regime,
    SequenceSums,
    TokenStreams,
    dypo_loss,
    gal_coefficients,
    grade,
    group_advantages,
    pair_statistics,
    sequence_terms,
)
from megatron_dypo.objectives.coefficients import BatchTerms, needs_entropies, needs_reference
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.queue import failed
from megatron_dypo.objectives.recipes import RECIPES, recipe, shares, total
from megatron_dypo.records import Group, Kind, Prompt, Response, Sequence
from megatron_dypo.rollout.manager import DynamicSampling
from megatron_dypo.training.minibatch import training_sequences
from megatron_dypo.training.passes import PER_TOKEN
from tests import reference_objective as page

LONGEST = 9  # tokens of a response; the default of aggregation_constant
EXACT, SINGLE = 1e-11, 1e-6  # of the norm, or of the sum of absolute summands: float64 and float32 streams
MIXED = [[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [0.9, 0.5, 0.5, 0.1]]
Key = tuple[int, Kind, int]  # group, kind, sample


@dataclass
class Batch:
    """Graded groups with every sequence's log-probs [n] (now, old, reference, rollout) and entropies [n].

    They are drawn whether the sequence is trained or not.
    """

    groups: list[Group]
    logp: dict[Key, dict[str, Tensor]]

    def waiting(self, objective: Objective) -> Batch:
        """Return a queue's part of them: those that failed, with their traces, and neither responses nor grades."""
        names = {name for name, _ in failed(self.groups, objective)}
        kept = [g for g, group in enumerate(self.groups) if group.prompt.id in names]
        groups = [dataclasses.replace(self.groups[g], responses=[], regime=None) for g in kept]
        traces = {place: x for place, x in self.logp.items() if place[1] == Kind.TEACHER and place[0] in kept}
        return Batch(groups, {(kept.index(g), kind, i): x for (g, kind, i), x in traces.items()})

    def trace(self, group: Group, i: int) -> np.ndarray:
        kind = Kind.EXPERT if group.expert else Kind.TEACHER
        return np.zeros(len(self.logp[self.groups.index(group), kind, i]["now"]), np.int32)


def make_batch(
    rewards: list[list[float]],
    objective: Objective,
    *,
    seed: int = 0,
    traces: list[int] | None = None,
    longest: int = LONGEST,
    drift: float = 0.3,
) -> Batch:
    """Return one group per row of rewards, with ``traces[g]`` teacher traces (by default one each).

    If the recipe trains on experts there are three; drift 0: a first step.
    """
    generator, of_entropies, of_advantages = (torch.Generator().manual_seed(seed + each) for each in range(3))

    def values() -> dict[str, Tensor]:
        n = int(torch.randint(1, longest + 1, (), generator=generator))
        old_n = -2 * torch.empty(n).exponential_(generator=generator)
        noise = {name: drift * torch.randn(n, generator=generator) for name in ("now", "reference", "rollout")}
        drawn = {"old": old_n, "entropy": torch.empty(n).exponential_(generator=of_entropies)}
        drawn["advantage"] = torch.randn(n, generator=of_advantages)
        return {name: x_n.double() for name, x_n in (drawn | {k: old_n + x_n for k, x_n in noise.items()}).items()}

    groups, logp = [], {}
    for g, row in enumerate(rewards):
        draws = min(1 if traces is None else traces[g], objective.teachers_per_prompt)
        logp |= {(g, Kind.ROLLOUT, i): values() for i in range(len(row))}
        logp |= {(g, Kind.TEACHER, i): values() for i in range(draws)}
        responses = []
        for i, reward in enumerate(row):
            engine_n = logp[g, Kind.ROLLOUT, i]["rollout"]
            end = "length" if g % 5 == 4 or (g + i) % 3 == 0 else "stop"  # a whole group, and some of others
            responses.append(Response(np.zeros(len(engine_n), np.int32), engine_n.float().numpy(), end, reward))
        prompt_ids = np.zeros(int(torch.randint(1, 4, (), generator=generator)), np.int32)
        limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
        regime = grade(torch.tensor([row]), objective.reward_threshold, *limits)[0]
        rewards_of_traces = (1.0, 0.3, 1.0)[:draws] if recipe(objective).scores_traces else ()
        groups.append(
            Group(Prompt(f"prompt-{g}", "", ()), prompt_ids, responses, regime, tuple(range(draws)), rewards_of_traces)
        )
    for g in range(len(groups), len(groups) + 3 * recipe(objective).imitates_experts):
        logp[g, Kind.EXPERT, 0] = values()
        groups.append(Group(Prompt(f"expert-{g}", "", ()), np.zeros(2, np.int32), teacher_indices=(0,), expert=True))
    return Batch(groups, logp)


@dataclass
class Ours:
    """The package's results: loss, gradient [2, n] of every trained sequence, and the metrics' sums."""

    loss: float = 0.0
    gradient: dict[Key, Tensor] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    terms: BatchTerms = field(default_factory=lambda: BatchTerms([]))


def coefficients(
    batch: Batch, objective: Objective, correction: Correction, deferred: bool = False
) -> tuple[list[Sequence], BatchTerms]:
    sequences = training_sequences(batch.groups, objective, batch.trace, deferred)
    sums: list[SequenceSums | None] = []
    for sequence in sequences:
        logp = {name: batch.logp[key(sequence)][name].sum().item() for name in PER_TOKEN}
        if not needs_reference(objective):
            logp["reference"] = 0.0  # as update.py leaves it: it must not be read
        sums.append(SequenceSums(**logp) if sequence.kind == Kind.ROLLOUT else None)
    means = [batch.logp[key(sequence)]["entropy"].mean().item() for sequence in sequences]
    return sequences, sequence_terms(
        batch.groups,
        sequences,
        sums,
        objective,
        correction,
        LONGEST,
        step=1,
        deferred=deferred,
        entropies=means if needs_entropies(objective) else None,
    )


def key(sequence: Sequence) -> Key:
    return sequence.group, sequence.kind, sequence.sample


def streams(
    batch: Batch, chosen: list[Sequence], terms: list, objective: Objective, correction: Correction, dtype: torch.dtype
) -> tuple[Tensor, TokenStreams]:
    """Return (logp [N], streams) of one micro-batch, as update.py makes them: teacher traces have no other policy."""
    is_rollout = bool(chosen) and chosen[0].kind == Kind.ROLLOUT

    def known(name: str) -> Tensor:
        return torch.cat([torch.zeros(0), *(batch.logp[key(sequence)][name] for sequence in chosen)]).to(dtype)

    return known("now").requires_grad_(), TokenStreams.of(
        terms,
        [sequence.loss_tokens for sequence in chosen],
        dtype=dtype,
        objective=objective,
        correction=correction,
        share=shares(objective, 1),
        old_N=known("old") if is_rollout else None,
        rollout_N=known("rollout") if is_rollout else None,
        reference_N=known("reference") if is_rollout and needs_reference(objective) else None,
        advantage_N=known("advantage") if is_rollout and recipe(objective).side else None,
    )


def cut(places: list[int], seed: int) -> list[list[int]]:
    """Return micro-batches of the places in random order, one of them empty."""
    order = random.Random(seed)
    places = order.sample(places, len(places))
    edges = sorted(order.randint(0, len(places)) for _ in range(3))
    return [[]] + [
        places[start:end] for start, end in zip([0, *edges], [*edges, len(places)], strict=True) if start < end
    ]


def ours(
    batch: Batch,
    objective: Objective,
    correction: Correction = Correction(),
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    deferred: bool = False,
) -> Ours:
    sequences, terms = coefficients(batch, objective, correction, deferred)
    result = Ours(terms=terms)
    local = 0.0
    for kind in Kind:
        for places in cut([p for p, sequence in enumerate(sequences) if sequence.kind == kind], seed):
            chosen = [sequences[place] for place in places]
            logp_N, stream = streams(batch, chosen, [terms.sequences[p] for p in places], objective, correction, dtype)
            entropies = [batch.logp[key(sequence)]["entropy"] for sequence in chosen]
            entropy_N = torch.cat([torch.zeros(0), *entropies]).to(dtype).requires_grad_()
            loss, totals = dypo_loss(logp_N, stream, entropy_N)
            slopes = torch.autograd.grad(loss, (logp_N, entropy_N), allow_unused=True, materialize_grads=True)
            gradient_2N = torch.stack(slopes).double()
            pieces = gradient_2N.split([sequence.loss_tokens for sequence in chosen], 1) if chosen else []
            result.gradient |= {key(sequence): piece for sequence, piece in zip(chosen, pieces, strict=True)}
            local += loss.item()
            for name, value in totals.items():
                result.totals[name] = result.totals.get(name, 0.0) + value
    elsewhere = dict.fromkeys(terms.share, 0.0) | {"grpo": terms.grpo_sequence_loss, "gal": terms.gal_loss}
    result.loss = local + total(elsewhere, terms.share)
    return result


def reference(
    batch: Batch, objective: Objective, correction: Correction = Correction()
) -> tuple[page.Terms, dict[Key, Tensor]]:
    """Return the page's terms, and the log-probs in which they are differentiable."""
    leaves = {place: torch.stack([x["now"], x["entropy"]]).requires_grad_() for place, x in batch.logp.items()}
    questions, experts = [], []
    for g, group in enumerate(batch.groups):
        if group.expert:
            experts.append(page.Trace(*leaves[g, Kind.EXPERT, 0]))
            continue
        rollouts = []
        for i, response in enumerate(group.responses):
            place = (g, Kind.ROLLOUT, i)
            logp, (now_n, entropy_n) = batch.logp[place], leaves[place]
            rollouts.append(
                page.Rollout(
                    response.reward,
                    now_n,
                    logp["old"],
                    logp["reference"],
                    logp["rollout"],
                    entropy_n,
                    response.finished,
                    logp["advantage"],
                )
            )
        traces = [page.Trace(*leaves[g, Kind.TEACHER, i]) for i in group.teacher_indices or ()]
        for trace, reward in zip(traces, group.teacher_rewards, strict=False):
            trace.reward = reward
        questions.append(page.Question(rollouts, traces))
    return page.dypo(questions, objective, correction.kind, correction.cap, LONGEST, experts), leaves


def gradient(loss: Tensor, leaves: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the gradient of every sequence, zero if it does not contribute."""
    if not loss.requires_grad:
        return {place: torch.zeros_like(leaf) for place, leaf in leaves.items()}
    parts = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        place: torch.zeros_like(leaf) if part is None else part
        for (place, leaf), part in zip(leaves.items(), parts, strict=True)
    }


def flat(values: dict[Key, Tensor], places: dict[Key, Tensor]) -> Tensor:
    """Return one vector over all tokens of the batch, including those of dropped sequences."""
    assert values.keys() <= places.keys()
    found = [values.get(place, torch.zeros_like(like)) for place, like in sorted(places.items())]
    return torch.cat([each.flatten() for each in found]).detach()


def assert_agrees(batch: Batch, objective: Objective, correction: Correction = Correction(), seed: int = 0) -> None:
    """Check value and gradient against the reference, with float64 streams and with a run's float32 ones."""
    terms, leaves = reference(batch, objective, correction)
    summands = terms.summands()
    expected = flat(gradient(summands.sum(), leaves), leaves)
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        result = ours(batch, objective, correction, dtype=dtype, seed=seed)
        assert abs(result.loss - summands.sum().item()) <= tolerance * summands.abs().sum().item()
        assert (flat(result.gradient, leaves) - expected).norm() <= tolerance * expected.norm()


# --- the whole objective

TABLE = list(
    itertools.product(
        ["token", "trajectory"],
        ["scale", "token_mean", "constant"],
        ["token", "sequence"],
        ["old", "reference"],
        [0.0, 0.3],
        ["none", "truncate", "mask"],
    )
)
ASYMMETRIC = {"clip_low": 0.15, "clip_high": 0.28}


@pytest.mark.parametrize("row", range(len(TABLE)), ids=["-".join(map(str, row)) for row in TABLE])
def test_value_and_gradient_equal_the_reference_for_any_configuration_and_cut(row: int) -> None:
    scale, aggregation, ratio_level, ratio_base, kl_coef, kind = TABLE[row]
    draw = random.Random(row)
    objective = Objective(
        scale=scale,
        aggregation=aggregation,
        aggregation_constant=draw.choice([None, 5]),
        ratio_level=ratio_level,
        ratio_base=ratio_base,
        kl_coef=kl_coef,
        alpha=draw.choice([0.5, 0.3]),
        gamma=draw.choice([1.0, 0.7]),
        beta_gal=draw.choice([1.0, 0.4]),
        advantage_std=draw.choice(["population", "sample", "none"]),
        normalize=draw.choice(["all", "active"]),
        gal_length_normalize=draw.choice([None, True, False]),
        sft_length_normalize=draw.choice([None, True, False]),
        hard_max_solved=draw.choice([0, 1]),
        teachers_per_prompt=draw.choice([1, 2]),
        entropy_coef=draw.choice([0.0, 0.2]),
        surrogate=draw.choice(["clip", "cispo", "sapo"]),
        sapo_tau_neg=draw.choice([1.05, 2.0]),
        mask_truncated=draw.choice([False, True]),
        **ASYMMETRIC,
    )
    batch = make_batch(MIXED, objective, seed=row, traces=[1, 2, 2, 0, 1, 1, 2])
    assert_agrees(batch, objective, Correction(kind, 1.4), seed=row)


def test_the_mixed_batch_reaches_every_branch() -> None:
    objective = Objective(teachers_per_prompt=2, **ASYMMETRIC)
    batch = make_batch(MIXED, objective, traces=[1, 2, 2, 0, 1, 1, 2])
    assert {group.regime for group in batch.groups} == set(Regime)
    hard = [len(group.teacher_indices) for group in batch.groups if group.regime == Regime.HARD]
    assert sorted(hard) == [0, 2]
    ratio, old_ratio = [
        torch.cat([(x[over] - x[under]).exp() for (_, kind, _), x in batch.logp.items() if kind == Kind.ROLLOUT])
        for over, under in (("now", "old"), ("old", "rollout"))
    ]
    assert (ratio < 0.85).any() and (ratio > 1.28).any() and ((ratio > 0.85) & (ratio < 1.28)).any()
    assert (old_ratio < 1 / 1.4).any() and (old_ratio > 1.4).any()


SHAPES = {
    "one_response_each": {"rewards": [[1], [0], [0]]},
    "one_token_each": {"rewards": MIXED, "longest": 1},
    "all_ties": {"rewards": [[1, 1, 1], [0, 0, 0], [0.7, 0.7, 0.7]]},
    "no_hard": {"rewards": [[1, 1], [1, 0], [0, 1]]},
    "no_mid": {"rewards": [[1, 1], [0, 0], [0, 0]]},
    "hard_without_any_teacher": {"rewards": [[0, 0], [0, 0]], "traces": [0, 0]},
    "real_valued_rewards": {"rewards": [[0.2, 0.9, 0.9, -3.5], [0.4, 0.6, 0.5, 0.1]]},
    "on_policy": {"rewards": MIXED, "drift": 0.0},
    "far_off_policy": {"rewards": MIXED, "drift": 3.0},
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_equal_the_reference_for_degenerate_batches(shape: str, method: str) -> None:
    for extra in (
        {},
        {"entropy_coef": 0.1},
        {"kl_coef": 0.2, "normalize": "active", "ratio_base": "reference", "aggregation": "token_mean"},
        {"mask_truncated": True, "normalize": "active", "aggregation": "token_mean"},
    ):
        objective = Objective(method=method, teachers_per_prompt=2, **extra)
        assert_agrees(make_batch(objective=objective, **SHAPES[shape]), objective)


OBJECTIVES = st.builds(
    Objective,
    method=st.sampled_from(["dypo", "dypo", *RECIPES]),
    gate=st.sampled_from(["reward", "advantage"]),
    demo_aggregation=st.sampled_from(["scale", "token_mean"]),
    shape=st.sampled_from(["luffy", "p", "nll", "phi", "sg_p"]),
    tilt_demo=st.sampled_from([-1.0, 0.0, 0.5]),
    tilt_right=st.sampled_from([1.0, -0.5]),
    weight_right=st.sampled_from([0.0, 0.1, 2.0]),
    tilt_level=st.sampled_from(["token", "sequence"]),
    surrogate=st.sampled_from(["clip", "cispo", "sapo"]),
    sapo_tau_pos=st.sampled_from([0.5, 1.0]),
    shape_gamma=st.sampled_from([0.01, 0.1, 1.0]),
    scale=st.sampled_from(["token", "trajectory"]),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    beta_gal=st.sampled_from([0.1, 1.0, 3.0]),
    gamma=st.sampled_from([0.0, 1.0, 2.5]),
    clip_low=st.sampled_from([0.0, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.2, 0.5]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    hard_max_solved=st.integers(0, 2),
    teachers_per_prompt=st.integers(1, 3),
    aggregation=st.sampled_from(["scale", "token_mean", "constant"]),
    aggregation_constant=st.sampled_from([None, 1, 20]),
    gal_length_normalize=st.sampled_from([None, True, False]),
    sft_length_normalize=st.sampled_from([None, True, False]),
    normalize=st.sampled_from(["all", "active"]),
    ratio_base=st.sampled_from(["old", "reference"]),
    ratio_level=st.sampled_from(["token", "sequence"]),
    advantage_std=st.sampled_from(["population", "sample", "none"]),
    entropy_coef=st.sampled_from([0.0, 0.0, 0.2]),
    mask_truncated=st.booleans(),
    mix=st.builds(
        Mix,
        warmup=st.integers(0, 3),
        decay=st.integers(0, 3),
        peak=st.sampled_from([0.0, 0.9, 1.0]),
        valley=st.sampled_from([0.0, 0.1, 1.0]),
    ),
)
REWARDS = st.integers(1, 5).flatmap(
    lambda k: st.lists(
        st.lists(st.sampled_from([0, 0, 1, 1, 0.3, 0.5, -2.0]), min_size=k, max_size=k), min_size=1, max_size=5
    )
)


@settings(max_examples=60, deadline=None)
@given(
    objective=OBJECTIVES,
    rewards=REWARDS,
    traces=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    kind=st.sampled_from(["none", "truncate", "mask"]),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_equals_the_reference_whatever_the_configuration_and_batch(
    objective: Objective, rewards: list[list[float]], traces: list[int], kind: str, seed: int
) -> None:
    batch, correction = make_batch(rewards, objective, seed=seed, traces=traces), Correction(kind)
    terms, leaves = reference(batch, objective, correction)
    summands, result = terms.summands(), ours(batch, objective, correction, seed=seed)
    expected = flat(gradient(summands.sum(), leaves), leaves)
    assert abs(result.loss - summands.sum().item()) <= EXACT * summands.abs().sum().item()
    assert (flat(result.gradient, leaves) - expected).norm() <= EXACT * expected.norm()


@pytest.mark.parametrize("method", [name for name, chosen in RECIPES.items() if chosen.samples])
@pytest.mark.parametrize("masks", [False, True])
def test_dynamic_sampling_keeps_the_groups_in_which_something_has_a_coefficient(method: str, masks: bool) -> None:
    """The cases include groups with some or all responses masked."""
    config = Config.model_construct(objective=Objective(method=method, mask_truncated=masks))
    sampling, kept = DynamicSampling(config, [], None, lambda group: [0]), []
    for row, cut_off in itertools.product(
        [[1, 1, 1], [1, 0, 0], [0, 0, 0]], itertools.product([False, True], repeat=3)
    ):
        batch = make_batch([row], config.objective)
        for response, is_cut in zip(batch.groups[0].responses, cut_off, strict=True):
            response.finish_reason = "length" if is_cut else "stop"
        sequences, terms = coefficients(batch, config.objective, Correction())
        sampled = [x for x, sequence in zip(terms.sequences, sequences, strict=True) if sequence.group == 0]
        streams = RECIPES[method].side is not None
        columns = [(x.grpo * (streams or x.advantage), x.slope, x.nll, x.shaped) for x in sampled]
        kept.append(sampling.trains(batch.groups[0]))
        assert kept[-1] == any(map(any, columns)), (row, cut_off)
    assert any(kept)


def test_a_masked_response_counts_in_the_baseline_and_in_k_and_in_no_token_mean() -> None:
    """By hand, the last of rewards 1, 0, 0 is cut off; A = 2/3 and -1/3, a token weighs 1/k/n, or 1 of all tokens."""
    for aggregation in ("scale", "token_mean"):
        objective = Objective(method="grpo", advantage_std="none", aggregation=aggregation, mask_truncated=True)
        batch = make_batch([[1, 0, 0]], objective, drift=0.0)
        for response, end in zip(batch.groups[0].responses, ("stop", "stop", "length"), strict=True):
            response.finish_reason = end
        result = ours(batch, objective)
        n = [len(response.ids) for response in batch.groups[0].responses]
        weights = [1 / 3 / n[0], 1 / 3 / n[1]] if aggregation == "scale" else [1 / (n[0] + n[1])] * 2
        assert result.gradient.keys() == {(0, Kind.ROLLOUT, 0), (0, Kind.ROLLOUT, 1)}
        for (_, _, i), slope_2n in result.gradient.items():
            assert torch.allclose(slope_2n[0], torch.full((n[i],), -(2 / 3, -1 / 3)[i] * weights[i]).double())


def test_all_easy_is_exactly_nothing() -> None:
    objective = Objective()
    result = ours(make_batch([[1, 1], [1, 1]], objective), objective)
    assert result.loss == 0.0 and not result.gradient and not result.terms.sequences


def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradient() -> None:
    objective = Objective(aggregation="token_mean", kl_coef=0.1)
    batch = make_batch(MIXED, objective)
    first, *others = [ours(batch, objective, Correction("truncate"), seed=seed) for seed in range(5)]
    for other in others:
        assert other.loss == pytest.approx(first.loss, rel=EXACT)
        assert (flat(other.gradient, first.gradient) - flat(first.gradient, first.gradient)).abs().max() < 1e-15


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_every_aggregation_is_the_default_at_equal_lengths(ratio_level: str) -> None:
    """token_mean is Mid's share of the prompts times one mean over Mid's tokens; constant is exact at that length."""
    batch = make_batch(MIXED, Objective(), longest=1)
    default, *others = [
        ours(batch, Objective(ratio_level=ratio_level, aggregation=aggregation, aggregation_constant=1))
        for aggregation in ("scale", "token_mean", "constant")
    ]
    for other in others:
        assert other.loss == pytest.approx(default.loss, rel=EXACT)
        assert (flat(other.gradient, default.gradient) - flat(default.gradient, default.gradient)).abs().max() < 1e-15


def test_terms_over_any_slices_are_terms_over_all() -> None:
    """The fused head asks for one chunk at a time."""
    objective = Objective(kl_coef=0.1)
    batch = make_batch(MIXED, objective)
    sequences, terms = coefficients(batch, objective, Correction())
    chosen = [p for p, sequence in enumerate(sequences) if sequence.kind == Kind.ROLLOUT]
    arguments = batch, [sequences[p] for p in chosen], [terms.sequences[p] for p in chosen], objective, Correction()
    logp_N, whole = streams(*arguments, torch.float64)
    _, sliced = streams(*arguments, torch.float64)
    entropy_N = torch.rand(len(logp_N), dtype=torch.float64)
    expected = whole.terms(logp_N.detach(), entropy_N, slice(0, len(logp_N)))
    slices = [slice(start, min(start + 7, len(logp_N))) for start in range(0, len(logp_N), 7)]
    parts = [sliced.terms(logp_N.detach()[t], entropy_N[t], t) for t in slices]
    for value, pieces in zip(expected, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), value)
    assert sliced.totals == whole.totals
    assert whole.totals["entropy"] == pytest.approx(entropy_N.sum().item())
    assert whole.totals["rollout_tokens"] == len(logp_N)


# --- the first step, extremes and nothing at all


@pytest.mark.parametrize("ratio_base", ["old", "reference"])
def test_on_the_first_step_every_ratio_is_exactly_one(ratio_base: str) -> None:
    objective = Objective(kl_coef=0.5, ratio_base=ratio_base)
    batch = make_batch(MIXED, objective, drift=0.0)
    sequences, terms = coefficients(batch, objective, Correction("truncate"))
    chosen = [p for p, sequence in enumerate(sequences) if sequence.kind == Kind.ROLLOUT]
    logp_N, stream = streams(
        batch,
        [sequences[p] for p in chosen],
        [terms.sequences[p] for p in chosen],
        objective,
        Correction("truncate"),
        torch.float32,
    )
    summands_N, dlogp_N = stream.terms(logp_N.detach(), None, slice(0, len(logp_N)))
    advantage_N, grpo_N, _, slope_N, *_ = stream.coefficients_CS.repeat_interleave(stream.cu_seqlens.diff(), 1)
    assert torch.equal(summands_N, -grpo_N * advantage_N)
    assert torch.equal(dlogp_N, -grpo_N * advantage_N + slope_N)
    assert stream.totals["clipped"] == 0 and stream.totals["loss/kl"] == 0
    assert terms.eta == 0.25 and terms.spread == 0.0 and terms.saturated == 0.0


@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_distant_policies_stay_finite_in_float32(gap: float) -> None:
    """This also holds if no term weights the KL: zero times an overflow would be NaN."""
    for kl_coef in (0.0, 0.1):
        objective = Objective(kl_coef=kl_coef)
        batch = make_batch([[1, 0]], objective)
        for logp in batch.logp.values():
            logp["now"] += gap
        result = ours(batch, objective, Correction("mask"), dtype=torch.float32)
        assert math.isfinite(result.loss) and all(math.isfinite(x) for x in result.totals.values())
        assert all(piece.isfinite().all() for piece in result.gradient.values())


def test_a_not_a_number_is_never_swallowed() -> None:
    for objective in (Objective(), Objective(ratio_base="reference", kl_coef=0.1)):
        batch = make_batch([[1, 0]], objective)
        batch.logp[0, Kind.ROLLOUT, 1]["now"][0] = math.nan
        assert math.isnan(ours(batch, objective).loss)


def test_an_empty_micro_batch_is_zero() -> None:
    for objective in (Objective(), Objective(ratio_level="sequence", kl_coef=1.0)):
        logp_N, stream = streams(make_batch([[1, 0]], objective), [], [], objective, Correction(), torch.float32)
        loss, totals = dypo_loss(logp_N, stream, torch.zeros(0))
        loss.backward()
        assert loss == 0 and logp_N.grad.shape == (0,) and all(value == 0 for value in totals.values())


# --- what the metrics are made of

METRICS = {
    "default": {},
    "kl": {"kl_coef": 0.3, "alpha": 0.3, "gamma": 2.0},
    "sequence": {"ratio_level": "sequence", "ratio_base": "reference", "kl_coef": 0.1},
    "trajectory": {"scale": "trajectory", "normalize": "active"},
    "entropy": {"entropy_coef": 0.2, "normalize": "active"},
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", METRICS)
def test_totals_are_the_terms_and_the_share_of_the_gradient_of_each(name: str, method: str) -> None:
    objective, correction = Objective(method=method, **METRICS[name]), Correction("truncate")
    batch = make_batch(MIXED, objective)
    result, (terms, leaves) = ours(batch, objective, correction), reference(batch, objective, correction)
    share = shares(objective, 1)

    def summed(summands: list[Tensor]) -> Tensor:
        return sum((x.sum() for x in summands), torch.zeros(()).double())

    losses = {
        "grpo": result.totals.get("loss/grpo", 0.0) + result.terms.grpo_sequence_loss,
        "gal": result.terms.gal_loss,
        "sft": result.totals.get("loss/sft", 0.0),
        **{name: result.totals.get(f"loss/{name}", 0.0) for name in ("shaped", "expert", "sign")},
    }
    for term in losses:
        weight = share.get(term, 0.0)
        summands = getattr(terms, term)
        if term == "gal" and weight == 0:
            assert losses[term] == 0  # not computed without weight
            continue
        assert losses[term] == pytest.approx(summed(summands).item(), rel=1e-10, abs=1e-15)
        slopes = flat(gradient(weight * summed(summands), leaves), leaves)
        assert result.totals.get(f"grad_share/{term}", 0.0) == pytest.approx(slopes.abs().sum().item(), rel=1e-10)
    if needs_reference(objective):
        assert result.totals.get("loss/kl", 0.0) == pytest.approx(summed(terms.kl).item(), rel=1e-10)
    bonus = result.totals.get("loss/entropy", 0.0)
    assert bonus == pytest.approx(summed(terms.entropy).item(), rel=1e-10)
    assert total(losses, share) + bonus == pytest.approx(result.loss, rel=1e-10)


def test_clipped_counts_the_tokens_whose_slope_the_clip_takes() -> None:
    objective = Objective(**ASYMMETRIC)
    batch = make_batch([*MIXED, [1.0, 0.5, 0.0, 0.5]], objective)  # two responses without advantage
    expected = tokens = 0
    for g, group in enumerate(batch.groups):
        if group.regime != Regime.MID:
            continue
        advantages = page.advantages(group.rewards, "population")
        for i, advantage in enumerate(advantages):
            logp = batch.logp[g, Kind.ROLLOUT, i]
            ratio_n = (logp["now"] - logp["old"]).exp()
            outside_n = ratio_n > 1.28 if advantage > 0 else ratio_n < 0.85
            expected += int(outside_n.sum()) if advantage else 0
            tokens += len(ratio_n)
    totals = ours(batch, objective).totals
    assert 0 < expected == totals["clipped"] and totals["rollout_tokens"] == tokens
    assert ours(batch, Objective(alpha=0.0, **ASYMMETRIC)).totals["clipped"] == 0  # for a ratio without weight


def test_pair_metrics_are_means_over_all_pairs_of_the_batch() -> None:
    objective = Objective(beta_gal=8.0)
    batch = make_batch(MIXED, objective, drift=1.5)
    differences = []
    for g, group in enumerate(batch.groups):
        if group.regime == Regime.MID:
            logp = [batch.logp[g, Kind.ROLLOUT, i] for i in range(len(group.responses))]
            s = [(x["now"] - x["reference"]).mean().item() for x in logp]
            r = group.rewards
            differences += [s[a] - s[b] for a, b in itertools.permutations(range(len(s)), 2) if r[a] > r[b]]
    d_P = torch.tensor(differences, dtype=torch.float64)
    weight_P = 1 - torch.sigmoid(8.0 * d_P)
    terms = ours(batch, objective).terms
    assert terms.eta == pytest.approx(weight_P.square().mean().item())
    assert terms.spread == pytest.approx(d_P.square().mean().sqrt().item())
    saturated = ((weight_P < 0.01) | (weight_P > 0.99)).double().mean().item()
    assert 0 < saturated == pytest.approx(terms.saturated)


# --- GAL's coefficients

SCORES = st.integers(1, 7).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-8, 8), min_size=k, max_size=k),
        st.lists(st.sampled_from([0.0, 1.0, 0.25, 0.3, -1.5]), min_size=k, max_size=k),
    )
)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.sampled_from([0.1, 1.0, 5.0]))
def test_gal_coefficients_are_the_gradient_of_the_pairwise_loss(case: tuple[list[float], list[float]], beta: float):
    scores, rewards = case
    s_k = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    pairs = page.gal_pairs(list(s_k), rewards, beta)
    loss, C_k, eta = gal_coefficients(s_k.detach(), torch.tensor(rewards), beta)
    assert len(pairs) == pair_statistics(s_k.detach(), torch.tensor(rewards), beta)[2]
    assert abs(C_k.sum().item()) <= 1e-14 * beta * len(scores)
    if not pairs:
        assert loss == 0 and eta == 0 and not C_k.any()
        return
    expected = sum(pairs) / len(pairs)
    (gradient_k,) = torch.autograd.grad(expected, s_k)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert (C_k - gradient_k).norm() <= 1e-12 * gradient_k.norm() + 1e-15
    difficulty = [(1 - value.neg().exp().item()) ** 2 for value in pairs]  # sigmoid(beta d) = exp(-loss of the pair)
    assert eta.item() == pytest.approx(sum(difficulty) / len(pairs), rel=1e-9, abs=1e-15)


@settings(deadline=None)
@given(SCORES, st.floats(-1e3, 1e3))
def test_gal_does_not_see_a_common_shift_of_the_group(case: tuple[list[float], list[float]], shift: float) -> None:
    s_k, r_k = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    for shifted, plain in zip(gal_coefficients(s_k + shift, r_k, 1.0), gal_coefficients(s_k, r_k, 1.0), strict=True):
        torch.testing.assert_close(shifted, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("d", [1e4, -1e4])
def test_gal_is_finite_and_bounded_at_extreme_differences(d: float) -> None:
    loss, C_k, eta = gal_coefficients(torch.tensor([d, 0.0]), torch.tensor([1.0, 0.0]), 1.0)
    assert loss.item() == max(-d, 0.0) and eta.item() == float(d < 0)
    assert C_k.tolist() == [-float(d < 0), float(d < 0)]


def test_gal_weighs_every_pair_one_half_at_the_reference() -> None:
    loss, C_k, eta = gal_coefficients(torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0]), 2.0)
    assert loss.item() == pytest.approx(math.log(2)) and eta == 0.25
    assert torch.equal(C_k, 2.0 * torch.tensor([-0.5, -0.5, 1.5, -0.5], dtype=torch.float64) / 3)


def test_only_strictly_better_rewards_make_a_pair() -> None:
    _, C_k, _ = gal_coefficients(torch.tensor([0.4, -0.3, 2.0]), torch.tensor([0.5, 0.5, 0.5]), 1.0)
    assert not C_k.any()
    _, C_k, _ = gal_coefficients(
        torch.tensor([0.0, 5.0, 0.0]), torch.tensor([0.5, 0.5 - 1e-9, 0.5], dtype=torch.float64), 1.0
    )
    assert C_k[0] == C_k[2] < 0 < C_k[1]


# --- grading and advantages


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.49, 0.5, 0.51, math.nan]), min_size=1, max_size=9), st.integers(0, 9))
def test_grading_is_exclusive_and_exhaustive(rewards: list[float], hard_max_solved: int) -> None:
    (regime,) = grade(torch.tensor([rewards], dtype=torch.float64), 0.5, hard_max_solved)
    solved, k = sum(reward >= 0.5 for reward in rewards), len(rewards)
    assert (regime == Regime.EASY) == (solved == k)
    assert (regime == Regime.HARD) == (solved < k and solved <= hard_max_solved)
    assert (regime == Regime.MID) == (hard_max_solved < solved < k)
    assert k > 1 or regime != Regime.MID


def test_grading_goes_row_by_row() -> None:
    assert grade(torch.tensor([[1, 1], [0, 1], [0, 0]])) == [Regime.EASY, Regime.MID, Regime.HARD]


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=9),
    st.sampled_from(["population", "sample", "none", True, False]),
)
def test_advantages_have_zero_mean_and_the_chosen_scale(rewards: list[float], kind: str | bool) -> None:
    A_k = group_advantages(torch.tensor([rewards], dtype=torch.float64), kind)[0]
    k, r_k = len(rewards), torch.tensor(rewards, dtype=torch.float64)
    name = {True: "population", False: "none"}.get(kind, kind)
    expected_k = torch.tensor(page.advantages(rewards, name), dtype=torch.float64)
    torch.testing.assert_close(A_k, expected_k, rtol=1e-6, atol=1e-7)
    assert abs(A_k.sum().item()) <= 1e-13 * k * (1 + 1e6 * r_k.abs().max().item())
    if len(set(rewards)) == 1:
        assert not A_k.any()


def test_advantages_of_ties_are_exactly_zero() -> None:
    for kind in ("population", "sample", "none"):
        assert not group_advantages(torch.full((2, 7), 0.1), kind).any()
        assert not group_advantages(torch.tensor([[0.3], [1.0]]), kind).any()


def test_advantages_divide_by_the_standard_deviation_asked_for() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    for kind, std in (("population", math.sqrt(3) / 4), ("sample", 0.5)):
        assert group_advantages(rewards, kind)[0, 0].item() == pytest.approx(0.75 / (std + 1e-6), rel=1e-12)
    assert group_advantages(rewards, "none")[0].tolist() == [0.75, -0.25, -0.25, -0.25]
