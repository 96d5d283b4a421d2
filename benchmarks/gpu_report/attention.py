"""Measure the policy's attention backends on one pack of sequences: their errors and speed.

Errors are relative to float64 attention with all scores, on a short pack. Legend: T packed tokens, A heads, G key/value
heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu_report.results import Record
from benchmarks.gpu_report.workload import seconds_of
from megatron_dypo.policy.attention import Segments, flash, sdpa
from megatron_dypo.policy.flash_kernels import use_best_flash_kernel
from megatron_dypo.runtime.distributed import device

SHORT = (700, 1, 799)  # lengths of the pack for errors
LIMITS = {torch.bfloat16: (0.02, 0.01), torch.float32: (1e-5, 1e-5)}  # of a value; of a gradient's norm
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """Lengths of the timed pack; heads, key/value heads and their width."""

    lengths: tuple[int, ...]
    heads: int
    groups: int
    width: int


CASE = Case((8192, 4096, 2048, 1024, 512, 512), 32, 8, 128)  # Qwen3-4B's heads, a micro-batch of 16,384 tokens
TINY = Case((32, 16), 4, 2, 32)


def inputs(case: Case, lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Segments]:
    """Return (query [T, A, D], key and value [T, G, D], the value strided as in mcore's split), and the gradient."""
    draw, tokens = torch.Generator(device()).manual_seed(0), sum(lengths)

    def make(*size: int) -> Tensor:
        return torch.randn(tokens, *size, generator=draw, device=device(), dtype=torch.float32).to(dtype)

    key_value = make(case.groups, 3, case.width)
    leaves = [make(case.heads, case.width), key_value[:, :, 0].contiguous(), key_value[:, :, 1]]
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return [x.requires_grad_() for x in leaves], make(case.heads * case.width), Segments(offsets, device())


def definition(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Compute causal softmax attention within each sequence, with all scores."""
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    outputs = []
    for block in segments.blocks:
        rows = slice(block.query, block.query + block.queries)
        scores_ATT = torch.einsum("qad,kad->aqk", query[rows], key[rows]) * scale
        future_TT = torch.ones(block.queries, block.queries, dtype=torch.bool, device=query.device).triu(1)
        weights_ATT = scores_ATT.masked_fill(future_TT, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("aqk,kad->qad", weights_ATT, value[rows]).flatten(1))
    return torch.cat(outputs)


def both_passes(attend: Callable, leaves: list[Tensor], flow: Tensor, segments: Segments) -> list[Tensor]:
    """Return output and gradients."""
    out = attend(*leaves, segments, leaves[0].shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, leaves, flow)]


def attention(record: Record) -> None:
    """Measure torch's own flash attention, then the installed one that policies use instead, if any."""
    cuda = torch.cuda.is_available()
    dtype, case = torch.bfloat16 if cuda else torch.float32, TINY if record.tiny else CASE
    spent = {"SDPA": _measured(record, "SDPA", sdpa, case, dtype)}
    if cuda:
        spent["FA2"] = _measured(record, "FA2", flash, case, dtype)
        best = use_best_flash_kernel(case.heads, case.groups, case.width)
        record.figure("kernel", best, "", "flash attention that policies use")
        if best not in spent:
            spent[best] = _measured(record, best, flash, case, dtype)
    else:
        record.note("Flash attention needs CUDA: SDPA alone has run.")
    shape = f"{len(case.lengths)} sequences, {sum(case.lengths):,} tokens, {case.heads} heads of {case.width}, "
    shape += f"{case.groups} key/value heads, {str(dtype).removeprefix('torch.')}"
    flops = 3.5 * 4 * sum(n * n / 2 for n in case.lengths) * case.heads * case.width  # causal: half of all scores
    rows = [
        [
            name,
            f"{1000 * ahead:.3g}",
            f"{1000 * both:.3g}",
            f"{flops / both / 1e12:.3g}",
            f"{spent['SDPA'][1] / both:.2f}",
        ]
        for name, (ahead, both) in spent.items()
    ]
    record.table(shape, ["", "forward, ms", "forward and backward, ms", "TFLOP/s", "speed, of SDPA's"], rows)


def _measured(record: Record, name: str, attend: Callable, case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Return seconds of the forward pass, and of both passes; record the errors."""
    _errors(record, name, attend, case, dtype)
    leaves, flow, segments = inputs(case, case.lengths, dtype)
    runs = (
        lambda: attend(*leaves, segments, case.width**-0.5),
        lambda: both_passes(attend, leaves, flow, segments),
    )
    for run in runs:
        run()
    ahead, both = (median(seconds_of(run) for _ in range(REPEATS)) for run in runs)
    return ahead, both


def _errors(record: Record, name: str, attend: Callable, case: Case, dtype: torch.dtype) -> None:
    leaves, flow, segments = inputs(case, tuple(min(n, 40) for n in SHORT) if record.tiny else SHORT, dtype)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = both_passes(definition, doubles, flow.double(), segments)
    out, *gradients = both_passes(attend, leaves, flow, segments)
    ahead = (out - expected[0]).abs().max().item()
    pairs = zip(gradients, expected[1:], strict=True)
    back = max(((got - want).norm() / want.norm()).item() for got, want in pairs)
    record.figure(f"{name}/forward_error", ahead, "", f"{name}: largest error of a value")
    record.figure(f"{name}/backward_error", back, "", f"{name}: error of a gradient, of its norm")
    most_ahead, most_back = LIMITS[dtype]
    if not (ahead < most_ahead and back < most_back):
        record.fail(f"{name}: errors {ahead:.2g} and {back:.2g} exceed {most_ahead:g} and {most_back:g}")
