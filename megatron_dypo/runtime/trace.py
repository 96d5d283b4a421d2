"""Records spans of this process's work for the trace of a run, in lanes: its threads, and the servers that it calls.

Code that measures something adds it here; without a recorder (``logging.trace: false``) that costs one comparison.
Times are ``time.perf_counter()``, which all processes of a machine share. Imports no torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

LIMIT = 20_000  # spans and counts of one rank in one step that are kept


@dataclass(frozen=True)
class Span:
    """``name`` from ``began`` to ``ended`` (seconds). With ``ended`` None a count at that moment, in ``details``."""

    name: str
    category: str
    lane: str
    began: float
    ended: float | None
    details: Mapping[str, object]


class Recorder:
    """Holds the spans since the last ``take``. Any thread may add; those beyond ``LIMIT`` are counted and dropped."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._dropped = 0

    def add(self, span: Span) -> None:
        if len(self._spans) < LIMIT:
            self._spans.append(span)
        else:
            self._dropped += 1

    def take(self) -> list[Span]:
        """Return the spans that have ended since, and a count of those that were dropped."""
        spans, self._spans = self._spans, []
        dropped, self._dropped = self._dropped, 0
        if dropped:
            spans.append(Span("dropped spans", "trace", "main", time.perf_counter(), None, {"spans": dropped}))
        return spans


_recorder: Recorder | None = None  # this process's


def start() -> Recorder:
    """Start recording in this process."""
    global _recorder
    _recorder = Recorder()
    return _recorder


def stop() -> None:
    """Stop recording."""
    global _recorder
    _recorder = None


def recording() -> bool:
    """Return whether there is a recorder."""
    return _recorder is not None


def add(
    name: str, category: str, began: float, ended: float | None = None, lane: str | None = None, **details: int | None
) -> None:
    """Record a span until ``ended`` (default: now) in a ``lane`` (default: this thread's).

    Spans of one lane must nest. ``details`` that are None are left out.
    """
    if _recorder is None:
        return
    known = {key: value for key, value in details.items() if value is not None}
    ended = time.perf_counter() if ended is None else ended
    _recorder.add(Span(name, category, lane or _thread_lane(), began, ended, known))


def count(lane: str, **values: int) -> None:
    """Record the present ``values`` of a curve."""
    if _recorder is not None:
        _recorder.add(Span(lane, "count", lane, time.perf_counter(), None, dict(values)))


def _thread_lane() -> str:
    thread = threading.current_thread()
    return "main" if thread is threading.main_thread() else thread.name


class ScheduleTimers:
    """Records the ``timers`` that Megatron-Core's schedules call as spans under mcore's names.

    ``details`` belong to the forward pass in progress. On CUDA a span is the host's time: a kernel may run after it.
    """

    def __init__(self) -> None:
        self.details: dict[str, int] = {}
        self._timers: dict[str, _Timer] = {}

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        if name not in self._timers:
            self._timers[name] = _Timer(name, self)
        return self._timers[name]

    def take_details(self) -> dict[str, int]:
        """Return the details of the forward pass that ends."""
        details, self.details = self.details, {}
        return details


class _Timer:
    def __init__(self, name: str, timers: ScheduleTimers):
        self._name, self._timers, self._began = name, timers, 0.0

    def start(self, barrier: bool = False) -> None:
        self._began = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        details = self._timers.take_details() if self._name == "forward-compute" else {}
        add(self._name, "schedule", self._began, time.perf_counter(), None, **details)
