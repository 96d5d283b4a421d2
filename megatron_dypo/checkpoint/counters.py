"""What a run counts between its steps, and a checkpoint keeps as ``state.json``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What a run counts; everything else it draws is a hash of seed, step and prompt."""

    step: int = 0
    weight_version: int = 0
    skipped_steps: int = 0
    empty_steps: int = 0
    skipped_in_a_row: int = 0

    def count(self, step: int, weight_version: int, skipped: bool, empty: bool) -> None:
        """A finished step. An empty one neither adds to nor ends a row of skipped ones."""
        self.step, self.weight_version = step, weight_version
        self.skipped_steps += skipped
        self.empty_steps += empty
        if not empty:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def metrics(self) -> dict[str, int]:
        return {"train/skipped_steps": self.skipped_steps, "train/empty_steps": self.empty_steps}
