"""``trainer.deterministic``: on CUDA, only kernels and reductions whose result is the same every time.

On the CPU there is nothing to choose; there it only makes torch refuse an operation that would not repeat.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUDA_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace a stream, or its sums differ
    "NCCL_NVLS_ENABLE": "0",  # sums inside the NVLink switch have no fixed order; rings and trees have
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
    "VLLM_BATCH_INVARIANT": "1",  # a response does not depend on what is sampled beside it
}


def enable() -> None:
    """For the whole process, before it touches CUDA, NCCL or vLLM; these read the variables when they start.

    From then on torch raises RuntimeError where an operation has no deterministic kernel.
    """
    if torch.cuda.is_available():
        os.environ.update(_CUDA_ENVIRONMENT)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextmanager
def not_enforced() -> Iterator[None]:
    """torch's refusal off, for vLLM: its own mode makes it repeat, with operations that torch refuses (top-p's sum)."""
    enforced = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enforced)
