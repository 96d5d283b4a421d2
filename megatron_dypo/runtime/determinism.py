"""Stateless random draws, and ``trainer.deterministic``: only reproducible kernels on CUDA.

Every random choice is a hash of what it is about, not of when or where it is made. A resumed run, another layout or
another order of prompts draws the same numbers, and nothing has to be saved.

On the CPU the mode selects no kernels; it only makes torch refuse an operation that is not reproducible. vLLM in this
process is reproducible without a mode of its own: it runs no process or thread alongside, so the composition of a batch
does not depend on timing (vLLM's documentation, "Reproducibility"). Its batch-invariant mode would change the trainer:
it replaces torch's kernels, among them softmax without its gradient, and the settings of cuBLAS and NCCL.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_dypo.errors import UserError


def stable_hash(*parts: object) -> int:
    """Return a 63-bit hash of the parts' text, the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def choose(seed_parts: tuple[object, ...], population: int, count: int) -> tuple[int, ...]:
    """Draw ``count`` different indices below ``population``, uniformly and in order of drawing; at most all of them."""
    return tuple(random.Random(stable_hash(*seed_parts)).sample(range(population), min(count, population)))


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded with the hash of ``parts``."""
    return torch.Generator().manual_seed(stable_hash(*parts))


_CUDA_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS: one workspace per stream; otherwise its sums differ
    "NCCL_NVLS_ENABLE": "0",  # sums inside the NVLink switch have no fixed order; those of rings and trees do
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # Transformer Engine's attention
}
_OPERATORS = ("addmm", "bmm", "linear", "_log_softmax", "matmul", "mean.dim", "mm", "_softmax", "softmax.int")


def enable() -> None:
    """Make this process deterministic. Call before CUDA or NCCL start: they read the environment only then.

    From then on torch raises RuntimeError if an operation has no deterministic kernel.
    """
    if torch.cuda.is_available():
        os.environ.update(_CUDA_ENVIRONMENT)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextmanager
def not_enforced() -> Iterator[None]:
    """Suspend torch's determinism checks for vLLM, which uses operations that they reject (the sum of top-p)."""
    enforced = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enforced)


def refuse_batch_invariance(where: str) -> None:
    """Raise UserError if VLLM_BATCH_INVARIANT is set in the training process."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise UserError(
            f"{where}: VLLM_BATCH_INVARIANT={os.environ['VLLM_BATCH_INVARIANT']} in the environment replaces torch's "
            "kernels in this process, where the policy trains; unset it, or sample with rollout.engine: server"
        )


@contextmanager
def trainer_kept() -> Iterator[None]:
    """Keep the trainer's variables while an engine starts here; raise RuntimeError if it replaces torch's kernels."""
    variables, kernels = {name: os.environ.get(name) for name in _CUDA_ENVIRONMENT}, _kernels()
    yield
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
    if replaced := [name for name, entry in _kernels().items() if entry != kernels[name]]:
        raise RuntimeError(f"vLLM replaced torch's kernels in the process that trains: {', '.join(replaced)}")


def _kernels() -> dict[str, list[str]]:
    """Return the device kernels that torch calls, by operator, and its ``bmm``, which older vLLM replaces by name."""
    dumps = {name: torch._C._dispatch_dump(f"aten::{name}") for name in _OPERATORS}
    kernels = {
        name: [line for line in dump.splitlines() if line.startswith(("CPU", "CUDA"))] for name, dump in dumps.items()
    }
    return kernels | {"torch.bmm": [repr(torch.bmm)]}
