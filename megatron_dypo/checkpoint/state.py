"""The contents of a checkpoint, sharded for this rank: weights, reference, Adam's moments (and master weights).

Everything is sharded and keyed as mcore shards the weights (``fully_reshardable``): one tensor of the whole model per
weight and moment, so it loads at any layout, with the plain or the distributed optimizer. Of the data-parallel ranks,
the one that holds most of a parameter's Adam state writes everything of that parameter; only slices of parameters that
straddle two ranks are sent. A second model's keys have a prefix (``SIDE``). An expert's data-parallel ranks are those
that hold the same shard of the same experts; mcore stacks its weight along an axis of layers and one of experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from torch import Tensor

from megatron_dypo.checkpoint.io import TensorPiece
from megatron_dypo.policy.model import whole_model_names
from megatron_dypo.policy.optimizer import Part, adam_parts
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime.distributed import all_gather_objects

PIECE = 10**9  # bytes copied to host memory and written at a time, at most; two such copies may exist


@dataclass(frozen=True)
class Holders:
    """The slice of a parameter's Adam state that each data-parallel rank holds: (rank, start, end), by rank."""

    slices: tuple[tuple[int, int, int], ...]
    writer: int


def exchange_holders(policy: Policy) -> dict[str, Holders]:
    """Return every parameter's holders, equal on all its data-parallel ranks. Collective; constant for a run."""
    parts = adam_parts(policy.optimizer, policy.parameters)
    mine = {name: (part.start, part.end) for name, part in parts.items()}
    dense = all_gather_objects(mine, mpu.get_data_parallel_group(with_context_parallel=True))
    expert = all_gather_objects(mine, mpu.get_expert_data_parallel_group()) if policy.shape.num_experts else []
    holders = {}
    for index, (name, parameter) in enumerate(policy.parameters.items()):
        everyone = expert if _is_expert(parameter) else dense
        slices = tuple((rank, *theirs[name]) for rank, theirs in enumerate(everyone) if name in theirs)
        most = max(end - start for _, start, end in slices)
        candidates = [rank for rank, start, end in slices if end - start == most]
        holders[name] = Holders(slices, candidates[index % len(candidates)])  # take turns if all hold the same
    return holders


def snapshot(policy: Policy, holders: dict[str, Holders], model: str = "") -> list[tuple[TensorPiece, Tensor]]:
    """Return host copies of the pieces that this rank writes, their keys prefixed by ``model``. Collective."""
    return list(host_pieces(policy, holders, model))


def host_pieces(policy: Policy, holders: dict[str, Holders], model: str = "") -> Iterator[tuple[TensorPiece, Tensor]]:
    """Yield each piece that this rank writes, at most PIECE bytes, as a host copy made on demand.

    Collective: every rank has to consume all of its own.
    """
    for place, tensor in _pieces(policy, holders, model):
        for part, data in _split(place, tensor.reshape(place.sizes)):
            yield part, _on_host(data)


def written_bytes(policy: Policy, holders: dict[str, Holders]) -> int:
    """Return the bytes of this rank's pieces; a slight overestimate if another tensor-parallel rank writes some."""
    parts = adam_parts(policy.optimizer, policy.parameters) if policy.version > 0 else {}
    adam = next(iter(parts.values())).main.dtype.itemsize * len(next(iter(parts.values())).names) if parts else 0
    own = 0
    for name, parameter in policy.parameters.items():
        if holders[name].writer == dist.get_rank(_data_parallel_group(parameter)):
            weights = 1 if policy.reference is None else 2
            own += parameter.numel() * (weights * parameter.dtype.itemsize + adam)
    return own


def _pieces(policy: Policy, holders: dict[str, Holders], model: str) -> Iterator[tuple[TensorPiece, Tensor]]:
    """Yield each weight and moment that this rank writes, still on its device."""
    policy.offload.require_device()
    templates = _templates(policy)
    parts = adam_parts(policy.optimizer, policy.parameters)
    for name, parameter in policy.parameters.items():
        group = _data_parallel_group(parameter)
        if holders[name].writer == dist.get_rank(group):
            yield from _cut(templates[name], model, parameter.detach())
            if policy.reference is not None:
                yield from _cut(templates[name], f"{model}reference.", policy.reference.read(name))
        if policy.version > 0:  # Adam has no state before the first applied update
            for kind, tensor in _gather_adam(parameter, parts.get(name), holders[name], group):
                yield from _cut(templates[name], f"{model}optimizer.state.{kind}.", tensor)


def _split(place: TensorPiece, tensor: Tensor) -> Iterator[tuple[TensorPiece, Tensor]]:
    """Split the piece along its first axis longer than 1 into slices of at most PIECE bytes."""
    axis = next((axis for axis, size in enumerate(place.sizes) if size > 1), None)
    if tensor.nbytes <= PIECE or axis is None:
        yield place, tensor
        return
    rows = max(1, place.sizes[axis] * PIECE // tensor.nbytes)
    for start, part in zip(range(0, place.sizes[axis], rows), tensor.split(rows, axis), strict=True):
        offsets = tuple(offset + start * (i == axis) for i, offset in enumerate(place.offsets))
        yield from _split(replace(place, offsets=offsets, sizes=tuple(part.shape)), part)


def restore(policy: Policy, folder: Path, model: str = "") -> None:
    """Load weights, reference and the Adam state of ``policy.adam_steps`` updates, keys prefixed by ``model``.

    Collective. Raises CheckpointException (torch's; not an Exception) or CheckpointingException (mcore's) if they
    cannot be read.
    """
    templates, parameters = _templates(policy), policy.parameters
    wanted = {
        "weights": {name: _target(templates[name], model, parameter.detach()) for name, parameter in parameters.items()}
    }
    if policy.reference is not None:
        wanted["reference"] = {
            name: _target(templates[name], f"{model}reference.", torch.empty(parameter.shape, dtype=parameter.dtype))
            for name, parameter in parameters.items()
        }
    parts = adam_parts(policy.optimizer, parameters) if policy.version > 0 else {}
    for name, part in parts.items():
        for kind in part.names:
            empty = torch.empty(parameters[name].shape, dtype=part.main.dtype)
            wanted.setdefault(kind, {})[name] = _target(templates[name], f"{model}optimizer.state.{kind}.", empty)
    loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(loaded["weights"][name])
        for name, kept in loaded.get("reference", {}).items():
            policy.reference.write(name, kept)
    for name, part in parts.items():
        flat = {kind: loaded[kind][name].reshape(-1)[part.start : part.end] for kind in part.names}
        part.restore(flat, policy.adam_steps)


def _templates(policy: Policy) -> dict:
    """Return mcore's description of each weight: its place in the whole model's tensor of that name."""
    found: dict = {}
    for chunk in policy.chunks:
        found |= whole_model_names(chunk.module, chunk.module.sharded_state_dict())
    return found


def _gather_adam(
    parameter: Tensor, part: Part | None, holders: Holders, group: dist.ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    """Yield (kind, whole tensor in the parameter's shape) on the writer; other holders send it their slices."""
    if part is None:
        return
    me = dist.get_rank(group)
    for kind in part.names:
        mine = part.flat(kind)
        if holders.writer != me:
            if not _is_replica(holders):
                dist.send(mine.contiguous(), dist.get_global_rank(group, holders.writer), group=group)
            continue
        if part.end - part.start == parameter.numel():
            yield kind, mine.reshape(parameter.shape)
            continue
        whole = torch.empty(parameter.numel(), dtype=mine.dtype, device=mine.device)
        for rank, start, end in holders.slices:
            if rank == me:
                whole[start:end] = mine
            else:
                slice_ = torch.empty(end - start, dtype=mine.dtype, device=mine.device)
                dist.recv(slice_, dist.get_global_rank(group, rank), group=group)
                whole[start:end] = slice_
        yield kind, whole.reshape(parameter.shape)


def _is_replica(holders: Holders) -> bool:
    """Return whether all holders hold the same slice (the plain optimizer), so that nothing is sent."""
    return len({(start, end) for _, start, end in holders.slices}) == 1


def _cut(template, prefix: str, tensor: Tensor) -> list[tuple[TensorPiece, Tensor]]:
    """Split a rank's tensor into mcore's pieces; empty if another tensor- or pipeline-parallel rank writes it."""
    sharded = {0: replace(_target(template, prefix, tensor), replica_id=(*template.replica_id[:-1], 0))}
    apply_factories(sharded)
    pieces = []
    for piece in nested_values(sharded):
        if is_main_replica(piece.replica_id):
            sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
            place = TensorPiece(piece.key, tuple(piece.global_shape), tuple(piece.global_offset), sizes, piece.dtype)
            pieces.append((place, piece.data.detach()))
    return pieces


def _target(template, prefix: str, tensor: Tensor):
    """Return mcore's description of a weight (a ShardedTensor or factory) for another tensor of its shape."""
    own = {"dtype": tensor.dtype} if hasattr(template, "dtype") else {}
    return replace(template, key=prefix + template.key, data=tensor, **own)


def _on_host(tensor: Tensor) -> Tensor:
    """Copy to pageable memory, which returns to the system once written; torch would keep pinned memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _is_expert(parameter: Tensor) -> bool:
    """Return whether mcore excludes this weight from the dense weights' data-parallel reduction."""
    return not getattr(parameter, "allreduce", True)


def _data_parallel_group(parameter: Tensor) -> dist.ProcessGroup:
    """Return the ranks that hold the same shard of the parameter."""
    if _is_expert(parameter):
        return mpu.get_expert_data_parallel_group()
    return mpu.get_data_parallel_group(with_context_parallel=True)
