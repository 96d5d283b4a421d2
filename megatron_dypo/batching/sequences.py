"""Graded groups -> the sequences to train on: what a regime's route keeps, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.records import Group, Kind, Sequence


def training_sequences(
    groups: list[Group], method: str, encode_trace: Callable[[Group, int], np.ndarray]
) -> list[Sequence]:
    """All sequences of a (mini-)batch, by group and sample. ``encode_trace(group, i)``: ids of teacher i's trace."""
    sequences = []
    for g, group in enumerate(groups):
        route = RECIPES[method].route(group.regime)
        if route == "group":
            tails = [(Kind.ROLLOUT, i, response.ids) for i, response in enumerate(group.responses)]
        elif route == "teacher":
            tails = [(Kind.TEACHER, i, encode_trace(group, i)) for i in group.teacher_indices or ()]
        else:
            tails = []
        for kind, sample, ids in tails:
            sequences.append(Sequence(np.concatenate([group.prompt_ids, ids]), len(group.prompt_ids), kind, g, sample))
    return sequences
