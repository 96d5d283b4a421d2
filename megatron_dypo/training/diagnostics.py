"""The prompts that a skipped step names: those whose own numbers are not finite, as precisely as possible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dypo.models.sharding import unfinite_weights
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.training.minibatch import MiniBatch

NAMED = 8
LOGPROBS = {"old": "policy", "reference": "reference", "rollout": "engine"}  # fields of SequenceSums


def some(names: Sequence[str]) -> str:
    """Return the first NAMED of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def bad_batch(minibatches: list[MiniBatch]) -> str | None:
    """Return the prompts with a non-finite reward, or a response with a non-finite log-prob; None if there are none."""
    found = []
    for minibatch in minibatches:
        for group in minibatch.groups:
            if not all(math.isfinite(reward) for reward in group.rewards):
                found.append(f"prompt {group.prompt.id}: non-finite reward")
        for place, sums in enumerate(minibatch.sums):
            bad = (
                [] if sums is None else [LOGPROBS[name] for name in LOGPROBS if not math.isfinite(getattr(sums, name))]
            )
            if bad:
                found.append(f"{_name(minibatch, place)}: non-finite {' and '.join(bad)} log-prob")
    return some(found) if found else None


def bad_weights(policy: Policy) -> str:
    """Return a message prefix with the Hugging Face names of NaN or infinite weights; "" if all are finite.

    The same on every rank; collective.
    """
    found = unfinite_weights(policy.parameters, policy.shape, policy.layout)
    return f"NaN or infinite weights: {some(found)}; so " if found else ""


def bad_gradient(policy: Policy, minibatch: MiniBatch, streams: list[TokenStreams]) -> str:
    """Return where a non-finite gradient of a mini-batch comes from, the same text on every rank; collective.

    The weights must still be those of the training pass: its log-probs are recomputed (nothing is kept for this in
    normal operation), and each sequence's inputs, log-probs and dL/dlogp are checked.
    """
    batches = minibatch.batches
    logp, entropy = policy.logprobs_and_entropies(batches)
    mine: dict[int, tuple[int, str]] = {}
    if policy.layout.owns_logprobs:
        for batch, stream, *now in zip(batches, streams, logp, entropy, strict=True):
            for order, (what, values_N) in enumerate(_from_cause_to_effect(stream, *now)):
                for place, values in zip(batch.places, batch.split(values_N), strict=True):
                    if not torch.isfinite(values).all():
                        mine.setdefault(place, (order, what))
    found: dict[int, tuple[int, str]] = {}
    for part in all_gather_objects(mine):  # ranks may hold parts of one sequence
        for place, fault in part.items():
            found[place] = min(fault, found.get(place, fault))
    if found:  # a bad log-prob spoils the coefficients of its whole group: causes first
        return some(
            [
                f"{_name(minibatch, place)}: non-finite {found[place][1]}"
                for place in sorted(found, key=found.__getitem__)
            ]
        )
    return (
        "every log-prob and dL/dlogp of the mini-batch is finite, so it arises in the model's backward pass; "
        f"its prompts are {prompts(minibatch)}"
    )


def prompts(minibatch: MiniBatch) -> str:
    return some([group.prompt.id for group in minibatch.groups])


def _from_cause_to_effect(stream: TokenStreams, logp_N: Tensor, entropy_N: Tensor) -> list[tuple[str, Tensor]]:
    """Return (description, values [N]) of a micro-batch's inputs, then of what is computed from them."""
    summands_N, dlogp_N, *_ = replace(stream).terms(logp_N, entropy_N, slice(0, len(logp_N)))
    coefficients_N = stream.coefficients_CS.sum(0).repeat_interleave(stream.cu_seqlens.diff())
    own = "" if stream.own is None else f" ({stream.own})"
    given = [
        ("engine log-prob", stream.rollout_N),
        ("policy log-prob", logp_N),
        ("old log-prob", stream.old_N),
        ("reference log-prob", stream.reference_N),
        ("coefficient", coefficients_N),
        (f"dL/dlogp{own}", dlogp_N),
        (f"loss{own}", summands_N),
    ]
    return [(what, values_N) for what, values_N in given if values_N is not None]


def _name(minibatch: MiniBatch, place: int) -> str:
    sequence = minibatch.sequences[place]
    prompt = minibatch.groups[sequence.group].prompt
    if sequence.kind == Kind.ROLLOUT:
        return f"prompt {prompt.id}, response {sequence.sample}"
    return f"prompt {prompt.id}, teacher {prompt.teachers[sequence.sample].name}"
