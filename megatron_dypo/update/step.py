"""The updates of one step: coefficients, training pass, optimizer step, and what to report of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_dypo.batching.micro_batch import spread
from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.objectives.coefficients import BatchTerms, alpha, sequence_terms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group
from megatron_dypo.runtime.distributed import all_gather_objects, phase
from megatron_dypo.runtime.stopwatch import Stopwatch
from megatron_dypo.update.passes import logprob_passes, share_sums
from megatron_dypo.update.work import Work, make_work


@dataclass
class Outcome:
    """What a step did. ``skipped`` names the first offender of a non-finite step; ``empty``: nothing to train on."""

    works: list[Work] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None
    empty: bool = False


def update_policy(
    policy: Policy,
    groups: list[Group],
    config: Config,
    encode_trace: Callable[[Group, int], np.ndarray],
    lr: float,
    clock: Stopwatch,
) -> Outcome:
    """All updates of one step on its graded groups. A non-finite reward or log-prob leaves the whole step out."""
    works = make_work(policy.layout, groups, config, encode_trace)
    with clock("logprob"), phase("log-prob passes"):
        mismatch, offender = logprob_passes(policy, works, config)
    if offender is not None:
        return Outcome(works, mismatch, skipped=offender)
    with clock("update"), phase("update"):
        outcome = run_updates(policy, works, config, lr)
    outcome.works, outcome.metrics = works, mismatch | outcome.metrics
    return outcome


def run_updates(policy: Policy, works: list[Work], config: Config, lr: float) -> Outcome:
    """One optimizer update per mini-batch; those with nothing to train on are left out, the same on every rank."""
    objective, outcome = config.objective, Outcome()
    correction = Correction(config.rollout.correction, config.rollout.correction_cap)
    reports, norms = [], []
    for u, work in enumerate(works):
        if not work.sequences:
            continue
        if u > 0 and objective.refresh_pair_weights and work.rollouts:
            work.logp["now"] = policy.logprobs(work.rollouts)
            share_sums(policy, work)
        terms = sequence_terms(
            work.groups, work.sequences, work.sums, objective, correction, config.rollout.max_response_tokens
        )
        batches = work.rollouts + work.teachers
        streams = [_streams(policy, work, terms, b, config, correction) for b in range(len(batches))]
        with phase("training pass"):
            policy.accumulate(batches, streams)
        with phase("optimizer step"):
            applied, norm = policy.step(lr)
        norms.append(norm)
        reports.append(_report(policy, terms, streams, objective))
        if not applied:  # further updates would build on a step that was not taken
            ids = ", ".join(group.prompt.id for group in work.groups[:8])
            done = f"update {u + 1} of {len(works)}"
            outcome.skipped = f"the gradient norm is {norm} in {done}, on the mini-batch that starts with prompts {ids}"
            break
    outcome.empty = not reports
    outcome.metrics = {
        name: _mean([report[name] for report in reports if name in report]) for report in reports for name in report
    }
    if norms:
        outcome.metrics["train/grad_norm"] = _mean(norms)
    return outcome


def _streams(
    policy: Policy, work: Work, terms: BatchTerms, b: int, config: Config, correction: Correction
) -> TokenStreams:
    """Spread the coefficients of micro-batch ``b`` (rollouts first, then teacher traces) over its tokens."""
    is_rollout = b < len(work.rollouts)
    batch = (work.rollouts + work.teachers)[b]
    device = next(policy.gpt.parameters()).device
    chosen = [terms.sequences[place] for place in batch.places]
    column = {
        name: spread([getattr(term, name) for term in chosen], batch.counts).to(device)
        for name in ("advantage", "grpo", "grpo_slope", "gal_slope", "sft")
    }
    nothing_N = torch.zeros(len(batch.targets_N), device=device)
    known = {
        name: work.logp[name][b].to(device) if is_rollout and work.logp.get(name) else nothing_N
        for name in ("old", "rollout", "reference")
    }
    return TokenStreams(
        advantage_N=column["advantage"],
        grpo_N=column["grpo"],
        grpo_slope_N=column["grpo_slope"],
        gal_slope_N=column["gal_slope"],
        sft_N=column["sft"],
        old_N=known["old"],
        rollout_N=known["rollout"],
        is_rollout_N=nothing_N + float(is_rollout),
        reference_N=known["reference"] if is_rollout and work.logp.get("reference") else None,
        objective=config.objective,
        correction=correction,
        alpha=alpha(config.objective),
    )


def _report(policy: Policy, terms: BatchTerms, streams: list[TokenStreams], objective: Objective) -> dict[str, float]:
    """This update's metrics, from the token sums of all ranks and the coefficient pass; the same on every rank."""
    local: dict[str, float] = defaultdict(float)
    if policy.layout.speaks_for_tokens:
        for stream in streams:
            for name, value in stream.totals.items():
                local[name] += float(value)
    totals: dict[str, float] = defaultdict(float)
    for part in all_gather_objects(dict(local)):
        for name, value in part.items():
            totals[name] += value
    share = alpha(objective)
    grpo = totals["loss/grpo"] + terms.grpo_sequence_loss
    report = {
        "loss/total": objective.gamma * totals["loss/sft"] + share * grpo + (1 - share) * terms.gal_loss,
        "loss/grpo": grpo,
        "loss/gal": terms.gal_loss,
        "loss/sft": totals["loss/sft"],
        "loss/kl": totals["loss/kl"],
    } | {name: totals[name] for name in ("grad_share/grpo", "grad_share/gal", "grad_share/sft")}
    if totals["rollout_tokens"]:
        report["policy/entropy"] = totals["entropy"] / totals["rollout_tokens"]
        report["policy/clip_frac"] = (totals["clipped"] + terms.clipped_tokens) / totals["rollout_tokens"]
    if terms.eta is not None:
        report |= {"gal/eta": terms.eta, "gal/spread": terms.spread, "gal/saturated_frac": terms.saturated}
    return report


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
