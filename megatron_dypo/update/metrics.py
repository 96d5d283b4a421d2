"""What a graded batch and an update look like, as metrics; the same on every rank."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from megatron_dypo.config.schema import Objective
from megatron_dypo.objectives.coefficients import BatchTerms, alpha
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Kind, Regime
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.runtime.memory import take_peaks
from megatron_dypo.update.work import Work


def batch_metrics(groups: list[Group], works: list[Work]) -> dict[str, float | None]:
    """Rewards, regime shares, offline ratio (trained Hard prompts / trained prompts), lengths in tokens.

    ``rollout/entropy`` is the mean surprise of the sampled tokens: an estimate over all responses, where
    ``policy/entropy`` is exact but covers the trained ones only.
    """
    responses = [response for group in groups for response in group.responses]
    traces = [sequence for work in works for sequence in work.sequences if sequence.kind == Kind.TEACHER]
    trained = {(w, sequence.group): sequence.kind for w, work in enumerate(works) for sequence in work.sequences}
    offline = sum(kind == Kind.TEACHER for kind in trained.values())
    sampled = sum(len(response.ids) for response in responses)
    metrics: dict[str, float | None] = {
        "tokens": sampled + sum(sequence.loss_tokens for sequence in traces),
        "dypo/offline_ratio": offline / len(trained) if trained else None,
        "dypo/hard_without_teacher": sum(group.teacher_indices == () for group in groups),
    }
    if responses:
        truncated = sum(response.finish_reason == "length" for response in responses)
        metrics |= {
            "reward/mean": sum(response.reward for response in responses) / len(responses),
            "reward/failed": sum(response.fault is not None for response in responses),
            "rollout/response_tokens": sampled / len(responses),
            "rollout/truncated_frac": truncated / len(responses),
            "rollout/entropy": -sum(float(response.logprobs.sum()) for response in responses) / sampled,
        }
        for regime in Regime:
            metrics[f"dypo/{regime.name.lower()}_frac"] = sum(g.regime == regime for g in groups) / len(groups)
    return metrics


@dataclass(frozen=True)
class Shared:
    """What all ranks know of an update before it is applied: token sums, gradient norm, peaks of memory (GiB), and
    where tokens were routed."""

    totals: dict[str, float]
    norm: float
    memory: dict[str, float]
    routing: dict[str, float]


def share_update(policy: Policy, streams: list[TokenStreams]) -> Shared:
    """One exchange after the training pass: sums over ranks, the largest peaks, and one norm for all to judge.

    The ranks' norms are equal but for rounding, and that must not make them decide differently; a non-finite one wins.
    """
    local: dict[str, float] = defaultdict(float)
    if policy.layout.speaks_for_tokens:
        for stream in streams:
            for name, value in stream.totals.items():
                local[name] += value
    everyone = all_gather_objects((dict(local), policy.grad_norm(), take_peaks()))
    totals: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = {}
    for part, _, peaks in everyone:
        for name, value in part.items():
            totals[name] += value
        for name, value in peaks.items():
            memory[name] = max(memory.get(name, 0.0), value)
    norms = [norm for _, norm, _ in everyone]
    norm = next((norm for norm in norms if not math.isfinite(norm)), max(norms))
    return Shared(totals, norm, memory, policy.routing_metrics())


def update_metrics(shared: Shared, terms: BatchTerms, objective: Objective) -> dict[str, float]:
    """One update's metrics, from what the ranks shared and the coefficient pass."""
    totals, share = shared.totals, alpha(objective)
    grpo = totals["loss/grpo"] + terms.grpo_sequence_loss
    metrics = {
        "loss/total": objective.gamma * totals["loss/sft"] + share * grpo + (1 - share) * terms.gal_loss,
        "loss/grpo": grpo,
        "loss/gal": terms.gal_loss,
        "loss/sft": totals["loss/sft"],
        "loss/kl": totals["loss/kl"],
        "train/grad_norm": shared.norm,
    } | {name: totals[name] for name in ("grad_share/grpo", "grad_share/gal", "grad_share/sft")}
    if totals["rollout_tokens"]:
        metrics["policy/entropy"] = totals["entropy"] / totals["rollout_tokens"]
        metrics["policy/clip_frac"] = (totals["clipped"] + terms.clipped_tokens) / totals["rollout_tokens"]
    metrics |= shared.routing
    metrics["loss/total"] += shared.routing.get("loss/aux", 0.0)
    if terms.eta is not None:
        metrics |= {"gal/eta": terms.eta, "gal/spread": terms.spread, "gal/saturated_frac": terms.saturated}
    return metrics
