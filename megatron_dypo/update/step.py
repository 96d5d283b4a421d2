"""The updates of one step: coefficients, training pass, and the optimizer step or why it is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dypo.checkpoint.counters import usual_norm
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import BatchTerms, alpha, sequence_terms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group
from megatron_dypo.runtime.distributed import device
from megatron_dypo.runtime.failure import phase
from megatron_dypo.runtime.stopwatch import Stopwatch
from megatron_dypo.update.blame import bad_gradient, bad_weights, prompts
from megatron_dypo.update.metrics import share_update, update_metrics
from megatron_dypo.update.passes import logprob_passes, share_sums
from megatron_dypo.update.work import Work, make_work


@dataclass
class Outcome:
    """What a step did. ``skipped`` says why it, or the rest of its updates, was left out, and on which prompts.

    ``norms`` are the gradient norms of the applied updates, ``memory`` the largest peaks of all ranks (GiB), and
    ``empty`` means that there was nothing to train on.
    """

    works: list[Work] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    skipped: str | None = None
    empty: bool = False


def update_policy(
    policy: Policy,
    groups: list[Group],
    config: Config,
    encode_trace: Callable[[Group, int], np.ndarray],
    lr: float,
    clock: Stopwatch,
    norms: Sequence[float] = (),
) -> Outcome:
    """All updates of one step on its graded groups. A non-finite reward or log-prob leaves the whole step out.

    ``norms``: gradient norms of the updates applied before this step.
    """
    works = make_work(policy.layout, groups, config, encode_trace)
    with clock("logprob"), phase("log-prob passes"):
        agreement, offenders = logprob_passes(policy, works, config)
    if offenders is not None:
        return Outcome(works, agreement, skipped=bad_weights(policy) + offenders)
    with clock("update"), phase("update"):
        outcome = run_updates(policy, works, config, lr, norms)
    if outcome.skipped:
        outcome.skipped = bad_weights(policy) + outcome.skipped
    for work in works:
        work.forget_routing()
    outcome.works, outcome.metrics = works, agreement | outcome.metrics
    return outcome


def run_updates(
    policy: Policy, works: list[Work], config: Config, lr: float, norms_before: Sequence[float] = ()
) -> Outcome:
    """One optimizer update per mini-batch; those with nothing to train on are left out, the same on every rank."""
    objective, outcome = config.objective, Outcome()
    correction = Correction(config.rollout.correction, config.rollout.correction_cap)
    reports = []
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
            shared = share_update(policy, streams)
        report = update_metrics(shared, terms, objective)
        reports.append(report)
        outcome.memory = {name: max(outcome.memory.get(name, 0.0), peak) for name, peak in shared.memory.items()}
        limit = (config.trainer.spike_factor, usual_norm([*norms_before, *outcome.norms]))
        if reason := _reason_to_skip(policy, work, streams, shared.norm, report["loss/total"], *limit):
            outcome.skipped = f"update {u + 1} of {len(works)}: {reason}"
            break  # further updates would build on one that was not taken
        with phase("optimizer step"):
            policy.step(lr)
        outcome.norms.append(shared.norm)
    outcome.empty = not reports
    outcome.metrics = {
        name: _mean([report[name] for report in reports if name in report]) for report in reports for name in report
    }
    return outcome


def _reason_to_skip(
    policy: Policy,
    work: Work,
    streams: list[TokenStreams],
    norm: float,
    loss: float,
    spike_factor: float,
    usual: float | None,
) -> str | None:
    """Why this update must not be applied, and on which prompts; None where it may. The same on every rank."""
    if not (math.isfinite(norm) and math.isfinite(loss)):
        with phase("search for what is not finite"):
            return f"gradient norm {norm:g}, loss {loss:g}: {bad_gradient(policy, work, streams)}"
    if spike_factor and usual and norm > spike_factor * usual:
        times = f"{norm / usual:.3g} times the median of the last applied updates ({usual:.4g})"
        way_out = "if that is its level from now on, resume with trainer.spike_factor higher, or 0"
        return f"gradient norm {norm:.4g}, {times}, on prompts {prompts(work)}; {way_out}"
    return None


def _streams(
    policy: Policy, work: Work, terms: BatchTerms, b: int, config: Config, correction: Correction
) -> TokenStreams:
    """What the loss of micro-batch ``b`` (rollouts first, then teacher traces) reads."""
    is_rollout = b < len(work.rollouts)
    batch = (work.rollouts + work.teachers)[b]
    known = {
        f"{name}_N": work.logp[name][b].to(device()) if is_rollout and work.logp.get(name) else None
        for name in ("old", "rollout", "reference")
    }
    return TokenStreams.of(
        [terms.sequences[place] for place in batch.places],
        batch.counts,
        device=device(),
        objective=config.objective,
        correction=correction,
        alpha=alpha(config.objective),
        **known,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
