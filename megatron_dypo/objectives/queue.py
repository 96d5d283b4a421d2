"""The queue of a recipe with deferred terms: which groups wait, and which of them are due for an update of their own.

What waits is a prompt's id and the teachers drawn for it in the step that it failed in. It is in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from megatron_dypo.objectives.recipes import update_terms
from megatron_dypo.records import Group

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Objective

Entry = TypeVar("Entry")
Waiting = tuple[str, tuple[int, ...]]  # prompt id, teachers


@dataclass
class DeferredQueue(Generic[Entry]):
    """``waiting``, the next to be due in front. ``order``: whether a step's ``newest`` go in front of those that wait
    (in the order of the batch), or ``oldest`` first."""

    size: int
    order: str
    waiting: list[Entry] = field(default_factory=list)

    def add(self, fresh: Sequence[Entry]) -> None:
        """One step's, in the order of the batch. What waits already may come again."""
        self.waiting = [*fresh, *self.waiting] if self.order == "newest" else [*self.waiting, *fresh]

    @property
    def due(self) -> list[Entry]:
        """The first ``size`` once as many wait, else none; they wait on until ``remove_due``."""
        return self.waiting[: self.size] if len(self.waiting) >= self.size else []

    def remove_due(self) -> None:
        """Once they have had their update."""
        self.waiting = self.waiting[len(self.due) :]


def failed(groups: Sequence[Group], objective: Objective) -> list[Waiting]:
    """Those of a graded step's groups that a deferred term trains and that have a trace to train on.

    A group with a reward that is not finite has not failed: nothing is known of it.
    """
    terms = update_terms(objective, deferred=True)
    return [
        (group.prompt.id, group.teacher_indices)
        for group in groups
        if group.teacher_indices
        and all(math.isfinite(reward) for reward in group.rewards)
        and any(term.trains(group) for term in terms)
    ]
