"""The head on CUDA in bf16: the logits' matrix product and their statistics in one Triton kernel.

The logits stay in registers. A program takes a block of tokens and one part of a tile of the vocabulary, one block of
columns after another; the parts of a tile are joined in order. A row's bits depend only on its hidden state and the
tile: not on the tensor-parallel size, its place in the pack, or the run.

exp z is taken directly, without a maximum: fp32 holds it for |z| up to 87, and so does bf16, to 8 bits at any size.
Rows whose sums come near that are far; programs with such rows run again and take a maximum, without the host's help.

If gradients follow, exp z is the only thing kept, in the precision of the inputs: dz is exp z times a factor of its
row, which is left to the products' rows, and an entry at the target, formed from the log-prob. A gradient of the
entropy needs one more kernel, which reads and writes exp z (``exponentials.py``).

Legend as in ``autograd.py``; s parts of a tile, q columns of a quarter of a block, n rows that are far. Kernels scale
by 1 / temperature late: their z, top and sums of z exp are of the unscaled logits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_dypo.kernels import autograd, exponentials, workspace
from megatron_dypo.kernels.triton_rows import RowHead
from megatron_dypo.kernels.vocab import STATISTICS, put_at_targets, target_columns

BLOCK_H = 64
# 96 KiB of shared memory as well: with two programs per multiprocessor, one multiplies while the other reduces
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
GROUP = 16  # blocks of tokens that run concurrently: with as many parts they share the contents of the L2 cache
FAR = 60.0  # |lse| up to which exp z, slopes times its inverse, and products with either stay well within bf16 and fp32
FAR_ROWS = 256
GRADIENT_BLOCK = 2048  # columns
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _halves(z):
    """Return the left and right halves of the columns; they stay in place in registers."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _absorb(z, column, stop, scale, target, state, exp_ptr, exp_pitch, ONLINE: tl.constexpr, KEEP: tl.constexpr):
    """Update the statistics with more columns z [t, q]; with KEEP also store exp z."""
    top, others, weighted, z_target = state
    v = tl.arange(0, z.shape[1])
    at_target = v[None, :] == (target - column)[:, None]
    z_target += tl.sum(tl.where(at_target, z, 0.0), 1)
    z = tl.where((v < stop - column)[None, :], z, -1e30)  # exp makes it 0; finite, because z exp must be 0, too
    if ONLINE:
        higher = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp2((top - higher) * scale)
        others, weighted, top = others * shrink, weighted * shrink, higher
    z = tl.where(at_target, -1e30, z)
    exp = tl.exp2((z - top[:, None] if ONLINE else z) * scale[:, None])
    if KEEP:  # the buffer has room for whole blocks
        t = tl.arange(0, z.shape[0])
        tl.store(exp_ptr + column + (t[:, None] * exp_pitch + v[None, :]), exp.to(exp_ptr.dtype.element_ty))
    return top, others + tl.sum(exp, 1), weighted + tl.sum(z * exp, 1), z_target


@triton.jit(do_not_specialize=["tokens", "parts", "group", "width", "real", "start"])
def fused_statistics_kernel(
    hidden_desc, weight_desc, target_ptr, scale_ptr, partial_ptr, far_ptr, exp_ptr,
    tokens, H, parts, group, width, real, start, exp_tile, exp_pitch,
    ONLINE: tl.constexpr, KEEP: tl.constexpr, PART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Statistics [program, 4, BLOCK_T] of hidden [t, H] @ weight [V, H].T; columns from ``real`` on are padding.

    A program has one block of tokens and one of all K s parts. KEEP also stores exp z of tile k, token t, column v at k
    exp_tile + t exp_pitch + v. ONLINE programs use the largest z as their top, and return at once unless one of their
    rows is far [K, t].
    """
    # programs of ``group`` blocks of tokens run concurrently, part after part; ``join_kernel`` inverts this order
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_T)
    all_parts = tl.num_programs(0) // blocks
    first = program // (group * all_parts) * group
    members = min(blocks - first, group)
    within = program % (group * all_parts)
    part = within // members
    tile = part // parts
    first_row = (first + within % members) * BLOCK_T
    first_column = tile * width
    begin = part % parts * PART  # in the tile
    stop = min(min(begin + PART, width), real - first_column)

    t = tl.arange(0, BLOCK_T)
    read = first_row + tl.minimum(t, tokens - first_row - 1)
    if ONLINE and tl.max(tl.load(far_ptr + tile.to(tl.int64) * tokens + read), 0) == 0:
        return
    exp_ptr += tile.to(tl.int64) * exp_tile + first_row.to(tl.int64) * exp_pitch
    partial_ptrs = partial_ptr + program.to(tl.int64) * 4 * BLOCK_T + t
    zeros = tl.zeros((BLOCK_T,), tl.float32)
    tl.store(partial_ptrs, zeros + tl.where(begin < stop, 0.0, -1e30))  # a part without columns takes any other's top
    state = (zeros + float("-inf"), zeros, zeros, zeros)
    Q: tl.constexpr = BLOCK_V // 4
    for column in range(begin, stop, BLOCK_V):
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            x = hidden_desc.load([first_row, k])
            w = weight_desc.load([first_column + column, k])
            z = tl.dot(x, w.T, z, input_precision="ieee")
        target = tl.load(target_ptr + read) - start - first_column
        target = tl.where(target < stop, target, -1).to(tl.int32)  # the next tile's target is not in this one's padding
        scale = tl.load(scale_ptr + read) * LOG2_E
        # one quarter of the columns at a time, so that registers hold exp of a quarter only
        left, right = _halves(z)
        z0, z1 = _halves(left)
        z2, z3 = _halves(right)
        state = _absorb(z0, column, stop, scale, target, state, exp_ptr, exp_pitch, ONLINE, KEEP)
        state = _absorb(z1, column + Q, stop, scale, target, state, exp_ptr, exp_pitch, ONLINE, KEEP)
        state = _absorb(z2, column + 2 * Q, stop, scale, target, state, exp_ptr, exp_pitch, ONLINE, KEEP)
        state = _absorb(z3, column + 3 * Q, stop, scale, target, state, exp_ptr, exp_pitch, ONLINE, KEEP)
    top, others, weighted, z_target = state
    if ONLINE:
        tl.store(partial_ptrs, top)
    tl.store(partial_ptrs + BLOCK_T, others)
    tl.store(partial_ptrs + 2 * BLOCK_T, weighted)
    tl.store(partial_ptrs + 3 * BLOCK_T, z_target)


@triton.jit(do_not_specialize=["tokens", "parts", "group", "width", "real", "start"])
def join_kernel(
    partial_ptr, target_ptr, scale_ptr, far_ptr, stats_ptr, tokens, parts, group, width, real, start,
    ONLINE: tl.constexpr, FAR: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Join the statistics of the parts, first to last, into scaled statistics [K, 4, t] of the tiles.

    Marks far rows [K, t]: those whose sum of all exp z is near the limits of fp32. ONLINE writes only those.
    """
    block, tile = tl.program_id(0), tl.program_id(1)
    first = block // group * group
    members = min(tl.num_programs(0) - first, group)
    program = first * tl.num_programs(1) * parts + tile * parts * members + block - first
    t = tl.arange(0, BLOCK_T)
    rows = block * BLOCK_T + t
    written = rows < tokens
    far_ptrs = far_ptr + tile.to(tl.int64) * tokens + rows
    if ONLINE:
        written &= tl.load(far_ptrs, mask=written, other=0) != 0
        if tl.max(written.to(tl.int32), 0) == 0:
            return
    scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=1.0)
    partial_ptrs = partial_ptr + program.to(tl.int64) * 4 * BLOCK_T + t
    top = tl.full((BLOCK_T,), -1e30, tl.float32)  # finite: a tile without columns joins others
    others = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    z_target = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(parts):
        highest = tl.load(partial_ptrs)
        higher = tl.maximum(top, highest)
        shrink, share = tl.exp2((top - higher) * scale * LOG2_E), tl.exp2((highest - higher) * scale * LOG2_E)
        others = others * shrink + tl.load(partial_ptrs + BLOCK_T) * share
        weighted = weighted * shrink + tl.load(partial_ptrs + 2 * BLOCK_T) * share
        z_target += tl.load(partial_ptrs + 3 * BLOCK_T)
        top = higher
        partial_ptrs += members * 4 * BLOCK_T
    stats_ptrs = stats_ptr + tile.to(tl.int64) * 4 * tokens + rows
    tl.store(stats_ptrs, top * scale, mask=written)
    tl.store(stats_ptrs + tokens, others, mask=written)
    tl.store(stats_ptrs + 2 * tokens, weighted * scale, mask=written)
    tl.store(stats_ptrs + 3 * tokens, z_target * scale, mask=written)
    if not ONLINE:
        columns = min(width, real - tile * width)
        column = tl.load(target_ptr + rows, mask=written, other=0) - start - tile * width
        own = tl.where((column >= 0) & (column < columns), tl.exp2(z_target * scale * LOG2_E), 0.0)
        log2 = tl.log2(others + own)
        near = (log2 > -FAR * LOG2_E) & (log2 < FAR * LOG2_E)  # false for not-a-number
        tl.store(far_ptrs, ((columns > 0) & ~near).to(tl.int32), mask=written)


@triton.jit
def log_factor_kernel(exp_ptr, slope_ptr, dentropy_ptr, pitch, BLOCK: tl.constexpr):
    """Replace the stored exponentials x [a, v] by x (slope + dentropy log x), in fp32; 0 log 0 is 0."""
    i = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exp_ptrs = exp_ptr + i * pitch + columns
    x = tl.load(exp_ptrs, mask=columns < pitch, other=0.0).to(tl.float32)
    factor = tl.load(slope_ptr + i) + tl.load(dentropy_ptr + i) * tl.log(tl.maximum(x, 1e-37))
    tl.store(exp_ptrs, (x * factor).to(exp_ptr.dtype.element_ty), mask=columns < pitch)


class FusedHead(RowHead):
    """Keeps exp z of a chunk in the inputs' precision (size in ``workspace.py``), or nothing."""

    @staticmethod
    def takes(hidden: Tensor, weight: Tensor) -> bool:
        """Return whether the copy engine can address both: rows and starts are multiples of 16 bytes."""
        rows = all(x.shape[1] * x.element_size() % 16 == 0 and x.is_contiguous() for x in (hidden, weight))
        return rows and hidden.data_ptr() % 16 == weight.data_ptr() % 16 == 0

    def chunk_length(self) -> int:
        if not self.keep:
            return workspace.FUSED_CHUNK
        shard, item = self.shard, self.weight_VH.element_size()
        return workspace.kept_chunk(self.targets_T.shape[0], shard.tile_width, len(shard.tiles), item)

    @property
    def _whole(self) -> bool:
        """Return whether exp of all tiles is contiguous, in the weight's order, so that one product covers them all."""
        return self.pitch == self.shard.tile_width

    @functools.cached_property
    def _exp_Ktv(self) -> Tensor:
        tiles, rows = len(self.shard.tiles), triton.cdiv(self.longest, workspace.BLOCK_T) * workspace.BLOCK_T
        exp = self.weight_VH.new_empty(rows * tiles * self.pitch)
        if self._whole:
            return exp.view(rows, tiles, self.pitch).transpose(0, 1)
        return exp.view(tiles, rows, self.pitch)

    def statistics(self, chunk: slice) -> Tensor:
        hidden_tH, scale_t, shard = self.hidden_TH[chunk], self.scale_T[chunk], self.shard
        block = workspace.BLOCK_T
        (tokens, H), tiles, blocks = hidden_tH.shape, len(shard.tiles), triton.cdiv(chunk.stop - chunk.start, block)
        parts, group = triton.cdiv(shard.tile_width, workspace.PART), triton.cdiv(blocks, triton.cdiv(blocks, GROUP))
        partial = scale_t.new_empty(blocks * tiles * parts, STATISTICS, block)
        far_Kt = self.targets_T.new_empty(tiles, tokens, dtype=torch.int32)
        stats_K4t = scale_t.new_empty(tiles, STATISTICS, tokens)
        for online in (False, True):  # the second pass is for far rows, if any
            keep = self.keep and not online
            exp_Ktv = self._exp_Ktv if keep else partial  # otherwise unused
            fused_statistics_kernel[(len(partial),)](
                TensorDescriptor.from_tensor(hidden_tH, [block, BLOCK_H]),
                TensorDescriptor.from_tensor(self.weight_VH.detach(), [workspace.BLOCK_V, BLOCK_H]),
                self.targets_T[chunk], scale_t, partial, far_Kt, exp_Ktv,
                tokens, H, parts, group, shard.tile_width, shard.tiles[-1].stop, shard.start, *exp_Ktv.stride()[:2],
                ONLINE=online, KEEP=keep, PART=workspace.PART,
                BLOCK_T=block, BLOCK_V=workspace.BLOCK_V, BLOCK_H=BLOCK_H, **OPTIONS,
            )  # fmt: skip
            join_kernel[(blocks, tiles)](
                partial, self.targets_T[chunk], scale_t, far_Kt, stats_K4t, tokens, parts, group,
                shard.tile_width, shard.tiles[-1].stop, shard.start, ONLINE=online, FAR=FAR, BLOCK_T=block,
            )  # fmt: skip
        return stats_K4t

    def order(self, active_t: Tensor) -> Tensor:
        return exponentials.few_moved(active_t)

    def fused_backward(
        self,
        chunk: slice,
        a: Tensor,
        stats_K4t: Tensor,
        upstream: tuple[Tensor, Tensor | None],
        results: tuple[Tensor, Tensor, Tensor],
    ) -> autograd.Tiles:
        """Yield dz computed from exp z (see ``exponentials.py``); far rows become p itself."""
        lse_t = results[-1]
        top_Kt, tokens = stats_K4t[: len(list(self.tiles())), 0], len(lse_t)  # non-empty tiles come first
        far_t = (lse_t.abs() > FAR) | (top_Kt != 0).any(0)
        if bool(far_t.any()):
            self._make_probabilities(chunk, far_t.nonzero().flatten(), lse_t)
        by_row, targets_a = exponentials.factors(a, far_t, upstream, results), self.targets_T[chunk][a]
        for columns, exp_tv in self._kept(tokens):
            exp_av = exponentials.moved_to_front(exp_tv, a, [(0, slice(None))])
            if by_row.of_log is not None:
                blocks = triton.cdiv(exp_av.shape[1], GRADIENT_BLOCK)
                log_factor_kernel[(len(a), blocks)](exp_av, *by_row.of_log, exp_av.stride(0), BLOCK=GRADIENT_BLOCK)
            put_at_targets(exp_av, by_row.at_target, *target_columns(targets_a, self.shard, columns))
            yield columns, exp_av, by_row.scale

    def _kept(self, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, exp [t, v]) for each product."""
        if self._whole and self.shard.real.stop:
            exp_tV = self._exp_Ktv.transpose(0, 1).flatten(1)
            yield self.shard.real, exp_tV[:tokens, self.shard.real]
        elif not self._whole:
            for k, tile in self.tiles():
                yield tile, self._exp_Ktv[k, :tokens, : tile.stop - tile.start]

    def _make_probabilities(self, chunk: slice, far: Tensor, lse_t: Tensor) -> None:
        """Replace exp z by p in the rows ``far``, whose exp z is near the limits of fp32; rare, so a few at a time."""
        for rows in far.split(FAR_ROWS):
            hidden_nH, scale_n1 = self.hidden_TH[chunk][rows], self.scale_T[chunk][rows].unsqueeze(1)
            hidden_nH = hidden_nH if self.native else hidden_nH.to(self.dtype)
            for k, tile in self.tiles():
                z_nv = self.scale_T.new_empty(len(rows), tile.stop - tile.start)
                autograd.multiply(hidden_nH, self.weight(tile).t(), z_nv)
                p_nv = z_nv.mul_(scale_n1).sub_(lse_t[rows].unsqueeze(1)).exp_()
                self._exp_Ktv[k, :, : tile.stop - tile.start].index_copy_(0, rows, p_nv.to(self.weight_VH.dtype))
