"""Scored groups -> graded groups with teacher draws -> training sequences -> mini-batches of micro-batches.

A mini-batch holds all its sequences, and this rank's micro-batches of them. Legend: N loss tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import SequenceSums
from megatron_dypo.objectives.dypo import grade
from megatron_dypo.objectives.recipes import packed_sources, recipe, trained_responses
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.records import Group, Kind, Sequence
from megatron_dypo.rollout.sampling import draw_teachers
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.training.packing import MicroBatchPlan, plan_micro_batches

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


def grade_groups(
    groups: list[Group], objective: Objective, seed: int, step: int, usable_teachers: Callable[[Group], list[int]]
) -> None:
    """Set every group's ``regime`` and, if a term trains on traces, ``teacher_indices``.

    A replay keeps its recorded draw, but not its traces' rewards if this recipe scores none.
    """
    chosen = recipe(objective)
    if chosen.samples:
        rewards = torch.tensor([group.rewards for group in groups])
        limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
        regimes = grade(rewards, objective.reward_threshold, *limits)
        for group, regime in zip(groups, regimes, strict=True):
            group.regime = regime
    for group in groups:
        if not chosen.scores_traces:
            group.teacher_rewards = ()
        if Kind.TEACHER in chosen.sources(group) and group.teacher_indices is None:
            draw_teachers(group, usable_teachers(group), seed, step, objective.teachers_per_prompt)


def training_sequences(
    groups: list[Group],
    objective: Objective,
    encode_trace: Callable[[Group, int], np.ndarray],
    deferred: bool = False,
) -> list[Sequence]:
    """Return a (mini-)batch's sequences by group, kind and sample: those that any term of the group's regime trains.

    Omits groups whose coefficients would all be 0, and masked responses. ``deferred``: the groups are those of deferred
    terms.

    ``encode_trace(group, i)`` returns the ids of teacher i's trace.
    """
    sequences = []
    for g, group in enumerate(groups):
        for kind in packed_sources(objective, group, deferred):
            if kind == Kind.ROLLOUT:
                tails = [(i, group.responses[i].ids) for i in trained_responses(objective, group)]
            else:
                tails = [(i, encode_trace(group, i)) for i in group.teacher_indices or ()]
            for sample, ids in tails:
                prompt = group.prompt_ids
                sequences.append(Sequence(np.concatenate([prompt, ids]), len(prompt), kind, g, sample))
    return sequences


@dataclass
class MiniBatch:
    """One mini-batch: all its sequences, and this rank's micro-batches (rollouts first, traces separate).

    ``plan``: the rollouts' places in ``sequences``, by data-parallel rank and micro-batch. ``deferred``: an update of
    groups that have waited, by deferred terms alone.
    """

    groups: list[Group]
    sequences: list[Sequence]
    rollouts: list[MicroBatch]
    traces: list[MicroBatch]
    deferred: bool = False
    plan: MicroBatchPlan = field(default_factory=list)
    logp: dict[str, list[Tensor]] = field(default_factory=dict)  # per rollout micro-batch [N], last stage only
    entropy: list[Tensor] = field(default_factory=list)  # of all micro-batches [N], last stage only; if read
    sums: list[SequenceSums | None] = field(default_factory=list)
    entropies: list[float] | None = None  # mean over each sequence's tokens

    @property
    def batches(self) -> list[MicroBatch]:
        """Return all of this rank's micro-batches, in the order of the passes."""
        return self.rollouts + self.traces

    def forget_routing(self) -> None:
        """Release the routing after training: the engine may need the device."""
        for batch in self.batches:
            batch.routing = batch.given_TLK = batch.is_given_T = None


def build_minibatches(
    layout: Layout, groups: list[Group], config: Config, encode_trace: Callable[[Group, int], np.ndarray]
) -> list[MiniBatch]:
    """Split the groups into mini-batches of whole prompts and evenly divided experts, and plan them.

    Only the micro-batches differ between ranks.
    """
    parts: list[list[Group]] = [[] for _ in range(config.objective.updates_per_rollout)]
    for expert in (False, True):
        rows = [group for group in groups if group.expert == expert]
        for part, indices in zip(parts, np.array_split(np.arange(len(rows)), len(parts)), strict=True):
            part += [rows[i] for i in indices]
    return [plan_minibatch(layout, part, config, encode_trace) for part in parts]


def plan_minibatch(
    layout: Layout,
    groups: list[Group],
    config: Config,
    encode_trace: Callable[[Group, int], np.ndarray],
    deferred: bool = False,
) -> MiniBatch:
    """Plan one mini-batch of these groups: its sequences, and this rank's micro-batches of them."""
    sequences = training_sequences(groups, config.objective, encode_trace, deferred)
    packed, plans = [], []
    for of_rollouts in (True, False):
        places = [place for place, sequence in enumerate(sequences) if (sequence.kind == Kind.ROLLOUT) == of_rollouts]
        lengths = [sequences[place].length for place in places]
        shares = plan_micro_batches(
            lengths, layout.dp, config.data.max_tokens_per_microbatch, layout.micro_batch_multiple
        )
        plans.append([[[places[i] for i in members] for members in share] for share in shares])
        packed.append(
            [
                MicroBatch.pack(sequences, members, config.rollout.temperature, **layout.packing)
                for members in plans[-1][layout.dp_rank]
            ]
        )
    rollouts, traces = packed
    return MiniBatch(groups, sequences, rollouts, traces, deferred, plans[0])
