"""Seconds per named phase of one step and which rank was the slowest, and how much memory this rank has needed."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

PHASES = ("rollout", "reward", "logprob", "update", "sync")


class StepTimer:
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

    def include(self, other: StepTimer) -> None:
        """Take over what another one measured, of work alongside this step's."""
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


_KIB_PER_GIB = 2**20


class DevicePeak:
    """The peak in bytes of what torch has allocated on the device, without what a sleeping vLLM has given back.

    That is unmapped behind torch's back: its addresses are kept, and count as allocated.
    """

    def __init__(self) -> None:
        self._peak = self._unmapped = 0

    def unmapped(self, size: int) -> None:
        """From now on ``size`` bytes that torch counts as allocated are not on the device."""
        self._note()
        self._unmapped = size

    def take(self) -> int:
        """The peak since the last call."""
        self._note()
        peak, self._peak = self._peak, 0
        return peak

    def _note(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated() - self._unmapped)
        torch.cuda.reset_peak_memory_stats()


DEVICE = DevicePeak()  # this process's


def take_peaks() -> dict[str, float]:
    """This process's peaks in GiB: resident memory since its start and, on CUDA, allocated memory since the last call.

    Linux counts the resident peak in KiB. The device's covers everything in this process, a rollout engine included
    while it is awake.
    """
    peaks = {"perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB}
    if torch.cuda.is_available():
        peaks["perf/device_memory_gib"] = DEVICE.take() / 2**30
    return peaks


def device_bytes() -> int | None:
    """Memory of this rank's GPU; None without CUDA."""
    return (
        torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        if torch.cuda.is_available()
        else None
    )


def free_host_memory() -> int:
    """Bytes of host memory that this process may still take: the machine's, or what is left of its container's."""
    free, cgroup = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)
