"""The log-prob passes: old policy and reference over every rollout sequence, each response's sums; and warm-up.

Warm-up runs both passes on made-up tokens before the first step, so that its time excludes compilation.
"""

from __future__ import annotations

import itertools
import time

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.objectives.coefficients import SequenceSums, SequenceTerms, needs_entropies, needs_reference
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.recipes import shares
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind, Sequence
from megatron_dypo.runtime.distributed import all_gather_objects, device
from megatron_dypo.training.diagnostics import bad_batch
from megatron_dypo.training.metrics import mismatch_metrics
from megatron_dypo.training.minibatch import MiniBatch
from megatron_dypo.training.routing import give_routing

PER_TOKEN = ("now", "old", "reference", "rollout")


def logprob_passes(policy: Policy, minibatches: list[MiniBatch], config: Config) -> tuple[dict[str, float], str | None]:
    """Compute old and reference log-probs of every rollout sequence, and their sums on all ranks.

    Returns (``mismatch_metrics``, the prompts with a non-finite reward or log-prob, or None).
    """
    if config.policy.routing_replay == "rollout":
        give_routing(policy, minibatches)
    for minibatch in minibatches:
        minibatch.logp["old"] = current_logprobs(policy, minibatch, config.objective)
        minibatch.logp["rollout"] = [_rollout_stream(minibatch, batch) for batch in minibatch.rollouts]
    if needs_reference(config.objective) and any(minibatch.rollouts for minibatch in minibatches):
        if config.objective.reference == "previous":  # the weights that sampled this rollout
            for minibatch in minibatches:
                minibatch.logp["reference"] = minibatch.logp["old"]
        else:
            with policy.reference_weights():
                for minibatch in minibatches:
                    minibatch.logp["reference"] = policy.logprobs(minibatch.rollouts)
    for minibatch in minibatches:
        minibatch.logp["now"] = minibatch.logp["old"]
        share_sums(policy, minibatch)
    return mismatch_metrics(policy, minibatches, config), bad_batch(minibatches)


def current_logprobs(policy: Policy, minibatch: MiniBatch, objective: Objective) -> list[Tensor]:
    """Return the log-probs [N] of the rollouts' tokens by micro-batch.

    If coefficients read entropies, the traces' pass runs too, and the mini-batch keeps all sequences' entropies.
    """
    if not needs_entropies(objective):
        return policy.logprobs(minibatch.rollouts)
    logp, minibatch.entropy = policy.logprobs_and_entropies(minibatch.batches)
    return logp[: len(minibatch.rollouts)]


def share_sums(policy: Policy, minibatch: MiniBatch) -> None:
    """Give every rank every response's sums (float64) over its tokens: k numbers per prompt, not k x n.

    Also every sequence's mean entropy, if entropies are known.
    """
    local: dict[int, dict[str, float]] = {}
    known = minibatch.logp | {"entropy": minibatch.entropy}
    if policy.layout.owns_logprobs:
        for b, batch in enumerate(minibatch.batches):
            streams = {name: batch.split(x[b].double().cpu()) for name, x in known.items() if b < len(x)}
            for i, place in enumerate(batch.places if streams else ()):
                local[place] = {name: pieces[i].sum().item() for name, pieces in streams.items()}
    totals: dict[int, dict[str, float]] = {}
    for part in all_gather_objects(local):
        for place, sums in part.items():  # ranks may hold parts of one sequence
            so_far = totals.setdefault(place, {})
            for name, value in sums.items():
                so_far[name] = so_far.get(name, 0.0) + value
    minibatch.sums = [
        SequenceSums(**{name: totals[place].get(name, 0.0) for name in PER_TOKEN})
        if sequence.kind == Kind.ROLLOUT
        else None
        for place, sequence in enumerate(minibatch.sequences)
    ]
    if any("entropy" in sums for sums in totals.values()):
        minibatch.entropies = [
            totals[place]["entropy"] / sequence.loss_tokens for place, sequence in enumerate(minibatch.sequences)
        ]


def _rollout_stream(minibatch: MiniBatch, batch: MicroBatch) -> Tensor:
    """Return the engine's log-probs of the micro-batch's tokens [N]."""
    values = [torch.zeros(0)]
    for place, tail in zip(batch.places, batch.split(batch.tail_N), strict=True):
        sequence = minibatch.sequences[place]
        logprobs = minibatch.groups[sequence.group].responses[sequence.sample].logprobs
        values.append(torch.from_numpy(logprobs)[tail])
    return torch.cat(values)


_LENGTHS = 96, 160  # tokens: torch compiles for the first size, and for any size at the second


def warm_up(policy: Policy, config: Config) -> float:
    """Run both passes and discard their results, so that nothing changes; return the seconds. Collective.

    Besides torch's compilation it covers the Triton kernels', and the first use of libraries and process groups.
    """
    began = time.monotonic()
    layout, longest, vocabulary = policy.layout, policy.shape.max_position, policy.shape.vocab_size
    kinds = [kind for kind in (Kind.ROLLOUT, Kind.TEACHER) for _ in range(len(_LENGTHS) * layout.micro_batch_multiple)]
    batches = [
        MicroBatch.pack([_made_up(kind, min(length, longest), vocabulary)], [0], 1.0, **layout.packing)
        for kind, length in zip(kinds, itertools.cycle(_LENGTHS), strict=False)
    ]
    # Log-probs exist on the last pipeline stage, where the loss is.
    reads_entropies = needs_entropies(config.objective)
    found = policy.logprobs_and_entropies(batches)[0] if reads_entropies else policy.logprobs(batches)
    logp: list[Tensor | None] = [*found] or [None] * len(batches)
    policy.accumulate(batches, [_streams(policy, *each, config) for each in zip(batches, kinds, logp, strict=True)])
    policy.routing_metrics()  # discarded, so that the first step does not see them
    policy.zero_gradients()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _made_up(kind: Kind, length: int, vocabulary: int) -> Sequence:
    ids = np.random.default_rng(0).integers(0, vocabulary, length).astype(np.int32)
    return Sequence(ids, length // 4, kind, 0, 0)


def _streams(policy: Policy, batch: MicroBatch, kind: Kind, logp_N: Tensor | None, config: Config) -> TokenStreams:
    """Return the loss input of a micro-batch, for either kind of sequence."""
    sampled_N = logp_N if kind == Kind.ROLLOUT else None
    return TokenStreams.of(
        [SequenceTerms(advantage=1.0, grpo=1.0) if kind == Kind.ROLLOUT else SequenceTerms(nll=1.0, source=kind)],
        batch.counts,
        device=device(),
        objective=config.objective,
        correction=Correction.of(config.rollout),
        context_group=policy.context_group,
        share=shares(config.objective, 1),
        old_N=sampled_N,
        rollout_N=sampled_N,
        reference_N=sampled_N if needs_reference(config.objective) else None,
    )
