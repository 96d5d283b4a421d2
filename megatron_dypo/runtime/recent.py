"""What is usual for a series that has just been: the level that a new value is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

RECENT = 50  # values that make up the recent level
NEEDED = 20  # before that many, there is none


def recent_level(values: Sequence[float]) -> float | None:
    """Median of the last ``RECENT`` of ``values``, oldest first; None before ``NEEDED`` have been seen."""
    recent = values[-RECENT:]
    return statistics.median(recent) if len(recent) >= NEEDED else None
