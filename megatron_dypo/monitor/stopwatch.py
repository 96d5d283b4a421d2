"""Seconds per named phase of one step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with clock("rollout"): ...`` adds to ``clock.seconds["rollout"]``; ``total`` counts from construction."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start
