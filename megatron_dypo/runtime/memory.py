"""How much memory this rank has needed."""

from __future__ import annotations

import resource

import torch

_KIB_PER_GIB = 2**20


def take_peaks() -> dict[str, float]:
    """This process's peaks in GiB: resident memory since its start and, on CUDA, allocated memory since the last call.

    Linux counts the resident peak in KiB. The device's covers everything in this process, a rollout engine included.
    """
    peaks = {"perf/host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KIB_PER_GIB}
    if torch.cuda.is_available():
        peaks["perf/device_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return peaks
