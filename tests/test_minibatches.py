"""Batching: which sequences train, in which micro-batch, and where the loss is."""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_dypo.config.schema import Objective
from megatron_dypo.objectives.recipes import RECIPES, recipe
from megatron_dypo.policy.micro_batch import MicroBatch, spread
from megatron_dypo.records import Group, Kind, Prompt, Regime, Response, Sequence, Teacher
from megatron_dypo.training.metrics import batch_metrics
from megatron_dypo.training.minibatch import MiniBatch, draw_teachers, grade_groups, training_sequences
from megatron_dypo.training.packing import cost, plan_micro_batches

BUDGET = 8192

lengths_of_sequences = st.lists(st.integers(1, 300), max_size=80)


def lognormal_lengths(count: int, seed: int) -> list[int]:
    """Return realistic response lengths: most short, a few many times the median, none over the budget."""
    generator = random.Random(seed)
    return [min(BUDGET, max(8, round(generator.lognormvariate(6.5, 0.8)))) for _ in range(count)]


def loads(plan: list[list[list[int]]], lengths: list[int]) -> list[float]:
    """Return the cost of each rank's share."""
    return [sum(cost(lengths[i]) for members in share for i in members) for share in plan]


# --- the plan


def slots(plan: list[list[list[int]]]) -> int:
    """Return the number of micro-batches of all ranks."""
    return sum(len(share) for share in plan)


@settings(deadline=None)
@given(lengths_of_sequences, st.integers(1, 5), st.integers(1, 400), st.integers(1, 4))
@example([], 3, 10, 2)
@example([500], 4, 10, 1)
@example([10] * 7, 3, 10, 1)
@example([46, 22, 36, 52, 51, 45, 39], 1, 100, 1)  # fits best-fit, but not evenly
@example([70, 80, 20, 50, 60, 50, 40], 2, 100, 1)  # fits evenly over ranks, but not over a rank's micro-batches
def test_a_plan_holds_every_sequence_once_within_budget_and_as_many_micro_batches_a_rank(
    lengths, ranks, budget, multiple
):
    plan = plan_micro_batches(lengths, ranks, budget, multiple)
    assert len(plan) == ranks
    counts = {len(share) for share in plan}
    assert len(counts) == 1
    assert counts.pop() % multiple == 0
    assert bool(slots(plan)) == bool(lengths)
    batches = [members for share in plan for members in share]
    assert sorted(i for members in batches for i in members) == list(range(len(lengths)))
    for members in batches:
        assert sum(lengths[i] for i in members) <= budget or len(members) == 1
    for share in plan:
        costs = [sum(cost(lengths[i]) for i in members) for members in share]
        assert costs == sorted(costs, reverse=True)
    assert plan == plan_micro_batches(list(lengths), ranks, budget, multiple)


@settings(deadline=None)
@given(lengths_of_sequences, st.integers(1, 5), st.integers(300, 1000), st.integers(1, 4))
def test_a_plan_needs_at_most_the_half_full_bound_of_micro_batches(lengths, ranks, budget, multiple):
    """Best fit leaves at most one micro-batch half empty; rounding up adds less than ranks x multiple."""
    count = slots(plan_micro_batches(lengths, ranks, budget, multiple))
    assert count < 2 * sum(lengths) / budget + 1 + ranks * multiple


@settings(deadline=None)
@given(lengths_of_sequences, st.integers(1, 5), st.integers(1, 400), st.integers(2, 4))
def test_a_multiple_rounds_up_and_no_more(lengths, ranks, budget, multiple):
    count, rounded = (slots(plan_micro_batches(lengths, ranks, budget, step)) for step in (1, multiple))
    assert count <= rounded < count + ranks * multiple


def test_ranks_have_the_same_to_do():
    """64 prompts x 8 responses over 8 ranks: the busiest rank has at most 1% more than the mean; 2% with 8 prompts."""
    for seed in range(5):
        for prompts, worst in ((64, 1.01), (8, 1.02)):
            lengths = lognormal_lengths(8 * prompts, seed)
            shares = loads(plan_micro_batches(lengths, 8, BUDGET), lengths)
            assert max(shares) <= worst * sum(shares) / len(shares)


def test_micro_batches_cost_the_same_where_they_need_not_be_full():
    """With 60 rounded up to 80 the costliest has at most 5% more than the mean, or is a single sequence."""
    for seed in range(5):
        lengths = lognormal_lengths(512, seed)
        (share,) = plan_micro_batches(lengths, 1, BUDGET, multiple=80)
        costs = [sum(cost(lengths[i]) for i in members) for members in share]
        assert len(costs) == 80
        assert max(costs) <= max(1.05 * sum(costs) / len(costs), cost(max(lengths)))


def test_micro_batches_are_full():
    """One rank without rounding up: micro-batches are 98% full on average."""
    for seed in range(5):
        lengths = lognormal_lengths(512, seed)
        (share,) = plan_micro_batches(lengths, 1, BUDGET)
        assert sum(lengths) >= 0.98 * BUDGET * len(share)


def test_sequences_that_fit_exactly_share_a_micro_batch():
    assert plan_micro_batches([50, 30, 50, 70], 1, 100) == [[[1, 3], [0, 2]]]


def test_planning_many_sequences_takes_no_time():
    """65,536 take half a second. An algorithm in sequences x micro-batches takes minutes."""
    lengths = lognormal_lengths(65_536, 0)
    began = time.process_time()
    plan_micro_batches(lengths, 32, BUDGET)
    assert time.process_time() - began < 10


def test_more_ranks_than_sequences_leave_empty_micro_batches_and_no_rank_without_one():
    assert sorted(plan_micro_batches([5, 7], 4, 100)) == [[[]], [[]], [[0]], [[1]]]
    assert plan_micro_batches([5], 2, 100, multiple=2) == [[[0], []], [[], []]]


# --- packing


def sequences_of(shapes: list[tuple[int, int, bool]]) -> list[Sequence]:
    """Return sequences of (prompt length, tail length, is a teacher's) whose ids are all different."""
    sequences, first = [], 1
    for prompt, tail, teacher in shapes:
        ids = np.arange(first, first + prompt + tail, dtype=np.int32)
        sequences.append(Sequence(ids, prompt, Kind.TEACHER if teacher else Kind.ROLLOUT, 0, 0))
        first += prompt + tail
    return sequences


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), max_size=8)


@settings(deadline=None)
@given(shapes, st.integers(1, 8), st.randoms(use_true_random=False))
def test_a_packed_micro_batch_predicts_each_tail_and_nothing_else(shapes, multiple, shuffled):
    sequences = sequences_of(shapes)
    places = list(range(len(sequences)))
    shuffled.shuffle(places)
    batch = MicroBatch.pack(sequences, places, temperature=0.7, tensor=multiple)

    assert len(batch.ids_T) == len(batch.positions_T) == batch.cu_seqlens[-1]
    assert len(batch.ids_T) % multiple == 0 < len(batch.ids_T) or not sequences
    assert len(batch.ids_T) - sum(sequence.length for sequence in sequences) < multiple or not sequences
    ids, positions = batch.ids_T.tolist(), batch.positions_T.tolist()
    for place, start, end in zip(places, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        assert ids[start:end] == sequences[place].ids.tolist()
        assert positions[start:end] == list(range(end - start))

    index = batch.loss_index_N.tolist()
    assert (
        batch.targets_N.tolist()
        == [ids[i + 1] for i in index]
        == [i for place in places for i in tail(sequences[place])]
    )
    assert batch.counts == [sequences[place].loss_tokens for place in places]
    wanted = [1.0 if sequences[place].kind == Kind.TEACHER else 0.7 for place in places for _ in tail(sequences[place])]
    torch.testing.assert_close(batch.temperature_N, torch.tensor(wanted))


def tail(sequence: Sequence) -> list[int]:
    return sequence.ids[sequence.prompt_length :].tolist()


@settings(deadline=None)
@given(st.integers(1, 8))
def test_an_empty_micro_batch_is_filler_without_loss(multiple):
    """A rank without data still runs forward and backward, on as many tokens as its tensor-parallel ranks need."""
    batch = MicroBatch.pack([], [], temperature=1.0, tensor=multiple)
    assert batch.cu_seqlens == [0, multiple]
    assert batch.positions_T.tolist() == list(range(multiple))
    assert len(batch.loss_index_N) == len(batch.targets_N) == len(batch.temperature_N) == 0
    assert batch.split(torch.zeros(0)) == []


@settings(deadline=None)
@given(shapes.filter(bool))
def test_split_gives_each_sequence_its_own_and_spread_inverts_it(shapes):
    batch = MicroBatch.pack(sequences_of(shapes), list(range(len(shapes))), temperature=1.0)
    streams = batch.split(batch.targets_N)
    assert [stream.tolist() for stream in streams] == [tail(sequence) for sequence in sequences_of(shapes)]
    values = [float(i) for i in range(len(shapes))]
    assert [set(stream.tolist()) for stream in batch.split(spread(values, batch.counts))] == [
        {value} for value in values
    ]


# --- what a regime trains on


def group_of(name: str, regime: Regime | None, teachers: int = 3, responses: int = 2) -> Group:
    prompt = Prompt(name, "1", tuple(Teacher(f"t{i}", f"{name}/{i}") for i in range(teachers)))
    answers = [Response(np.array([10 + i, 1], np.int32), np.zeros(2, np.float32), "stop") for i in range(responses)]
    return Group(prompt, np.array([7, 8, 9], np.int32), answers, regime)


def encode_trace(group: Group, teacher: int) -> np.ndarray:
    return np.array([20 + teacher, 21 + teacher, 1], np.int32)


def drawn(group: Group, step: int = 1, draws: int = 1, seed: int = 0) -> tuple[int, ...]:
    draw_teachers(group, list(range(len(group.prompt.teachers))), seed, step, draws)
    return group.teacher_indices


def contents(sequences: list[Sequence]) -> list[tuple]:
    return [(s.group, s.sample, s.kind, s.ids.tolist(), s.prompt_length) for s in sequences]


def test_easy_is_dropped_mid_trains_on_its_responses_and_hard_on_its_drawn_teachers():
    groups = [
        group_of(name, regime) for name, regime in zip("emh", (Regime.EASY, Regime.MID, Regime.HARD), strict=True)
    ]
    groups[2].teacher_indices = (2, 0)
    assert contents(training_sequences(groups, Objective(method="dypo"), encode_trace)) == [
        (1, 0, Kind.ROLLOUT, [7, 8, 9, 10, 1], 3),
        (1, 1, Kind.ROLLOUT, [7, 8, 9, 11, 1], 3),
        (2, 2, Kind.TEACHER, [7, 8, 9, 22, 23, 1], 3),
        (2, 0, Kind.TEACHER, [7, 8, 9, 20, 21, 1], 3),
    ]


def test_a_single_term_recipe_trains_on_its_term_alone():
    groups = [
        group_of(name, regime) for name, regime in zip("emh", (Regime.EASY, Regime.MID, Regime.HARD), strict=True)
    ]
    for group, (first, second) in zip(groups, [(1.0, 1.0), (1.0, 0.0), (0.4, 0.1)], strict=True):
        drawn(group)
        group.responses[0].reward, group.responses[1].reward = first, second

    def trained(**keys) -> set[tuple[int, Kind]]:
        objective = Objective(method="grpo", **keys)
        return {(s.group, s.kind) for s in training_sequences(groups, objective, encode_trace)}

    assert trained() == {(1, Kind.ROLLOUT), (2, Kind.ROLLOUT)}  # no advantage, nothing to train
    assert trained(kl_coef=0.1) == trained(entropy_coef=0.1) == {(g, Kind.ROLLOUT) for g in range(3)}
    ungraded = [group_of(name, None, responses=0) for name in "abc"]
    for group in ungraded:
        drawn(group)
    assert [(s.group, s.kind) for s in training_sequences(ungraded, Objective(method="sft"), encode_trace)] == [
        (g, Kind.TEACHER) for g in range(3)
    ]


def test_a_hard_group_without_a_usable_teacher_trains_on_nothing():
    without, unusable = group_of("without", Regime.HARD, teachers=0), group_of("unusable", Regime.HARD)
    assert drawn(without) == ()
    draw_teachers(unusable, [], 0, 1, 2)
    assert unusable.teacher_indices == ()
    assert (
        training_sequences(
            [without, unusable, group_of("undrawn", Regime.HARD)], Objective(method="dypo"), encode_trace
        )
        == []
    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 50))
def test_draws_are_different_usable_teachers_and_all_of_them_where_too_few(teachers, draws, step):
    indices = drawn(group_of("p", Regime.HARD, teachers), step, draws)
    assert len(set(indices)) == len(indices) == min(teachers, draws)
    usable = list(range(0, teachers, 2))
    group = group_of("p", Regime.HARD, teachers)
    draw_teachers(group, usable, 0, step, draws)
    assert set(group.teacher_indices) <= set(usable)


def test_draws_are_uniform_over_prompts_and_over_steps():
    """Chi-square with 3 degrees of freedom exceeds 21.1 once in 10,000 times."""
    samples = 4000
    over_prompts = Counter(drawn(group_of(f"prompt-{i}", Regime.HARD, 4))[0] for i in range(samples))
    over_steps = Counter(drawn(group_of("p", Regime.HARD, 4), step)[0] for step in range(samples))
    pairs = Counter(drawn(group_of(f"prompt-{i}", Regime.HARD, 4), draws=2)[1] for i in range(samples))
    for counts in (over_prompts, over_steps, pairs):
        assert sum((counts[i] - samples / 4) ** 2 / (samples / 4) for i in range(4)) < 21.1


@settings(deadline=None)
@given(st.permutations(range(20)), st.integers(1, 1000))
def test_a_draw_depends_on_seed_step_and_prompt_and_nothing_else(order, step):
    groups = [group_of(f"prompt-{i}", Regime.HARD, 5) for i in range(20)]
    expected = [drawn(group_of(f"prompt-{i}", Regime.HARD, 5), step, 2) for i in range(20)]
    for i in order:
        drawn(groups[i], step, 2)
    assert [group.teacher_indices for group in groups] == expected
    assert [drawn(group_of(f"prompt-{i}", Regime.HARD, 5), step + 1, 2) for i in range(20)] != expected
    assert [drawn(group_of(f"prompt-{i}", Regime.HARD, 5), step, 2, seed=1) for i in range(20)] != expected


def test_grading_sets_regimes_and_draws_and_leaves_a_replayed_draw():
    solved = {"easy": (1.0, 1.0), "mid": (0.0, 1.0), "hard": (0.0, 0.0), "replayed": (0.0, 0.0)}
    groups = {name: group_of(name, None) for name in solved}
    for name, rewards in solved.items():
        for response, reward in zip(groups[name].responses, rewards, strict=True):
            response.reward = reward
    groups["replayed"].teacher_indices = (1,)
    grade_groups(list(groups.values()), Objective(teachers_per_prompt=2), 0, 1, lambda group: [0, 2])
    regimes = {name: group.regime for name, group in groups.items()}
    assert regimes == {"easy": Regime.EASY, "mid": Regime.MID, "hard": Regime.HARD, "replayed": Regime.HARD}
    assert groups["easy"].teacher_indices is None and groups["mid"].teacher_indices is None
    assert set(groups["hard"].teacher_indices) == {0, 2} and groups["replayed"].teacher_indices == (1,)


@pytest.mark.parametrize("method", RECIPES)
def test_rewards_of_recorded_traces_are_no_members_of_a_group_whose_recipe_scores_none(method):
    """Any recipe may replay LUFFY's rollouts."""
    objective = Objective(method=method)
    group = group_of("recorded", None)
    group.teacher_indices, group.teacher_rewards = (2,), (1.0,)
    for response, reward in zip(group.responses, (0.0, 0.5), strict=True):
        response.reward = reward
    grade_groups([group], objective, 0, 1, lambda group: [0])
    scores = recipe(objective).scores_traces
    assert group.teacher_indices == (2,) and group.baseline == [0.0, 0.5] + [1.0] * scores


def test_the_shares_of_sources_are_of_the_tokens_that_are_trained_on():
    """Two responses of 3 and 5 tokens, and two traces of 4 and 8, in two mini-batches."""

    def minibatch(kind: Kind, lengths: tuple[int, ...]) -> MiniBatch:
        prompt = 2
        found = [Sequence(np.zeros(prompt + n, np.int32), prompt, kind, 0, i) for i, n in enumerate(lengths)]
        return MiniBatch([], found, [], [])

    metrics = batch_metrics([], [minibatch(Kind.ROLLOUT, (3, 5)), minibatch(Kind.TEACHER, (4, 8))], Objective())
    assert {name: value for name, value in metrics.items() if name.startswith("source_share/")} == {
        "source_share/rollout": 0.4, "source_share/teacher": 0.6, "source_share/expert": 0.0,
    }  # fmt: skip
    assert not any(name.startswith("source_share/") for name in batch_metrics([], [], Objective()))
