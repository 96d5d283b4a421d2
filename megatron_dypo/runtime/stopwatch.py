"""Seconds per named phase of one step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("rollout", "reward", "logprob", "update", "sync")


class Stopwatch:
    """``with clock("rollout"): ...`` adds to ``clock.seconds["rollout"]``."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        """``time/PHASE`` of the phases of a step, and ``time/step`` from construction until now (seconds)."""
        times = {f"time/{name}": self.seconds.get(name, 0.0) for name in PHASES}
        return times | {"time/step": time.perf_counter() - self._start}
