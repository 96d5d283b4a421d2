"""Shard weights over a policy, one Hugging Face tensor at a time (export.py gathers them back).

``load_weights`` reads full tensors by name and keeps this rank's shard. Initial weights and those of `model.hf` pass
through here; checkpoints are converted on disk (convert/import_export.py). NaN or infinite weights are named by tensor,
when they are read and when a step had to be skipped.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megatron_dypo.errors import UserError
from megatron_dypo.models.families import TIED_HEAD_RULE, hf_shapes, rules
from megatron_dypo.models.rules import SCORE
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.runtime.determinism import generator
from megatron_dypo.runtime.distributed import Layout, all_gather_objects

BLOCK = 2**20  # numbers drawn from one hash


def random_weights(shape: ModelShape, seed: int) -> Callable[[str], Tensor]:
    """Draw initial weights by Hugging Face name: norms 1, biases 0, others N(0, init_std) from hash(seed, name).

    They are drawn on the host, because different GPUs draw different numbers. A thread draws about 1e8 per second, so a
    large tensor is drawn in blocks, each from its own hash, by as many threads as this rank has cores.
    The standard deviation of a value head is 1 / (H + 1), as in OpenRLHF and Open-Reasoner-Zero.
    """
    shapes = hf_shapes(shape)
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def draw(name: str, block_N: Tensor, number: int) -> None:
        parts = (name, number) if number else (name,)
        std = 1 / (shape.hidden_size + 1) if name.startswith(f"{SCORE}.") else shape.init_std
        block_N.normal_(generator=generator(seed, "weights", *parts)).mul_(std)

    def read(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name])
        if name.endswith(".bias"):
            return torch.zeros(shapes[name])
        weight = torch.empty(shapes[name])
        blocks = weight.view(-1).split(BLOCK)
        if len(blocks) == 1:
            draw(name, weight, 0)
            return weight
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(draw, itertools.repeat(name), blocks, itertools.count()))
        return weight

    return read


@torch.no_grad()
def load_weights(local: Mapping[str, Tensor], shape: ModelShape, layout: Layout, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's shard of the model: ``local``, its parameters by their names in the whole model.

    ``read(name)`` returns a full Hugging Face tensor. Raises UserError naming the tensor if its shape is not the
    model's.
    """
    shapes = hf_shapes(shape)
    for rule in [*rules(shape), *([TIED_HEAD_RULE] if shape.tied_embeddings else [])]:
        if rule.mcore not in local:
            continue
        parts = [read(name) for name in rule.names]
        for name, part in zip(rule.names, parts, strict=True):
            if tuple(part.shape) != shapes[name]:
                raise UserError(f"{name}: shape {list(part.shape)} in the file, {list(shapes[name])} in the model")
        folded = rule.fold(parts, shape)
        if rule.axis is not None:
            ranks, rank = layout.tensor(rule.expert is not None)
            folded = folded.chunk(ranks, dim=rule.axis)[rank]
        local[rule.mcore].copy_(rule.as_megatron(folded))


NAMED = 8  # tensors named in a message, at most


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite; in one pass, without a mask."""
    return all(bool(end.isfinite()) for end in tensor.aminmax())


def watched(
    read: Callable[[str], Tensor], source: str | Path, found: Callable[[str], object]
) -> Callable[[str], Tensor]:
    """Wrap ``read`` to call ``found(line)`` for every tensor of ``source`` that is not finite."""

    def reading(name: str) -> Tensor:
        tensor = read(name)
        if not is_finite(tensor):
            found(f"{source}: {describe(name, tensor)}")
        return tensor

    return reading


def refuse(line: str) -> None:
    """Raise UserError: this model cannot be sampled from."""
    raise UserError(f"{line}: this model cannot compute log-probs")


def describe(name: str, tensor: Tensor) -> str:
    """Describe a tensor's elements: ``tensor lm_head.weight: 3 of 8,192 elements are NaN or infinite``."""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    return f"tensor {name}: {bad:,} of {tensor.numel():,} elements are NaN or infinite"


def require_finite(local: Mapping[str, Tensor], shape: ModelShape, layout: Layout, source: str) -> None:
    """Raise UserError on all ranks, naming ``source`` and the tensors, unless all weights are finite; collective."""
    if found := unfinite_weights(local, shape, layout):
        more = f" and {len(found) - NAMED} more tensors" if len(found) > NAMED else ""
        refuse(f"{source}: NaN or infinite: {', '.join(found[:NAMED])}{more}")


@torch.no_grad()
def unfinite_weights(local: Mapping[str, Tensor], shape: ModelShape, layout: Layout) -> list[str]:
    """Return Hugging Face names of the model's tensors that are not finite, the same on all ranks; collective.

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
