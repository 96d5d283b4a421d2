"""What a run counts between its steps, and a checkpoint keeps as ``state.json``."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NORMS_KEPT = 50  # applied updates that make up the usual gradient norm
NORMS_NEEDED = 20  # before that many, none is usual


@dataclass
class Counters:
    """What a run counts; everything else it draws is a hash of seed, step and prompt.

    ``norms`` are the gradient norms of the last applied updates, oldest first: JSON keeps every bit of them, so that a
    resumed run judges the next norm as the uninterrupted one would.
    """

    step: int = 0
    weight_version: int = 0
    skipped_steps: int = 0
    empty_steps: int = 0
    skipped_in_a_row: int = 0
    norms: list[float] = field(default_factory=list)

    def count(self, step: int, weight_version: int, skipped: bool, empty: bool, norms: Sequence[float] = ()) -> None:
        """A finished step, with the norms of its applied updates. An empty one neither adds to nor ends a row of
        skipped ones."""
        self.step, self.weight_version = step, weight_version
        self.skipped_steps += skipped
        self.empty_steps += empty
        if not empty:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.norms = [*self.norms, *norms][-NORMS_KEPT:]

    def metrics(self) -> dict[str, int]:
        return {"train/skipped_steps": self.skipped_steps, "train/empty_steps": self.empty_steps}


def usual_norm(norms: Sequence[float]) -> float | None:
    """Median of the last NORMS_KEPT of ``norms``; None before NORMS_NEEDED have been seen."""
    recent = norms[-NORMS_KEPT:]
    return statistics.median(recent) if len(recent) >= NORMS_NEEDED else None
