"""The log-prob passes: old policy and reference over every rollout sequence, and each response's sums on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.batching.micro_batch import MicroBatch
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import SequenceSums, needs_reference
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.update.agreement import agreement_metrics
from megatron_dypo.update.blame import bad_batch
from megatron_dypo.update.work import Work

PER_TOKEN = ("now", "old", "reference", "rollout")


def logprob_passes(policy: Policy, works: list[Work], config: Config) -> tuple[dict[str, float], str | None]:
    """Old and reference log-probs of every rollout sequence, and their sums on all ranks.

    Returns (``agreement_metrics``, the prompts with a non-finite reward or log-prob, or None).
    """
    for work in works:
        work.logp["old"] = policy.logprobs(work.rollouts)
        work.logp["rollout"] = [_rollout_stream(work, batch) for batch in work.rollouts]
    if needs_reference(config.objective) and any(work.rollouts for work in works):
        if config.objective.reference == "previous":  # the weights of this rollout
            for work in works:
                work.logp["reference"] = work.logp["old"]
        else:
            with policy.reference_weights():
                for work in works:
                    work.logp["reference"] = policy.logprobs(work.rollouts)
    for work in works:
        work.logp["now"] = work.logp["old"]
        share_sums(policy, work)
    return agreement_metrics(policy, works, config), bad_batch(works)


def share_sums(policy: Policy, work: Work) -> None:
    """Every rank learns every response's sums (float64) over its tokens: k numbers a prompt, not k x n."""
    local: dict[int, dict[str, float]] = {}
    if policy.layout.speaks_for_tokens:
        for b, batch in enumerate(work.rollouts):
            streams = {
                name: batch.split(work.logp[name][b].double().cpu()) for name in PER_TOKEN if work.logp.get(name)
            }
            for i, place in enumerate(batch.places):
                local[place] = {name: streams[name][i].sum().item() if name in streams else 0.0 for name in PER_TOKEN}
    totals: dict[int, dict[str, float]] = {}
    for part in all_gather_objects(local):
        for place, sums in part.items():  # ranks may hold parts of one response
            so_far = totals.setdefault(place, dict.fromkeys(PER_TOKEN, 0.0))
            totals[place] = {name: so_far[name] + sums[name] for name in PER_TOKEN}
    work.sums = [SequenceSums(**totals[place]) if place in totals else None for place in range(len(work.sequences))]


def _rollout_stream(work: Work, batch: MicroBatch) -> Tensor:
    """The engine's log-probs of the micro-batch's tokens [N]."""
    values = [torch.zeros(0)]
    for place, tail in zip(batch.places, batch.split(batch.tail_N), strict=True):
        sequence = work.sequences[place]
        logprobs = work.groups[sequence.group].responses[sequence.sample].logprobs
        values.append(torch.from_numpy(logprobs)[tail])
    return torch.cat(values)
