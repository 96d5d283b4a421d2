"""Both passes over made-up tokens before the first step, so that its time is a step's and not a compiler's."""

from __future__ import annotations

import time

import numpy as np
import torch

from megatron_dypo.batching.micro_batch import MicroBatch
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import SequenceTerms
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
    layout, longest = policy.layout, policy.shape.max_position
    batches = [
        MicroBatch.pack([_made_up(min(length, longest), policy.shape.vocab_size)], [0], 1.0, **layout.packing)
        for length in _LENGTHS
        for _ in range(layout.micro_batch_multiple)
    ]
    correction = Correction(config.rollout.correction, config.rollout.correction_cap)
    policy.logprobs(batches)
    streams = [
        TokenStreams.of(
            [SequenceTerms(sft=1.0)], batch.counts, device=device(), objective=config.objective, correction=correction
        )
        for batch in batches
    ]
    policy.accumulate(batches, streams)
    policy.routing_metrics()  # taken, or the first step would find them
    policy.zero_gradients()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _made_up(length: int, vocabulary: int) -> Sequence:
    ids = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.int32)
    return Sequence(ids, length // 4, Kind.TEACHER, 0, 0)
