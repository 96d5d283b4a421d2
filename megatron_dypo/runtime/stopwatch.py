"""Seconds per named phase of one step, and which rank was the slowest."""

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
        self._stragglers: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def compare(self, seconds: list[float]) -> None:
        """Take note of what each rank's share of the rollouts took, without waiting for others."""
        if len(seconds) > 1:
            slowest = max(seconds)
            self._stragglers = {
                "perf/straggler_rank": seconds.index(slowest),
                "perf/rollout_imbalance": slowest * len(seconds) / sum(seconds),
            }

    def include(self, other: Stopwatch) -> None:
        """Take over what another one measured, of work beside this step's."""
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self._stragglers |= other._stragglers

    def metrics(self) -> dict[str, float]:
        """``time/PHASE`` of the phases of a step and of what else was timed, and ``time/step`` from construction until
        now (seconds).

        With several ranks that sample: ``perf/straggler_rank``, whose rollouts and rewards took longest, and
        ``perf/rollout_imbalance``, its seconds over the mean of all ranks.
        """
        times = {f"time/{name}": self.seconds.get(name, 0.0) for name in (*PHASES, *self.seconds)}
        return times | self._stragglers | {"time/step": time.perf_counter() - self._start}
