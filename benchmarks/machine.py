"""Say where results are stored, and what machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_dypo.runtime.versions import packages as installed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment(device: str, threads: str, packages: Iterable[str]) -> dict[str, Any]:
    """Return versions, hardware, and the load before measuring. ``threads``: how many were used on the CPU."""
    found = installed()
    versions = {"python": platform.python_version()} | {name: found[name] for name in packages if name in found}
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    hardware = f"{threads} on {os.cpu_count()} cores of {cpu_model()}, {memory}"
    if device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {"hardware": hardware, "load_average_before": os.getloadavg()[0], "versions": versions}


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
