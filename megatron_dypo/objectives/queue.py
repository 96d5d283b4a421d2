"""The queue of a recipe with deferred terms: groups that wait, and those due for an update of their own.

An entry is a prompt's id and the teachers drawn for it in the step in which it failed. Every checkpoint has them.
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
    """A queue; ``waiting`` starts with the next entries to be due.

    ``order``: a step's ``newest`` go in front of those that wait (in the order of the batch), or ``oldest`` first.
    """

    size: int
    order: str
    waiting: list[Entry] = field(default_factory=list)

    def add(self, fresh: Sequence[Entry]) -> None:
        """Add a step's entries, in the order of the batch. Entries may be queued already."""
        self.waiting = [*fresh, *self.waiting] if self.order == "newest" else [*self.waiting, *fresh]

    @property
    def due(self) -> list[Entry]:
        """Return the first ``size`` entries once that many wait, else none; they stay until ``remove_due``."""
        return self.waiting[: self.size] if len(self.waiting) >= self.size else []

    def remove_due(self) -> None:
        """Remove the due entries, after their update."""
        self.waiting = self.waiting[len(self.due) :]


def failed(groups: Sequence[Group], objective: Objective) -> list[Waiting]:
    """Return the groups of a graded step that a deferred term trains and that have a trace to train on.

    A group with a non-finite reward has not failed: its outcome is unknown.
    """
    terms = update_terms(objective, deferred=True)
    return [
        (group.prompt.id, group.teacher_indices)
        for group in groups
        if group.teacher_indices
        and all(math.isfinite(reward) for reward in group.rewards)
        and any(term.trains(group) for term in terms)
    ]
