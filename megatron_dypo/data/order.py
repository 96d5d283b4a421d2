"""In which order prompts are visited: a pure function of (seed, step), with nothing to save for a resume."""

from __future__ import annotations

import functools

import torch

from megatron_dypo.runtime.seeding import generator


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist()


def batch_indices(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Row indices of step ``step`` (first is 1) among ``count`` rows, all different.

    An epoch is as many whole batches as the rows give; the rest sits out until the next epoch's shuffle, so that no
    batch holds a prompt twice.
    """
    batches = count // per_step
    epoch, batch = divmod(step - 1, batches)
    return _permutation(count, seed, epoch)[batch * per_step : (batch + 1) * per_step]


@functools.lru_cache(maxsize=2)
def spare_indices(step: int, per_step: int, count: int, seed: int) -> tuple[int, ...]:
    """The rows that are not in the batch of step ``step``, in an order of that step's own."""
    batch = set(batch_indices(step, per_step, count, seed))
    order = torch.randperm(count, generator=generator(seed, "refill", step)).tolist()
    return tuple(row for row in order if row not in batch)
