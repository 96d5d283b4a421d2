"""Scored groups -> each group's regime, and the teacher draw where its route asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_dypo.objectives.grading import grade
from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.records import Group
from megatron_dypo.runtime.seeding import choose

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective


def grade_groups(
    groups: list[Group], objective: Objective, seed: int, step: int, usable_teachers: Callable[[Group], list[int]]
) -> None:
    """Set every group's ``regime`` and, on the way to a teacher, ``teacher_indices``. A replay's draw stays."""
    recipe = RECIPES[objective.method]
    if recipe.samples:
        rewards = torch.tensor([group.rewards for group in groups])
        regimes = grade(rewards, objective.reward_threshold, objective.hard_max_solved)
        for group, regime in zip(groups, regimes, strict=True):
            group.regime = regime
    for group in groups:
        if recipe.route(group.regime) == "teacher" and group.teacher_indices is None:
            draw_teachers(group, usable_teachers(group), seed, step, objective.teachers_per_prompt)


def draw_teachers(group: Group, usable: list[int], seed: int, step: int, draws: int) -> None:
    """Draw among a group's ``usable`` teachers: a hash of (seed, step, prompt id), nothing else."""
    drawn = choose((seed, "teacher", step, group.prompt.id), len(usable), draws)
    group.teacher_indices = tuple(usable[i] for i in drawn)
