"""The updates of one step: coefficients, training pass, and the optimizer step or the reason to skip it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dypo.config.schema import Config, Trainer
from megatron_dypo.objectives.coefficients import BatchTerms, needs_sums, sequence_terms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.recipes import scheduled
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group
from megatron_dypo.runtime.distributed import device
from megatron_dypo.runtime.failure import phase
from megatron_dypo.runtime.measure import StepTimer
from megatron_dypo.runtime.recent import recent_level
from megatron_dypo.training.diagnostics import bad_gradient, bad_weights, prompts
from megatron_dypo.training.metrics import share_update_stats, update_metrics
from megatron_dypo.training.minibatch import MiniBatch, build_minibatches, plan_minibatch
from megatron_dypo.training.passes import current_logprobs, logprob_passes, share_sums
from megatron_dypo.training.side_model import SideModel


@dataclass(frozen=True)
class StepContext:
    """Settings of one step's updates besides their data.

    ``step`` is counted from the start of its stage, for the schedules of the loss's shares. ``lr`` is the learning
    rate, ``clock`` receives the seconds of each phase, and ``grad_norms`` are those of the updates applied before this
    step, oldest first; ``flush_norms`` those of updates on the queue, which have a level of their own. ``side`` is the
    recipe's second model, if any.
    """

    step: int
    lr: float
    clock: StepTimer = field(default_factory=StepTimer)
    grad_norms: Sequence[float] = ()
    flush_norms: Sequence[float] = ()
    side: SideModel | None = None


@dataclass
class StepResult:
    """The result of a step. ``skipped``: why it, or the rest of its updates, was skipped, and on which prompts.

    ``grad_norms`` are the gradient norms of the applied updates, ``flush_norms`` that of an applied one on the queue,
    ``memory`` the largest peaks of all ranks (GiB); ``empty`` means that there was nothing to train on.
    """

    minibatches: list[MiniBatch] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    flush_norms: list[float] = field(default_factory=list)
    skipped: str | None = None
    empty: bool = False


def update_policy(
    policy: Policy,
    groups: list[Group],
    config: Config,
    encode_trace: Callable[[Group, int], np.ndarray],
    context: StepContext,
    due: Sequence[Group] = (),
) -> StepResult:
    """Make all updates of one step on its graded groups, and then one on those of the queue that are ``due``.

    A non-finite reward or log-prob skips the whole step.
    """
    clock = context.clock
    minibatches = build_minibatches(policy.layout, groups, config, encode_trace)
    if due:
        minibatches.append(plan_minibatch(policy.layout, list(due), config, encode_trace, deferred=True))
    with clock("logprob"), phase("log-prob passes"):
        agreement, offenders = logprob_passes(policy, minibatches, config)
    if offenders is not None:
        return StepResult(minibatches, agreement, skipped=bad_weights(policy) + offenders)
    if context.side:
        with clock("side"), phase("second model's update"):
            side = context.side.advance(minibatches, context.step)
        if side.fault:
            return StepResult(minibatches, agreement, skipped=bad_weights(context.side.policy) + side.fault)
        agreement |= side.metrics
    with clock("update"), phase("update"):
        result = run_updates(policy, minibatches, config, context)
    if result.skipped:
        result.skipped = bad_weights(policy) + result.skipped
    for minibatch in minibatches:
        minibatch.forget_routing()
    result.minibatches, result.metrics = minibatches, agreement | result.metrics
    return result


def run_updates(policy: Policy, minibatches: list[MiniBatch], config: Config, context: StepContext) -> StepResult:
    """Make one optimizer update per mini-batch, skipping those with nothing to train on, the same on every rank."""
    objective, result = config.objective, StepResult()
    correction = Correction.of(config.rollout)
    reports = []
    for u, minibatch in enumerate(minibatches):
        if not minibatch.sequences:
            continue
        if u > 0 and objective.refresh_pair_weights and needs_sums(objective) and minibatch.rollouts:
            minibatch.logp["now"] = current_logprobs(policy, minibatch, objective)
            share_sums(policy, minibatch)
        terms = sequence_terms(
            minibatch.groups,
            minibatch.sequences,
            minibatch.sums,
            objective,
            correction,
            config.rollout.max_response_tokens,
            step=context.step,
            deferred=minibatch.deferred,
            entropies=minibatch.entropies,
        )
        batches = minibatch.batches
        streams = [_streams(policy, minibatch, terms, b, config, correction) for b in range(len(batches))]
        with phase("training pass"):
            policy.accumulate(batches, streams)
            stats = share_update_stats(policy, streams)
        report = update_metrics(stats, terms, objective, minibatch.deferred)
        report |= {f"objective/{name}": share for name, share in scheduled(objective, context.step).items()}
        reports.append(report)
        result.memory = {name: max(result.memory.get(name, 0.0), peak) for name, peak in stats.memory.items()}
        before, applied = context.grad_norms, result.grad_norms
        if minibatch.deferred:
            before, applied = context.flush_norms, result.flush_norms
        loss = report["flush/loss" if minibatch.deferred else "loss/total"]
        limits = (config.trainer, recent_level([*before, *applied]))
        if reason := _reason_to_skip(policy, minibatch, streams, stats.norm, loss, *limits):
            of_queue = " (of the queue)" if minibatch.deferred else ""
            result.skipped = f"update {u + 1} of {len(minibatches)}{of_queue}: {reason}"
            break  # further updates would build on a skipped one
        with phase("optimizer step"):
            policy.step(context.lr)
        applied.append(stats.norm)
    result.empty = not reports
    result.metrics = {
        name: _mean([report[name] for report in reports if name in report]) for report in reports for name in report
    }
    return result


def _reason_to_skip(
    policy: Policy,
    minibatch: MiniBatch,
    streams: list[TokenStreams],
    norm: float,
    loss: float,
    trainer: Trainer,
    usual: float | None,
) -> str | None:
    """Return why this update must not be applied, and on which prompts; None if it may. The same on every rank."""
    if not (math.isfinite(norm) and math.isfinite(loss)):
        with phase("search for non-finite values"):
            return f"gradient norm {norm:g}, loss {loss:g}: {bad_gradient(policy, minibatch, streams)}"
    bound, way_out = trainer.max_grad_norm_to_apply, "if this is its new level, resume with"
    if bound and norm > bound:
        found = f"gradient norm {norm:.4g} exceeds trainer.max_grad_norm_to_apply: {bound:g}"
        return f"{found}, on prompts {prompts(minibatch)}; {way_out} a higher one, or 0"
    if trainer.spike_factor and usual and norm > trainer.spike_factor * usual:
        times = f"{norm / usual:.3g} times the median of the last applied updates ({usual:.4g})"
        found = f"gradient norm {norm:.4g}, {times}"
        return f"{found}, on prompts {prompts(minibatch)}; {way_out} trainer.spike_factor higher, or 0"
    return None


def _streams(
    policy: Policy, minibatch: MiniBatch, terms: BatchTerms, b: int, config: Config, correction: Correction
) -> TokenStreams:
    """Return the loss input of micro-batch ``b`` (rollouts first, then traces)."""
    is_rollout = b < len(minibatch.rollouts)
    batch = minibatch.batches[b]
    known = {
        name: minibatch.logp[name][b].to(device()) if is_rollout and minibatch.logp.get(name) else None
        for name in ("old", "rollout", "reference", "advantage")
    }
    return TokenStreams.of(
        [terms.sequences[place] for place in batch.places],
        batch.counts,
        device=device(),
        objective=config.objective,
        correction=correction,
        context_group=policy.context_group,
        share=terms.share,
        old_N=known["old"],
        rollout_N=known["rollout"],
        reference_N=known["reference"],
        advantage_N=known["advantage"],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
