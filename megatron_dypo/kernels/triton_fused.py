"""The head on CUDA in bf16: the matrix product of the logits and their statistics in one Triton kernel.

The logits stay in registers. A program takes a block of tokens and one part of a tile of the vocabulary, column block
by column block; the parts of a tile are joined in order. A row's bits depend on nothing but its hidden state and the
tile: neither on the tensor-parallel size, nor on its place in the pack, nor on the run.

Where gradients will be formed, exp(z - the largest z of the row so far) is kept in the precision of the inputs, and
that largest z in fp32. At the target, where p may be near 1, the gradient is formed from the log-prob.

Legend as in ``flow.py``; s parts of a tile, q quarters of column blocks of a tile. Kernels scale by 1 / temperature
late: their z, top and sums of z exp are of the unscaled logits.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_dypo.kernels import flow
from megatron_dypo.kernels.triton_rows import RowHead
from megatron_dypo.kernels.vocab import STATISTICS

BLOCK_T, BLOCK_V, BLOCK_H = 128, 128, 64
# 96 KiB of shared memory, too: two programs a multiprocessor, one multiplies while the other reduces
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
PART = 16 * BLOCK_V  # columns of a part of a tile
GROUP = 16  # blocks of tokens that run side by side: with as many parts they share what lies in the L2 cache
CHUNK = 64 << 10  # where nothing is kept
KEPT_CHUNK, KEPT_ELEMENTS = 8192, 512 << 20  # 1 GiB in bf16
GRADIENT_ROWS = 16
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _halves(z):
    """The left and the right half of the columns; in registers, they stay where they are."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _absorb(z, column, stop, scale, target, state, exp_ptr, exp_pitch, top_ptr, top_pitch, KEEP: tl.constexpr):
    """The statistics with those of some more columns z [t, q]; with KEEP stores exp(z - top) and that top."""
    top, total, weighted, z_target = state
    columns = column + tl.arange(0, z.shape[1])
    z = tl.where((columns < stop)[None, :], z, -1e30)  # exp makes it 0; finite, for z exp must be 0, too
    higher = tl.maximum(top, tl.max(z, 1))
    exp = tl.exp2((z - higher[:, None]) * scale[:, None])
    shrink = tl.exp2((top - higher) * scale)
    total = total * shrink + tl.sum(exp, 1)
    weighted = weighted * shrink + tl.sum(z * exp, 1)
    z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    if KEEP:  # there is room for whole blocks
        t, v = tl.arange(0, z.shape[0]), tl.arange(0, z.shape[1])
        tl.store(exp_ptr + column + (t[:, None] * exp_pitch + v[None, :]), exp.to(exp_ptr.dtype.element_ty))
        tl.store(top_ptr + column // z.shape[1] * top_pitch + t, higher)
    return higher, total, weighted, z_target


@triton.jit(do_not_specialize=["tokens", "parts", "width", "real", "start"])
def fused_statistics_kernel(
    hidden_desc, weight_desc, target_ptr, scale_ptr, partial_ptr, exp_ptr, top_ptr,
    tokens, H, parts, width, real, start, exp_tile, exp_pitch, top_pitch,
    KEEP: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Statistics [program, 4, BLOCK_T] of hidden [t, H] @ weight [V, H].T; columns from ``real`` on are padding.

    A program has one block of tokens and one of all K s parts. With KEEP also exp [K, t, pitch] and top [K, q, t].
    """
    # programs of GROUP blocks of tokens run side by side, part after part: ``join_kernel`` has the inverse
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_T)
    all_parts = tl.num_programs(0) // blocks
    first = program // (GROUP * all_parts) * GROUP
    members = min(blocks - first, GROUP)
    within = program % (GROUP * all_parts)
    part = within // members
    tile = part // parts
    first_row = (first + within % members) * BLOCK_T
    first_column = tile * width
    begin = part % parts * PART  # within the tile
    stop = min(min(begin + PART, width), real - first_column)

    t = tl.arange(0, BLOCK_T)
    read = first_row + tl.minimum(t, tokens - first_row - 1)
    target = tl.load(target_ptr + read) - start - first_column
    target = tl.where(target < stop, target, -1).to(tl.int32)  # the next tile's is not this one's padding
    scale = tl.load(scale_ptr + read) * LOG2_E
    exp_ptr += tile.to(tl.int64) * exp_tile + first_row.to(tl.int64) * exp_pitch
    top_ptr += tile.to(tl.int64) * (exp_pitch // BLOCK_V * 4) * top_pitch + first_row
    zeros = tl.zeros((BLOCK_T,), tl.float32)
    state = (tl.full((BLOCK_T,), float("-inf"), tl.float32), zeros, zeros, zeros)
    Q: tl.constexpr = BLOCK_V // 4
    for column in range(begin, stop, BLOCK_V):
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            x = hidden_desc.load([first_row, k])
            w = weight_desc.load([first_column + column, k])
            z = tl.dot(x, w.T, z, input_precision="ieee")
        # one quarter of the columns after the other needs registers for exp of a quarter
        left, right = _halves(z)
        z0, z1 = _halves(left)
        z2, z3 = _halves(right)
        state = _absorb(z0, column, stop, scale, target, state, exp_ptr, exp_pitch, top_ptr, top_pitch, KEEP)
        state = _absorb(z1, column + Q, stop, scale, target, state, exp_ptr, exp_pitch, top_ptr, top_pitch, KEEP)
        state = _absorb(z2, column + 2 * Q, stop, scale, target, state, exp_ptr, exp_pitch, top_ptr, top_pitch, KEEP)
        state = _absorb(z3, column + 3 * Q, stop, scale, target, state, exp_ptr, exp_pitch, top_ptr, top_pitch, KEEP)
    top, total, weighted, z_target = state
    partial_ptrs = partial_ptr + program.to(tl.int64) * 4 * BLOCK_T + t
    tl.store(partial_ptrs, top)
    tl.store(partial_ptrs + BLOCK_T, total)
    tl.store(partial_ptrs + 2 * BLOCK_T, weighted)
    tl.store(partial_ptrs + 3 * BLOCK_T, z_target)


@triton.jit(do_not_specialize=["tokens", "parts"])
def join_kernel(partial_ptr, scale_ptr, stats_ptr, tokens, parts, GROUP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Scaled statistics [K, 4, t] of the tiles from those of their parts, joined from first to last."""
    block, tile = tl.program_id(0), tl.program_id(1)
    first = block // GROUP * GROUP
    members = min(tl.num_programs(0) - first, GROUP)
    program = first * tl.num_programs(1) * parts + tile * parts * members + block - first
    t = tl.arange(0, BLOCK_T)
    rows = block * BLOCK_T + t
    scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=1.0)
    partial_ptrs = partial_ptr + program.to(tl.int64) * 4 * BLOCK_T + t
    top = tl.full((BLOCK_T,), -1e30, tl.float32)  # finite: a tile without columns joins others
    total = tl.zeros((BLOCK_T,), tl.float32)
    weighted = tl.zeros((BLOCK_T,), tl.float32)
    z_target = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(parts):
        highest = tl.load(partial_ptrs)
        higher = tl.maximum(top, highest)
        shrink, share = tl.exp2((top - higher) * scale * LOG2_E), tl.exp2((highest - higher) * scale * LOG2_E)
        total = total * shrink + tl.load(partial_ptrs + BLOCK_T) * share
        weighted = weighted * shrink + tl.load(partial_ptrs + 2 * BLOCK_T) * share
        z_target += tl.load(partial_ptrs + 3 * BLOCK_T)
        top = higher
        partial_ptrs += members * 4 * BLOCK_T
    stats_ptrs = stats_ptr + tile.to(tl.int64) * 4 * tokens + rows
    tl.store(stats_ptrs, top * scale, mask=rows < tokens)
    tl.store(stats_ptrs + tokens, total, mask=rows < tokens)
    tl.store(stats_ptrs + 2 * tokens, weighted * scale, mask=rows < tokens)
    tl.store(stats_ptrs + 3 * tokens, z_target * scale, mask=rows < tokens)


@triton.jit(do_not_specialize=["active", "start"])
def kept_gradient_kernel(
    exp_ptr, top_ptr, rows_ptr, target_ptr, scale_ptr, logp_ptr, lse_ptr, slope_ptr, dz_ptr,
    active, pitch, top_pitch, start, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz [a, v] = slope (onehot - p) of one tile, of its rows ``rows`` [a], from the kept exp [t, v] and top [q, t]."""
    i = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    row = tl.load(rows_ptr + i, mask=i < active, other=0)[:, None, None]
    block = tl.program_id(1).to(tl.int64)
    quarter = tl.arange(0, 4)[None, :, None]
    columns = block * BLOCK_V + quarter * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)[None, None, :]
    exp = tl.load(exp_ptr + row * pitch + columns).to(tl.float32)
    slope = tl.load(slope_ptr + row)
    top = tl.load(top_ptr + (block * 4 + quarter) * top_pitch + row) * tl.load(scale_ptr + row)
    p = exp * tl.exp(top - tl.load(lse_ptr + row))
    at_target = columns == tl.load(target_ptr + row) - start
    dz = tl.where(at_target, slope * (1.0 - tl.exp(tl.load(logp_ptr + row))), -slope * p)
    dz_ptrs = dz_ptr + i.to(tl.int64)[:, None, None] * pitch + columns
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=(i < active)[:, None, None])


class FusedHead(RowHead):
    """Keeps exp(z) of a chunk in the inputs' precision, at most KEPT_ELEMENTS numbers, or nothing."""

    @staticmethod
    def takes(hidden: Tensor, weight: Tensor) -> bool:
        """Whether the copy engine can address both: rows and starts at multiples of 16 bytes."""
        rows = all(x.shape[1] * x.element_size() % 16 == 0 and x.is_contiguous() for x in (hidden, weight))
        return rows and hidden.data_ptr() % 16 == weight.data_ptr() % 16 == 0

    def chunk_length(self) -> int:
        if not self.keep:
            return CHUNK
        kept = KEPT_ELEMENTS // (self.shard.tile_width * len(self.shard.tiles))
        return max(BLOCK_T, min(KEPT_CHUNK, kept // BLOCK_T * BLOCK_T))

    @functools.cached_property
    def _exp_Ktv(self) -> Tensor:
        return self._dz_tv.new_empty(len(self.shard.tiles), self._whole_blocks, self.pitch)

    @functools.cached_property
    def _top_Kqt(self) -> Tensor:
        return self.scale_T.new_empty(len(self.shard.tiles), self.pitch // BLOCK_V * 4, self._whole_blocks)

    @property
    def _whole_blocks(self) -> int:
        """Rows of what is kept."""
        return triton.cdiv(self.longest, BLOCK_T) * BLOCK_T

    def statistics(self, chunk: slice) -> Tensor:
        hidden_tH, scale_t, shard = self.hidden_TH[chunk], self.scale_T[chunk], self.shard
        (tokens, H), tiles, blocks = hidden_tH.shape, len(shard.tiles), triton.cdiv(chunk.stop - chunk.start, BLOCK_T)
        parts = triton.cdiv(shard.tile_width, PART)
        partial = scale_t.new_empty(blocks * tiles * parts, STATISTICS, BLOCK_T)
        exp_Ktv, top_Kqt = (self._exp_Ktv, self._top_Kqt) if self.keep else (hidden_tH, partial)  # or else unused
        fused_statistics_kernel[(len(partial),)](
            TensorDescriptor.from_tensor(hidden_tH, [BLOCK_T, BLOCK_H]),
            TensorDescriptor.from_tensor(self.weight_VH.detach(), [BLOCK_V, BLOCK_H]),
            self.targets_T[chunk], scale_t, partial, exp_Ktv, top_Kqt,
            tokens, H, parts, shard.tile_width, shard.tiles[-1].stop, shard.start,
            self._whole_blocks * self.pitch, self.pitch, self._whole_blocks,
            KEEP=self.keep, GROUP=GROUP, PART=PART, BLOCK_T=BLOCK_T, BLOCK_V=BLOCK_V, BLOCK_H=BLOCK_H, **OPTIONS,
        )  # fmt: skip
        stats_K4t = scale_t.new_empty(tiles, STATISTICS, tokens)
        join_kernel[(blocks, tiles)](partial, scale_t, stats_K4t, tokens, parts, GROUP=GROUP, BLOCK_T=BLOCK_T)
        return stats_K4t

    def formed(
        self, chunk: slice, a: Tensor, stats_K4t: Tensor, logp_t: Tensor, lse_t: Tensor, slope_t: Tensor
    ) -> flow.Tiles:
        slope_t = slope_t.contiguous()
        for k, tile in self.tiles():
            dz_av = self._dz_tv[: len(a), : tile.stop - tile.start]
            kept_gradient_kernel[(triton.cdiv(len(a), GRADIENT_ROWS), triton.cdiv(dz_av.shape[1], BLOCK_V))](
                self._exp_Ktv[k], self._top_Kqt[k], a, self.targets_T[chunk], self.scale_T[chunk],
                logp_t, lse_t, slope_t, dz_av, len(a), self.pitch, self._whole_blocks, self.shard.start + tile.start,
                BLOCK_A=GRADIENT_ROWS, BLOCK_V=BLOCK_V,
            )  # fmt: skip
            yield tile, dz_av, None
