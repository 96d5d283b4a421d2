"""The head on CUDA: which Triton kernels handle which precision. Needs triton; imported on first use."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from triton import knobs

from megatron_dypo.kernels import autograd
from megatron_dypo.kernels.chunked import ChunkedHead
from megatron_dypo.kernels.triton_fused import FusedHead
from megatron_dypo.kernels.triton_rows import RowHead
from megatron_dypo.kernels.vocab import VocabShard

# The head of the forward pass, and the one that recomputes logits in a backward pass. Both functions use the same
# heads: the ratio of a training pass to its old pass is then exactly 1.
HEADS = {
    torch.bfloat16: (FusedHead, RowHead),
    torch.float16: (RowHead, RowHead),
    torch.float32: (RowHead, RowHead),
    torch.float64: (ChunkedHead, ChunkedHead),
}


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads = _heads(hidden, weight)
    with _on_device_of(hidden):
        return autograd.LogProb.apply(heads, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    forms, _ = _heads(hidden, weight)
    arguments = (hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy)
    with _on_device_of(hidden):
        return autograd.Loss.apply(forms, *arguments, torch.is_grad_enabled())  # inside a Function it is always False


def _heads(hidden: Tensor, weight: Tensor) -> tuple[type[autograd.LogitHead], type[autograd.LogitHead]]:
    forms, recomputes = HEADS[hidden.dtype]
    if forms is FusedHead and not FusedHead.takes(hidden, weight):
        forms = RowHead
    return forms, recomputes


def _on_device_of(hidden: Tensor) -> contextlib.AbstractContextManager:
    """Select the tensors' device: Triton launches on the current one, which may be another."""
    if hidden.is_cuda:
        return torch.cuda.device_of(hidden)
    if not knobs.runtime.interpret:
        raise ValueError(f"backend: 'triton' is for CUDA, not for {hidden.device}")
    return contextlib.nullcontext()
