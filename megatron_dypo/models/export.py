"""Gather a sharded policy: (Hugging Face name, full tensor) on every rank, one layer's weights at a time.

A layer travels in flat buffers, one per kind of sharding, as rows [ranks, elements per rank]:

expert   the experts; a row for each rank that holds some, expert-tensor-parallel ranks next to each other
tensor   what tensor parallelism cuts; a row for each of its ranks
whole    the rest; one row

The stage that owns the layer broadcasts each rank's own row to the same ranks of the other stages; then the ranks of a
stage gather the rows. So nothing crosses twice between stages, which may be nodes, and a layer takes at most three
broadcasts and two all-gathers, however many tensors it has. A thread gathers the next layer while the caller works on
this one, so two layers are in memory; what needs no other rank is not copied at all.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, zip_longest

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_dypo.models.families import rules
from megatron_dypo.models.rules import HEAD, WeightRule
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.models.stages import layer_owners
from megatron_dypo.runtime import trace
from megatron_dypo.runtime.distributed import Layout

EXPERT, TENSOR, WHOLE = "expert", "tensor", "whole"


@dataclass(frozen=True)
class Piece:
    """A weight's place in its layer's buffer: ``rows`` shards of a folded shape, from ``row`` on, at ``offset``."""

    rule: WeightRule
    cut: str
    row: int
    rows: int
    offset: int
    shape: tuple[int, ...]

    def shard(self, row: Tensor) -> Tensor:
        """Return the weight's part of a row."""
        return row[self.offset : self.offset + torch.Size(self.shape).numel()].view(self.shape)

    def folded(self, rows: Tensor) -> Tensor:
        """Return the folded full weight: a view of the buffer, or a copy if there are several shards."""
        shards, axis = [self.shard(row) for row in rows[self.row : self.row + self.rows]], self.rule.axis
        return shards[0] if self.rows == 1 or axis is None else torch.cat(shards, dim=axis)


@dataclass(frozen=True)
class Unit:
    """What is gathered at once: a layer, or what precedes or follows all layers. ``owner``: its pipeline rank."""

    owner: int
    pieces: tuple[Piece, ...]

    def of(self, cut: str, row: int) -> list[Piece]:
        """Return the pieces with a shard in this row."""
        return [piece for piece in self.pieces if piece.cut == cut and piece.row <= row < piece.row + piece.rows]


@torch.no_grad()
def hf_tensors(
    local: Mapping[str, Tensor], shape: ModelShape, layout: Layout, with_tied_head: bool = False, ahead: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for the whole model on every rank; all ranks must iterate together.

    ``local``: this rank's shards (of weights, gradients, ...) by their parameters' names in the whole model.
    ``with_tied_head`` repeats a tied embedding as ``lm_head.weight``; without it vLLM silently keeps the old head.
    ``ahead=False`` gathers in the caller's thread, for callers that make collectives between tensors themselves.
    Keeping a tensor keeps its whole layer in memory.
    """
    units, gatherer = plan(shape, layout), Gatherer(local, shape, layout)
    with ThreadPoolExecutor(1, "export") if ahead else nullcontext() as pool:
        coming = gatherer.begin(units[0], pool)
        for unit, following in zip_longest(units, units[1:]):
            buffers = coming()
            for number, piece in enumerate(unit.pieces):
                parts = piece.rule.unfold(gatherer.folded(piece, buffers), shape)
                for name, part in zip(piece.rule.names, parts, strict=True):
                    yield name, part
                    if with_tied_head and shape.tied_embeddings and piece.rule.mcore.startswith("embedding"):
                        yield HEAD, part
                if number == 0 and following:  # not earlier: only now has the caller released the unit before this one
                    coming = gatherer.begin(following, pool)


@functools.lru_cache(maxsize=8)
def plan(shape: ModelShape, layout: Layout) -> tuple[Unit, ...]:
    """Return the whole model as units, in the order of ``rules``."""
    owners = {
        "embedding": 0,
        **{f"decoder.layers.{i}": rank for i, rank in enumerate(layer_owners(shape.num_layers, layout.pp, layout.vpp))},
    }
    units = groupby(rules(shape), key=lambda rule: _unit_name(rule.mcore))
    return tuple(
        Unit(owners.get(name, layout.pp - 1), tuple(_pieces(members, shape, layout))) for name, members in units
    )


def _unit_name(mcore: str) -> str:
    parts = mcore.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else "embedding" if parts[0] == "embedding" else ""


def _pieces(members: Iterator[WeightRule], shape: ModelShape, layout: Layout) -> Iterator[Piece]:
    used: Counter[tuple[str, int]] = Counter()  # elements, by cut and row
    for rule in members:
        ranks, _ = layout.tensor(rule.expert is not None)
        if rule.expert is not None and layout.ep * layout.etp > 1:
            cut, row, rows = EXPERT, rule.expert // (shape.num_experts // layout.ep) * layout.etp, layout.etp
        else:
            cut, row, rows = (WHOLE, 0, 1) if rule.axis is None or ranks == 1 else (TENSOR, 0, ranks)
        size = list(_folded_shape(rule.fold, tuple(rule.sizes(shape)), shape))
        if rule.axis is not None:
            size[rule.axis] //= rows
        yield Piece(rule, cut, row, rows, used[cut, row], tuple(size))
        for each in range(row, row + rows):
            used[cut, each] += torch.Size(size).numel()


@functools.lru_cache(maxsize=256)
def _folded_shape(fold: Callable, sizes: tuple[tuple[int, ...], ...], shape: ModelShape) -> torch.Size:
    return fold([torch.empty(size, device="meta") for size in sizes], shape).shape


class Gatherer:
    """Bring units to this rank; on CUDA, on its own stream, while the caller works on the previous unit."""

    def __init__(self, local: Mapping[str, Tensor], shape: ModelShape, layout: Layout):
        self._local, self._shape, self._layout = local, shape, layout
        self._like = next(iter(local.values())).detach()
        self._caller = self._side = None
        if self._like.is_cuda:
            self._caller, self._side = (
                torch.cuda.current_stream(self._like.device),
                torch.cuda.Stream(self._like.device),
            )
            self._side.wait_stream(self._caller)

    def begin(self, unit: Unit, pool: ThreadPoolExecutor | None) -> Callable[[], Mapping[str, Tensor]]:
        """Start to gather; the returned call waits for the unit's buffers, by cut (none if no other rank is needed).

        Without a ``pool`` the returned call gathers.
        """
        cuts = {piece.cut for piece in unit.pieces} - (set() if self._layout.pp > 1 else {WHOLE})
        if not cuts:
            return dict
        gather = functools.partial(self._gather, unit, sorted(cuts))
        result = pool.submit(gather).result if pool else gather

        def wait() -> dict[str, Tensor]:
            buffers = result()
            if self._side is not None and self._caller is not None:
                self._caller.wait_stream(self._side)
            return buffers

        return wait

    def folded(self, piece: Piece, buffers: Mapping[str, Tensor]) -> Tensor:
        """Return the folded full weight of a gathered unit."""
        return piece.folded(buffers[piece.cut]) if piece.cut in buffers else self._shard(piece)

    def _shard(self, piece: Piece) -> Tensor:
        """Return this rank's own shard, in the folded layout."""
        ranks, _ = self._layout.tensor(piece.rule.expert is not None)
        return piece.rule.folded_shard(self._local[piece.rule.mcore].detach(), self._shape, ranks)

    @torch.no_grad()
    def _gather(self, unit: Unit, cuts: Sequence[str]) -> dict[str, Tensor]:
        began = time.perf_counter()
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            buffers = {cut: self._exchange(unit, cut) for cut in cuts}
        trace.add("gather " + (_unit_name(unit.pieces[0].rule.mcore) or "head"), "export", began)
        return buffers

    def _exchange(self, unit: Unit, cut: str) -> Tensor:
        """Exchange one buffer of the unit, and return it full on every rank."""
        group = {EXPERT: mpu.get_expert_tensor_and_model_parallel_group, TENSOR: mpu.get_tensor_model_parallel_group}
        rows, row = (1, 0) if cut == WHOLE else (group[cut]().size(), group[cut]().rank())
        mine = unit.of(cut, row)
        size = sum(torch.Size(piece.shape).numel() for piece in mine)
        buffer = torch.empty(rows, size, dtype=self._like.dtype, device=self._like.device)
        if self._caller is not None:
            buffer.record_stream(self._caller)
        own = buffer[row]
        if self._layout.pp_rank == unit.owner:
            torch._foreach_copy_([piece.shard(own) for piece in mine], [self._shard(piece) for piece in mine])
        if self._layout.pp > 1:
            stages = mpu.get_pipeline_model_parallel_group()
            dist.broadcast(own, dist.get_global_rank(stages, unit.owner), group=stages)
        if rows > 1:
            dist.all_gather_into_tensor(buffer.view(-1), own, group=group[cut]())
        return buffer
