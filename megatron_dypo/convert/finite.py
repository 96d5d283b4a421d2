"""Weights that are NaN or infinite, named by tensor: where they are read, and where a step had to be skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_dypo.convert.mapping import rules
from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.runtime.distributed import Layout, all_gather_objects

NAMED = 8  # tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; in one pass, without a tensor of marks."""
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def watched(
    read: Callable[[str], Tensor], source: str | Path, found: Callable[[str], object]
) -> Callable[[str], Tensor]:
    """``read``, which calls ``found(line)`` for every tensor of ``source`` that is not finite."""

    def reading(name: str) -> Tensor:
        tensor = read(name)
        if not is_finite(tensor):
            found(f"{source}: {describe(name, tensor)}")
        return tensor

    return reading


def refuse(line: str) -> None:
    """Raise UserError: nothing can be sampled from such a model."""
    raise UserError(f"{line}: such a model gives no log-probs")


def describe(name: str, tensor: Tensor) -> str:
    """E.g. ``tensor lm_head.weight: 3 of 8,192 elements are NaN or infinite``."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    return f"tensor {name}: {bad:,} of {tensor.numel():,} elements are NaN or infinite"


def require_finite(local: Mapping[str, Tensor], shape: ModelShape, layout: Layout, source: str) -> None:
    """Raise UserError on all ranks, naming ``source`` and the tensors, unless all weights are finite; collective."""
    if found := unfinite_weights(local, shape, layout):
        more = f" and {len(found) - NAMED} more tensors" if len(found) > NAMED else ""
        refuse(f"{source}: NaN or infinite: {', '.join(found[:NAMED])}{more}")


@torch.no_grad()
def unfinite_weights(local: Mapping[str, Tensor], shape: ModelShape, layout: Layout) -> list[str]:
    """Hugging Face names of the model's tensors that are not finite, the same on all ranks; collective.

    ``local``: this rank's parameters by their names in the whole model.
    """
    mine = []
    for rule in rules(shape):
        weight = local.get(rule.mcore)
        if weight is not None and not is_finite(weight):
            ranks, _ = layout.tensor(rule.expert is not None)
            parts = rule.unfold(rule.folded_shard(weight, shape, ranks), shape)
            mine += [name for name, part in zip(rule.names, parts, strict=True) if not is_finite(part)]
    return sorted({name for names in all_gather_objects(mine) for name in names})
