"""From graded groups to optimizer updates: sequences, packing, log-prob passes, coefficients, training pass.

Two passes make every token's gradient local: the log-prob pass (old policy, reference) yields each response's sums, the
coefficients follow from one small exchange, and the training pass needs no other token. One packing plan serves all
passes, so the first ratio is exactly 1. Legend: N loss tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.batching.micro_batch import MicroBatch, spread
from megatron_dypo.batching.plan import plan_micro_batches
from megatron_dypo.batching.sequences import training_sequences
from megatron_dypo.config.schema import Config
from megatron_dypo.monitor.stopwatch import Stopwatch
from megatron_dypo.objectives.coefficients import BatchTerms, SequenceSums, alpha, needs_reference, sequence_terms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Kind, Sequence
from megatron_dypo.runtime.distributed import all_gather_objects, phase

PER_TOKEN = ("now", "old", "reference", "rollout")


@dataclass
class Work:
    """One mini-batch: all its sequences, and this rank's micro-batches (rollouts first, teacher traces apart)."""

    groups: list[Group]
    sequences: list[Sequence]
    rollouts: list[MicroBatch]
    teachers: list[MicroBatch]
    logp: dict[str, list[Tensor]] = field(default_factory=dict)  # per rollout micro-batch [N], last stage only
    sums: list[SequenceSums | None] = field(default_factory=list)


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
    works = make_work(policy, groups, config, encode_trace)
    with clock("logprob"), phase("log-prob passes"):
        mismatch, offender = logprob_passes(policy, works, config)
    if offender is not None:
        return Outcome(works, mismatch, skipped=offender)
    with clock("update"), phase("update"):
        outcome = run_updates(policy, works, config, lr)
    outcome.works, outcome.metrics = works, mismatch | outcome.metrics
    return outcome


def make_work(
    policy: Policy, groups: list[Group], config: Config, encode_trace: Callable[[Group, int], np.ndarray]
) -> list[Work]:
    """Cut the groups into mini-batches of whole prompts and plan each; only the micro-batches differ between ranks."""
    updates, layout = config.objective.updates_per_rollout, policy.layout
    works = []
    for part in np.array_split(np.arange(len(groups)), updates):
        chosen = [groups[i] for i in part]
        sequences = training_sequences(chosen, config.objective.method, encode_trace)
        packed = {}
        for kind in Kind:
            places = [place for place, sequence in enumerate(sequences) if sequence.kind == kind]
            lengths = [sequences[place].length for place in places]
            plan = (
                plan_micro_batches(lengths, layout.dp, config.data.max_tokens_per_microbatch)[layout.dp_rank]
                if places
                else []
            )
            packed[kind] = [
                MicroBatch.pack(sequences, [places[i] for i in members], config.rollout.temperature, multiple=layout.tp)
                for members in plan
            ]
        works.append(Work(chosen, sequences, packed[Kind.ROLLOUT], packed[Kind.TEACHER]))
    return works


def logprob_passes(policy: Policy, works: list[Work], config: Config) -> tuple[dict[str, float], str | None]:
    """Old and reference log-probs of every rollout sequence, and their sums on all ranks.

    Returns (rollout/mismatch metrics, the first prompt with a non-finite reward or log-prob).
    """
    for work in works:
        work.logp["old"] = policy.logprobs(work.rollouts) if work.rollouts else []
        work.logp["rollout"] = [_rollout_stream(work, batch) for batch in work.rollouts]
    if needs_reference(config.objective) and any(work.rollouts for work in works):
        if config.objective.reference == "previous":  # the weights of this rollout
            for work in works:
                work.logp["reference"] = work.logp["old"]
        else:
            with policy.reference_weights():
                for work in works:
                    work.logp["reference"] = policy.logprobs(work.rollouts) if work.rollouts else []
    mismatch: dict[str, list[float]] = defaultdict(list)
    for work in works:
        work.logp["now"] = work.logp["old"]
        share_sums(policy, work)
        if policy.layout.is_last_stage and policy.layout.tp_rank == 0:
            for old_N, rollout_N in zip(work.logp["old"], work.logp["rollout"], strict=True):
                gap_N = (old_N.cpu() - rollout_N).double()
                mismatch["count"].append(len(gap_N))
                mismatch["sum"].append(gap_N.abs().sum().item())
                mismatch["max"].append(gap_N.abs().max().item() if len(gap_N) else 0.0)
                mismatch["kl"].append((gap_N.exp() - gap_N - 1).sum().item())
    every = [part for part in all_gather_objects(dict(mismatch)) if part]
    count = sum(sum(part["count"]) for part in every)
    metrics = {}
    if count:
        metrics["rollout/mismatch_mean"] = sum(sum(part["sum"]) for part in every) / count
        metrics["rollout/mismatch_max"] = max(max(part["max"]) for part in every)
        metrics["rollout/mismatch_kl"] = sum(sum(part["kl"]) for part in every) / count
    return metrics, _first_offender(works)


def share_sums(policy: Policy, work: Work) -> None:
    """Every rank learns every response's sums (float64) over its tokens: k numbers a prompt, not k x n."""
    local: dict[int, dict[str, float]] = {}
    if policy.layout.is_last_stage and policy.layout.tp_rank == 0:
        for b, batch in enumerate(work.rollouts):
            streams = {
                name: batch.split(work.logp[name][b].double().cpu()) for name in PER_TOKEN if work.logp.get(name)
            }
            for i, place in enumerate(batch.places):
                local[place] = {name: streams[name][i].sum().item() if name in streams else 0.0 for name in PER_TOKEN}
    everything = {place: sums for part in all_gather_objects(local) for place, sums in part.items()}
    work.sums = [
        SequenceSums(**everything[place]) if place in everything else None for place in range(len(work.sequences))
    ]


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
        if not applied and outcome.skipped is None:
            outcome.skipped = f"the gradient norm is {norm}; first prompt of the mini-batch: {work.groups[0].prompt.id}"
        norms.append(norm)
        reports.append(_report(policy, terms, streams, objective))
    outcome.empty = not reports
    outcome.metrics = {
        name: _mean([report[name] for report in reports if name in report]) for report in reports for name in report
    }
    if norms:
        outcome.metrics["train/grad_norm"] = _mean(norms)
    return outcome


def _rollout_stream(work: Work, batch: MicroBatch) -> Tensor:
    """The engine's log-probs of the micro-batch's tokens [N]."""
    chosen = [work.sequences[place] for place in batch.places]
    values = [work.groups[sequence.group].responses[sequence.sample].logprobs for sequence in chosen]
    return torch.from_numpy(np.concatenate(values)) if values else torch.zeros(0)


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


def _report(policy: Policy, terms: BatchTerms, streams: list[TokenStreams], objective) -> dict[str, float]:
    """This update's metrics, from the token sums of all ranks and the coefficient pass; the same on every rank."""
    local: dict[str, float] = defaultdict(float)
    if policy.layout.is_last_stage and policy.layout.tp_rank == 0:
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
        report["policy/clip_frac"] = totals["clipped"] / totals["rollout_tokens"]
    if terms.eta is not None:
        report |= {"gal/eta": terms.eta, "gal/spread": terms.spread, "gal/saturated_frac": terms.saturated}
    return report


def _first_offender(works: list[Work]) -> str | None:
    for work in works:
        for group in work.groups:
            if not all(math.isfinite(reward) for reward in group.rewards):
                return f"prompt {group.prompt.id}: non-finite reward"
        for sequence, sums in zip(work.sequences, work.sums, strict=True):
            if sums is not None and not all(math.isfinite(getattr(sums, name)) for name in PER_TOKEN):
                return f"prompt {work.groups[sequence.group].prompt.id}: non-finite log-prob"
    return None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
