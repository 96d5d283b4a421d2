"""Dynamic sampling: a prompt whose group would train nothing gives its place in the batch to another one.

The replacement is a pure function of (data.seed, step): place q's r-th one is number r * Q + q of the rows that are not
in the batch, in an order of the step's own. So no two places ever take the same row, nobody has to be asked, and
neither layout nor a resume changes who comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.data.order import spare_indices
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.objectives.grading import grade
from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.records import Group, Prompt
from megatron_dypo.rollout.collect import encode_prompts


@dataclass(frozen=True)
class Refill:
    """Whom to replace, and by whom. ``usable_teachers``: those of a group's teachers that may be drawn."""

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    usable_teachers: Callable[[Group], list[int]]

    @property
    def rounds(self) -> int:
        """Replacements in one place, at most."""
        return self.config.rollout.refill_rounds if self.config.rollout.dynamic_sampling else 0

    def trains(self, group: Group) -> bool:
        """Whether a scored group would train anything: its regime has a route and, if that is a teacher's, a trace."""
        objective = self.config.objective
        (regime,) = grade(torch.tensor([group.rewards]), objective.reward_threshold, objective.hard_max_solved)
        route = RECIPES[objective.method].route(regime)
        return route == "group" or (route == "teacher" and bool(self.usable_teachers(group)))

    def replacement(self, step: int, place: int, number: int) -> Group | None:
        """The ``number``-th (from 0) that may come to ``place``, not yet sampled; None where the rows have run out."""
        data = self.config.data
        rows = spare_indices(step, data.prompts_per_step, len(self.prompts), data.seed)
        index = number * data.prompts_per_step + place
        if index >= len(rows):
            return None
        (group,) = encode_prompts([self.prompts[rows[index]]], self.tokenizer, data.max_prompt_tokens)
        return group
