"""Fit the constants of the time estimates to a run: ``plan CONFIG --calibrate RUN_DIR``.

Each recorded step is estimated from what it sampled and trained. The first two thirds of the steps are fitted, phase by
phase; the rest are held out, so that their error is a prediction error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_dypo.config.schema import Config
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.monitor.progress import print_table
from megatron_dypo.planner.cluster import Candidate, Cluster, planned_shape
from megatron_dypo.planner.memory import engine_room, policy_need
from megatron_dypo.planner.rates import Rates
from megatron_dypo.planner.recorded_run import TIMES, RecordedStep, read_run
from megatron_dypo.planner.steptime import Seconds, step_seconds

PHASES = {  # phases of a step, and the constants fitted to each, given those of the phases before it
    "rollout": ("decode_step", "stream"),
    "sync": ("load_tensor", "link"),
    "logprob": ("forward",),
    "update": ("train",),
}
FITTED = 2 / 3  # of the steps

Estimate = Callable[[Rates, RecordedStep], Seconds]


@dataclass(frozen=True)
class PhaseError:
    """A phase's mean measured seconds, and the mean relative errors of its estimates.

    ``before``: with the planner's own constants, over all steps; ``fit``: over the fitted steps; ``held_out``: over the
    others.
    """

    name: str
    measured: float
    before: float
    fit: float
    held_out: float


@dataclass(frozen=True)
class Calibration:
    """The fitted ``rates``, their errors, and the numbers of fitted and of held-out steps."""

    rates: Rates
    errors: list[PhaseError]
    fitted: int
    held_out: int


def calibrated(cluster: Cluster, config: Config, run_dir: Path, gpu: str, prompt_tokens: float | None) -> Cluster:
    """Return the cluster with the constants that fit the run, and print these with their errors.

    ``gpu`` names the data sheet. Raises UserError as ``read_run``.
    """
    shape = planned_shape(config.model)
    run = read_run(run_dir, shape, prompt_tokens)
    found = calibrate(run.steps, shape, run.candidate, cluster)
    print(
        f"{run_dir}: {run.candidate} on {run.gpu or 'CPUs'}, {found.fitted} steps fitted, {found.held_out} later ones "
        f"held out. Fractions are of the data sheet of {gpu}; errors are means of |estimate / measured - 1|."
    )
    rows = [
        (each.name, f"{each.measured:.3g}", *(f"{error:.0%}" for error in (each.before, each.fit, each.held_out)))
        for each in found.errors
    ]
    print_table(("phase", "measured s", "error as planned", "fitted", "held out"), rows, {"phase"})
    values = [(f.name, getattr(cluster.rates, f.name), getattr(found.rates, f.name)) for f in fields(Rates)]
    changed = [(name, f"{old:.3g}", f"{new:.3g}") for name, old, new in values if new != old]
    print_table(("constant", "as planned", "fitted"), changed, {"constant"})
    return replace(cluster, rates=found.rates)


def calibrate(steps: Sequence[RecordedStep], shape: ModelShape, candidate: Candidate, cluster: Cluster) -> Calibration:
    """Fit the timings of a run at the layout ``candidate``; ``cluster`` describes the run's GPUs."""
    own = replace(cluster, gpus=candidate.ranks + candidate.server_gpus)

    def estimate(rates: Rates, step: RecordedStep) -> Seconds:
        need = policy_need(shape, candidate, step.work)
        room = max(0.0, engine_room(shape, candidate, own, need))
        return step_seconds(shape, candidate, replace(own, rates=rates), step.work, replace(need, engine=room))

    first = round(FITTED * len(steps))
    rates, errors = _fit(estimate, steps[:first], cluster.rates), []
    for name in TIMES:
        if any(step.seconds[name] for step in steps[:first]) and any(step.seconds[name] for step in steps[first:]):
            measured = fmean(step.seconds[name] for step in steps)
            before = _error(estimate, cluster.rates, steps, name)
            after = [_error(estimate, rates, part, name) for part in (steps[:first], steps[first:])]
            errors.append(PhaseError(name, measured, before, *after))
    return Calibration(rates, errors, first, len(steps) - first)


def _fit(estimate: Estimate, steps: Sequence[RecordedStep], rates: Rates) -> Rates:
    """Return the constants with the least squared relative error, phase by phase.

    If a phase's constants cannot all be positive, one of them is fitted alone. One that the phase does not depend on
    keeps its value.
    """
    for phase, names in PHASES.items():
        timed = [step for step in steps if step.seconds[phase] > 0]
        if timed:
            together = [_least_squares(estimate, timed, phase, names, rates)]
            alone = [_least_squares(estimate, timed, phase, (name,), rates) for name in names]
            tried = next(filter(None, [list(filter(None, together)), list(filter(None, alone))]), [rates])
            rates = min(tried, key=lambda each: _error(estimate, each, timed, phase))
    return rates


def _least_squares(
    estimate: Estimate, steps: Sequence[RecordedStep], phase: str, names: Sequence[str], rates: Rates
) -> Rates | None:
    """Return the rates with the constants ``names`` that fit the phase best; None if they are not all positive."""

    def estimated(tried: Rates) -> np.ndarray:
        return np.array([getattr(estimate(tried, step), phase) for step in steps])

    measured, now = np.array([step.seconds[phase] for step in steps]), estimated(rates)
    values = np.array([_linear(name, getattr(rates, name)) for name in names])
    doubled = [replace(rates, **{name: _linear(name, 2 * x)}) for name, x in zip(names, values.tolist(), strict=True)]
    slopes = np.stack([estimated(each) - now for each in doubled], axis=1) / values
    wanted = measured - now + slopes @ values
    found = np.linalg.lstsq(slopes / measured[:, None], wanted / measured, rcond=None)[0]
    if not slopes.any(axis=0).all() or (found <= 0).any():
        return None
    return replace(rates, **{name: _linear(name, x) for name, x in zip(names, found.tolist(), strict=True)})


def _linear(name: str, value: float) -> float:
    """Return the term that seconds are linear in: a constant in seconds, or a fraction's inverse. Self-inverse."""
    return value if name in ("decode_step", "load_tensor") else 1 / value


def _error(estimate: Estimate, rates: Rates, steps: Sequence[RecordedStep], phase: str) -> float:
    """Return the mean relative error of a phase's estimates over the steps that have it."""
    timed = [step for step in steps if step.seconds[phase] > 0]
    return fmean(abs(getattr(estimate(rates, step), phase) / step.seconds[phase] - 1) for step in timed)
