"""In which order prompts are visited: a pure function of (seed, step), with nothing to save for a resume."""

from __future__ import annotations

import functools

import torch

from megatron_dypo.runtime.seeding import generator


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def batch_indices(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Row indices of step ``step`` (first is 1) among ``count`` rows: each epoch visits every row once, in its own order."""
    first = (step - 1) * per_step
    return [
        _permutation(count, seed, position // count)[position % count] for position in range(first, first + per_step)
    ]
