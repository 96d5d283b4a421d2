"""The recent level of a series, to compare a new value with."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

RECENT = 50  # values that make up the recent level
NEEDED = 20  # with fewer values there is no level


def recent_level(values: Sequence[float]) -> float | None:
    """Return the median of the last ``RECENT`` of ``values``, oldest first; None if there are fewer than ``NEEDED``."""
    recent = values[-RECENT:]
    return statistics.median(recent) if len(recent) >= NEEDED else None
