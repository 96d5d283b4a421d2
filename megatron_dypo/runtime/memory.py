"""How much memory this rank has needed."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

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
