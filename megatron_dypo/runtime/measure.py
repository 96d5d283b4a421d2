"""Seconds per named phase of a step, the slowest rank, and this process's peak memory."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from megatron_dypo.runtime import trace
from megatron_dypo.runtime.failure import current_step

PHASES = ("rollout", "reward", "logprob", "update", "sync")


class StepTimer:
    """Times phases: ``with clock("rollout"): ...`` adds to ``clock.seconds["rollout"]``, and to the trace."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self._stragglers: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.seconds[name] += ended - began
        trace.add(f"time/{name}", "time", began, ended, step=current_step())

    def compare(self, seconds: list[float]) -> None:
        """Record the seconds that each rank's share of the rollouts took, without waiting for others."""
        if len(seconds) > 1:
            slowest = max(seconds)
            self._stragglers = {
                "perf/straggler_rank": seconds.index(slowest),
                "perf/rollout_imbalance": slowest * len(seconds) / sum(seconds),
            }

    def include(self, other: StepTimer) -> None:
        """Add the measurements of another timer, taken of work alongside this step."""
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self._stragglers |= other._stragglers

    def metrics(self) -> dict[str, float]:
        """Return ``time/PHASE`` per phase and other timed work, and ``time/step`` since construction (seconds).

        With several sampling ranks also ``perf/straggler_rank``, the rank whose rollouts and rewards took longest, and
        ``perf/rollout_imbalance``, its seconds over the mean of all ranks.
        """
        times = {f"time/{name}": self.seconds.get(name, 0.0) for name in (*PHASES, *self.seconds)}
        ended = time.perf_counter()
        trace.add("time/step", "time", self._start, ended, step=current_step())
        return times | self._stragglers | {"time/step": ended - self._start}


class Stopwatch:
    """Adds up the seconds of ``with clock(): ...`` until they are taken; each is a span ``time/NAME`` of the trace."""

    def __init__(self, name: str) -> None:
        self._name, self._seconds = name, 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        self._seconds += ended - began
        trace.add(f"time/{self._name}", "time", began, ended, step=current_step())

    def take(self) -> float:
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


_KIB_PER_GIB = 2**20


class DevicePeak:
    """Peak bytes that torch has allocated on the device, without what a sleeping vLLM has released.

    vLLM unmaps that memory without torch noticing: its addresses are kept and count as allocated.
    """

    def __init__(self) -> None:
        self._peak = self._unmapped = 0

    def unmapped(self, size: int) -> None:
        """Count ``size`` bytes that torch reports as allocated as not on the device from now on."""
        self._note()
        self._unmapped = size

    def take(self) -> int:
        """Return the peak since the last call."""
        self._note()
        peak, self._peak = self._peak, 0
        return peak

    def _note(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated() - self._unmapped)
        torch.cuda.reset_peak_memory_stats()


DEVICE = DevicePeak()  # this process's


def take_peaks() -> dict[str, float]:
    """Return this process's peaks in GiB: resident memory since its start and CUDA memory since the last call.

    Linux reports the resident peak in KiB. The device peak covers everything in this process, including a rollout
    engine while it is awake.
    """
    peaks = {"perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB}
    if torch.cuda.is_available():
        peaks["perf/device_memory_gib"] = DEVICE.take() / 2**30
    return peaks


def device_bytes() -> int | None:
    """Return the memory of this rank's GPU in bytes; None without CUDA."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.is_available()
        else None
    )


def free_host_memory() -> int:
    """Return the bytes of host memory this process may still take: free on the machine, or left in its container."""
    free, cgroup = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
