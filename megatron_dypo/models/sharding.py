"""Cut weights over a sharded policy and gather them back, one Hugging Face tensor at a time.

``load_weights`` reads full tensors by name and keeps this rank's shard; ``hf_tensors`` gathers them. Initial weights
and the sync to the rollout engine pass through here; checkpoints are converted on the disk (convert/import_export.py).
Weights that are NaN or infinite are named by tensor, where they are read and where a step had to be skipped.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_dypo.errors import UserError
from megatron_dypo.models.families import TIED_HEAD_RULE, hf_shapes, rules
from megatron_dypo.models.rules import HEAD, WeightRule
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.runtime.determinism import generator
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, device

BLOCK = 2**20  # numbers that are drawn from one hash


def random_weights(shape: ModelShape, seed: int) -> Callable[[str], Tensor]:
    """Initial weights by Hugging Face name: norms 1, biases 0, others N(0, init_std) drawn from hash(seed, name).

    On the host, whatever the device: GPUs of different makes draw different numbers. A thread draws some 1e8 a second,
    so a large tensor is drawn in blocks, each from a hash of its own, by as many threads as this rank has cores.
    """
    shapes = hf_shapes(shape)
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def draw(name: str, block_N: Tensor, number: int) -> None:
        parts = (name, number) if number else (name,)
        block_N.normal_(generator=generator(seed, "weights", *parts)).mul_(shape.init_std)

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

    ``read(name)`` returns a full Hugging Face tensor. Raises UserError naming the tensor when its shape is not the
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


@torch.no_grad()
def hf_tensors(
    local: Mapping[str, Tensor], shape: ModelShape, layout: Layout, with_tied_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for the whole model on every rank; all ranks must iterate together.

    ``local``: this rank's shards (weights, or their gradients, or ...) by their parameters' names in the whole model.
    ``with_tied_head`` repeats a tied embedding as ``lm_head.weight``: vLLM keeps the old head otherwise, in silence.
    """
    dtype = next(iter(local.values())).dtype
    for rule in rules(shape):
        weight = local.get(rule.mcore)
        folded = _gather(rule, None if weight is None else weight.detach(), dtype, shape, layout)
        for name, part in zip(rule.names, rule.unfold(folded, shape), strict=True):
            yield name, part
            if with_tied_head and shape.tied_embeddings and rule.mcore.startswith("embedding"):
                yield HEAD, part


def _gather(rule: WeightRule, weight: Tensor | None, dtype: torch.dtype, shape: ModelShape, layout: Layout) -> Tensor:
    """The folded full tensor on every rank: all-gather over TP where the weight is, then broadcast to the others.

    An expert is cut over expert-tensor-parallel ranks, broadcast over expert-parallel ones, and then over PP.
    """
    is_expert = rule.expert is not None
    full, (tp, _) = None, layout.tensor(is_expert)
    if weight is not None:
        shard = rule.folded_shard(weight, shape, tp)
        if rule.axis is None or tp == 1:
            full = shard
        else:
            group = mpu.get_expert_tensor_parallel_group() if is_expert else mpu.get_tensor_model_parallel_group()
            shards = [torch.empty_like(shard) for _ in range(tp)]
            dist.all_gather(shards, shard.contiguous(), group=group)
            full = torch.cat(shards, dim=rule.axis)
    owner = _stage(rule, shape, layout)
    spread = []
    if is_expert and layout.ep > 1 and layout.pp_rank == owner:
        spread.append((mpu.get_expert_model_parallel_group(), rule.expert // (shape.num_experts // layout.ep)))
    if layout.pp > 1:
        spread.append((mpu.get_pipeline_model_parallel_group(), owner))
    if full is None:
        parts = [torch.empty(size, device="meta") for size in rule.sizes(shape)]
        full = torch.empty(rule.fold(parts, shape).shape, dtype=dtype, device=device())
    full = full.contiguous() if spread else full
    for group, rank in spread:
        dist.broadcast(full, dist.get_global_rank(group, rank), group=group)
    return full


def _stage(rule: WeightRule, shape: ModelShape, layout: Layout) -> int:
    """The pipeline rank that owns a weight."""
    if rule.mcore.startswith("decoder.layers."):
        return int(rule.mcore.split(".")[2]) // (shape.num_layers // (layout.pp * layout.vpp)) % layout.pp
    return 0 if rule.mcore.startswith("embedding") else layout.pp - 1


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
