"""Both passes over made-up tokens before the first step, so that its time is a step's and not a compiler's."""

from __future__ import annotations

import itertools
import time

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.batching.micro_batch import MicroBatch
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import SequenceTerms, needs_reference
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind, Sequence
from megatron_dypo.runtime.distributed import device

_LENGTHS = 96, 160  # tokens: torch compiles for the first one's size, and for any size at the second


def warm_up(policy: Policy, config: Config) -> float:
    """Run them and forget all of it: no weight, gradient or version changes. Returns its seconds. Collective.

    Beside torch's compilations it pays for the Triton kernels', and for the first use of libraries and process groups.
    """
    began = time.monotonic()
    layout, longest, vocabulary = policy.layout, policy.shape.max_position, policy.shape.vocab_size
    kinds = [kind for kind in Kind for _ in range(len(_LENGTHS) * layout.micro_batch_multiple)]
    batches = [
        MicroBatch.pack([_made_up(kind, min(length, longest), vocabulary)], [0], 1.0, **layout.packing)
        for kind, length in zip(kinds, itertools.cycle(_LENGTHS), strict=False)
    ]
    logp = policy.logprobs(batches) or [None] * len(batches)  # of the last pipeline stage, where the loss is
    policy.accumulate(batches, [_streams(*each, config) for each in zip(batches, kinds, logp, strict=True)])
    policy.routing_metrics()  # taken, or the first step would find them
    policy.zero_gradients()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _made_up(kind: Kind, length: int, vocabulary: int) -> Sequence:
    ids = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.int32)
    return Sequence(ids, length // 4, kind, 0, 0)


def _streams(batch: MicroBatch, kind: Kind, logp_N: Tensor | None, config: Config) -> TokenStreams:
    """What a micro-batch's loss reads, of either kind of sequence."""
    known = {"old_N": logp_N, "rollout_N": logp_N} if kind == Kind.ROLLOUT else {}
    if known and needs_reference(config.objective):
        known["reference_N"] = logp_N
    return TokenStreams.of(
        [SequenceTerms(advantage=1.0, grpo=1.0) if known else SequenceTerms(sft=1.0)],
        batch.counts,
        device=device(),
        objective=config.objective,
        correction=Correction(config.rollout.correction, config.rollout.correction_cap),
        **known,
    )
