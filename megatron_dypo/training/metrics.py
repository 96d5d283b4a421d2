"""Metrics of a graded batch and of an update, the same on every rank.

``rollout/mismatch_*`` compare the trained weights with those that sampled: log-probs, versions, and the effect of the
correction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.objectives.coefficients import BatchTerms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.recipes import total, trained_responses, update_terms
from megatron_dypo.objectives.sequence_ratio import ratio_unit
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Kind, Regime
from megatron_dypo.runtime.distributed import all_gather_objects
from megatron_dypo.runtime.measure import take_peaks
from megatron_dypo.training.minibatch import MiniBatch

DECADES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # nats, lower bounds; fp32 agrees to 1e-6, bf16 to 1e-2
SHARE_KEYS = tuple(f"rollout/mismatch_share/{bound:g}" for bound in DECADES)


def mismatch_metrics(policy: Policy, minibatches: list[MiniBatch], config: Config) -> dict[str, float]:
    """Return the mismatch metrics of the step's trained responses, over all mini-batches; the same on every rank.

    rollout/mismatch_mean|max|kl and the share of tokens per decade: the old policy's log-probs against the engine's.
    rollout/staleness_mean|max: optimizer updates between the weights that sampled a response and those that first train
    on it, whichever is newer (a replay that skipped a step is behind its recording). rollout/corrected_frac, with a
    rollout correction: tokens whose weight in GRPO is capped or 0, and rollout/corrected_low_frac those that are 0 at
    the lower end. Empty if no response is trained. Reads each mini-batch's ``logp`` and ``sums``.
    """
    correction = Correction.of(config.rollout)
    totals, largest = _totals(policy, minibatches, correction)
    count = totals["tokens"]
    if not count:
        return {}
    stale = [abs(policy.version - version) for minibatch in minibatches for version in _weight_versions(minibatch)]
    metrics = {
        "rollout/mismatch_mean": totals["gap"] / count,
        "rollout/mismatch_max": largest,
        "rollout/mismatch_kl": totals["kl"] / count,
        **{key: totals[key] / count for key in SHARE_KEYS},
        "rollout/staleness_mean": sum(stale) / len(stale),
        "rollout/staleness_max": max(stale),
    }
    if correction.kind != "none":
        by_response = config.objective.ratio_level == "sequence"
        found = _corrected_responses(minibatches, config, correction) if by_response else totals
        metrics["rollout/corrected_frac"] = found["corrected"] / count
        if correction.kind != "truncate":
            metrics["rollout/corrected_low_frac"] = found["corrected_low"] / count
    return metrics


def _totals(policy: Policy, minibatches: list[MiniBatch], correction: Correction) -> tuple[dict[str, float], float]:
    """Return the sums over the tokens of all ranks, and the largest gap (nats)."""
    log_ratios = [torch.zeros(0)]
    if policy.layout.owns_logprobs:
        for minibatch in minibatches:
            pairs = zip(minibatch.logp["old"], minibatch.logp["rollout"], strict=True)
            log_ratios += [old_N.cpu() - rollout_N for old_N, rollout_N in pairs]
    log_ratio_N = torch.cat(log_ratios)
    signed_N = log_ratio_N.double()
    gap_N = signed_N.abs()
    decade_N = torch.bucketize(gap_N, torch.tensor(DECADES[1:], dtype=torch.float64), right=True)
    mine = {
        "tokens": len(gap_N),
        "gap": gap_N.sum().item(),
        "kl": (signed_N.exp() - signed_N - 1).sum().item(),
        "corrected": correction.binds(log_ratio_N).sum().item(),
        "corrected_low": correction.is_below(log_ratio_N).sum().item(),
        **dict(zip(SHARE_KEYS, torch.bincount(decade_N, minlength=len(DECADES)).tolist(), strict=True)),
    }
    everyone = all_gather_objects((mine, gap_N.max().item() if len(gap_N) else 0.0))
    totals = {name: sum(part[name] for part, _ in everyone) for name in mine}
    return totals, max(largest for _, largest in everyone)


def _corrected_responses(minibatches: list[MiniBatch], config: Config, correction: Correction) -> dict[str, float]:
    """Count the tokens of responses whose single weight, of a sequence-level ratio, is corrected."""
    found = {"corrected": 0.0, "corrected_low": 0.0}
    for minibatch in minibatches:
        for sequence, sums in zip(minibatch.sequences, minibatch.sums, strict=True):
            if sums is not None:
                tokens = sequence.loss_tokens
                ratio = (sums.old - sums.rollout) * ratio_unit(config.objective, tokens)
                log_ratio = torch.tensor(ratio, dtype=torch.float64)
                found["corrected"] += tokens * correction.binds(log_ratio).item()
                found["corrected_low"] += tokens * correction.is_below(log_ratio).item()
    return found


def _weight_versions(minibatch: MiniBatch) -> list[int]:
    """Return the weight versions of the trained responses."""
    rollouts = [sequence for sequence in minibatch.sequences if sequence.kind == Kind.ROLLOUT]
    return [minibatch.groups[sequence.group].responses[sequence.sample].weight_version for sequence in rollouts]


def batch_metrics(groups: list[Group], minibatches: list[MiniBatch], objective: Objective) -> dict[str, float | None]:
    """Return the batch's metrics: rewards, regime shares, offline ratio, lengths in tokens, token sources.

    The offline ratio is trained Hard prompts / trained prompts; source_share/KIND is the share of trained tokens from
    this kind of sequence. With ``mask_truncated`` rollout/masked_frac is the share of responses without loss.

    ``rollout/entropy`` is the mean surprise of the sampled tokens: an estimate over all responses, whereas
    ``policy/entropy`` is exact but covers only the trained ones.
    """
    responses = [response for group in groups for response in group.responses]
    trained = {
        kind: {
            (m, sequence.group)
            for m, minibatch in enumerate(minibatches)
            for sequence in minibatch.sequences
            if sequence.kind == kind
        }
        for kind in Kind
    }
    trained_tokens = dict.fromkeys(Kind, 0)
    for minibatch in minibatches:
        for sequence in minibatch.sequences:
            trained_tokens[sequence.kind] += sequence.loss_tokens
    offline, prompts = len(trained[Kind.TEACHER]), len(trained[Kind.TEACHER] | trained[Kind.ROLLOUT])
    sampled = sum(len(response.ids) for response in responses)
    metrics: dict[str, float | None] = {
        "tokens": sampled + sum(trained_tokens.values()) - trained_tokens[Kind.ROLLOUT],
        "dypo/offline_ratio": offline / prompts if prompts else None,
        "dypo/hard_without_teacher": sum(group.teacher_indices == () for group in groups),
    }
    if total_tokens := sum(trained_tokens.values()):
        metrics |= {f"source_share/{kind.name.lower()}": count / total_tokens for kind, count in trained_tokens.items()}
    if responses:
        truncated = sum(response.finish_reason == "length" for response in responses)
        metrics |= {
            "reward/mean": sum(response.reward for response in responses) / len(responses),
            "reward/failed": sum(response.fault is not None for response in responses),
            "rollout/response_tokens": sampled / len(responses),
            "rollout/truncated_frac": truncated / len(responses),
            "rollout/entropy": -sum(float(response.logprobs.sum()) for response in responses) / sampled,
        }
        if objective.mask_truncated:
            carrying = sum(len(trained_responses(objective, group)) for group in groups)
            metrics["rollout/masked_frac"] = 1 - carrying / len(responses)
        for regime in Regime:
            metrics[f"dypo/{regime.name.lower()}_frac"] = sum(g.regime == regime for g in groups) / len(groups)
    return metrics


@dataclass(frozen=True)
class UpdateStats:
    """An update's results on all ranks before it is applied: token sums, gradient norm, memory peaks (GiB), routing."""

    totals: dict[str, float]
    norm: float
    memory: dict[str, float]
    routing: dict[str, float]


def share_update_stats(policy: Policy, streams: list[TokenStreams]) -> UpdateStats:
    """Exchange statistics once after the training pass: sums over ranks, the largest peaks, and one norm for all.

    The ranks' norms are equal up to rounding, which must not lead them to different decisions; a non-finite one wins.
    """
    local: dict[str, float] = defaultdict(float)
    if policy.layout.owns_logprobs:
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
    grad_norms = [norm for _, norm, _ in everyone]
    norm = next((norm for norm in grad_norms if not math.isfinite(norm)), max(grad_norms))
    return UpdateStats(totals, norm, memory, policy.routing_metrics())


def update_metrics(
    stats: UpdateStats, terms: BatchTerms, objective: Objective, deferred: bool = False
) -> dict[str, float]:
    """Return one update's metrics, from the shared statistics and the coefficient pass.

    A ``deferred`` update reports loss and gradient norm under separate names, and its terms' metrics, which other
    updates omit: a step's metrics are means over the updates that have them.
    """
    metrics = _all_metrics(stats, terms, objective)
    own = {f"{what}/{term.name}" for term in update_terms(objective, True) for what in ("loss", "grad_share")}
    if not deferred:
        return {name: value for name, value in metrics.items() if name not in own}
    flush = {"flush/loss": metrics["loss/total"], "flush/grad_norm": stats.norm}
    return flush | {name: value for name, value in metrics.items() if name in own}


def _all_metrics(stats: UpdateStats, terms: BatchTerms, objective: Objective) -> dict[str, float]:
    totals = stats.totals
    names = dict.fromkeys(("grpo", "gal", "sft", *terms.share))  # these three for every recipe
    beyond_tokens = {"grpo": terms.grpo_sequence_loss, "gal": terms.gal_loss}
    losses = {name: totals[f"loss/{name}"] + beyond_tokens.get(name, 0.0) for name in names}
    metrics = {
        "loss/total": total(losses, terms.share),
        **{f"loss/{name}": loss for name, loss in losses.items()},
        "loss/kl": totals["loss/kl"],
        "train/grad_norm": stats.norm,
    } | {name: totals[name] for name in (f"grad_share/{name}" for name in names)}
    if totals["rollout_tokens"]:
        metrics["policy/entropy"] = totals["entropy"] / totals["rollout_tokens"]
        if objective.loss_function is None:
            metrics["policy/clip_frac"] = (totals["clipped"] + terms.clipped_tokens) / totals["rollout_tokens"]
        of_own = {name: value for name, value in totals.items() if name.startswith("loss_function/")}
        metrics |= {name: value / totals["rollout_tokens"] for name, value in of_own.items()}
    if objective.entropy_coef:
        metrics["loss/entropy"] = totals["loss/entropy"]
        metrics["loss/total"] += totals["loss/entropy"]
    metrics |= stats.routing
    metrics["loss/total"] += stats.routing.get("loss/aux", 0.0)
    of_pairs = {"gal/eta": terms.eta, "gal/spread": terms.spread, "gal/saturated_frac": terms.saturated}
    return metrics | {name: value for name, value in of_pairs.items() if value is not None}
