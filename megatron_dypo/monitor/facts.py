"""A run in a few words and numbers: what it is, and its headline figures."""

from __future__ import annotations

import numpy as np

from megatron_dypo.monitor.axis import show
from megatron_dypo.monitor.run_data import Run, is_share

FINAL_STEPS = 10  # a final figure is a mean over up to so many steps: a single batch is noise
COMPARED = (
    ("loss/total", "final loss"),
    ("train/grad_norm", "final gradient norm"),
    ("policy/entropy", "final entropy"),
    ("rollout/response_tokens", "final response length"),
    ("rollout/mismatch_mean", "final mismatch"),
)


def facts(run: Run) -> list[str]:
    """What one asks first about a run, as short texts, from whatever of it the configuration holds."""
    prompts, samples = run.setting("data", "prompts_per_step"), run.setting("rollout", "samples_per_prompt")
    known = [
        ("method", run.setting("objective", "method")),
        ("model", run.setting("model", "hf") or run.setting("model", "preset")),
        ("data", run.setting("data", "train")),
        ("batch", f"{prompts} prompts × {samples} responses" if prompts and samples else None),
        ("learning rate", run.setting("optimizer", "lr")),
        ("seed", run.setting("trainer", "seed")),
    ]
    return [f"{name} {value}" for name, value in known if value is not None]


def tiles(run: Run, evaluations: int | None = 4) -> list[tuple[str, str, str]]:
    """(label, value, small print) of the headline numbers, with at most so many evaluations (None: all)."""
    found = [("steps", f"{max(int(run.steps[-1]), 0):,}", "")]
    seconds = run.known("time/step")
    if len(seconds):
        found.append(("training time", _duration(seconds.sum()), f"{np.median(seconds):.3g} s a step (median)"))
    rewards = run.known("reward/mean")
    if len(rewards):
        count = _final(rewards)
        small = f"last {count} steps; first {count}: {rewards[:count].mean():.3f}" if count > 1 else ""
        found.append(("final reward", f"{rewards[-count:].mean():.3f}", small))
    for key in [key for key in run.columns if key.startswith("eval/")][:evaluations]:
        known = np.flatnonzero(np.isfinite(run.columns[key]))
        if len(known):
            found.append(_eval_tile(key, run.steps[known], run.columns[key][known]))
    speed = run.known("perf/tokens_per_second")
    if len(speed):
        found.append(("throughput", f"{np.median(speed):,.0f}", "tokens per second (median)"))
    for key, label, where in (
        ("train/skipped_steps", "skipped steps", "see “Left out”"),
        ("train/empty_steps", "empty steps", "see “Left out”"),
        ("train/warnings", "warnings", "listed below"),
    ):
        if run.known(key).any():
            found.append((label, f"{run.known(key)[-1]:,.0f}", where))
    return found


def final_figures(run: Run) -> list[tuple[str, str, str]]:
    """The tiles, and the means over the last steps of more metrics: (label, value, small print)."""
    found = tiles(run, evaluations=None)
    for key, label in COMPARED:
        values = run.known(key)
        if len(values):
            count = _final(values)
            small = f"last {count} steps" if count > 1 else "last step"
            found.append((label, show(float(values[-count:].mean()), False), small))
    for key, label in (("perf/host_memory_gib", "host memory"), ("perf/device_memory_gib", "device memory")):
        values = run.known(key)
        if len(values) and values.any():
            found.append((label, f"{values.max():.2f} GiB", "highest"))
    return found


def _final(values: np.ndarray) -> int:
    return max(1, min(FINAL_STEPS, len(values) // 2))


def _eval_tile(key: str, steps: np.ndarray, values: np.ndarray) -> tuple[str, str, str]:
    percent = is_share(values)
    label = key.removeprefix("eval/").replace("/", " ").replace("_", " ")
    before, after = show(float(values[0]), percent), show(float(values[-1]), percent)
    if len(values) == 1:
        return label, after, f"step {steps[0]:,}"
    return label, f"{before} → {after}", f"held out, step {steps[0]:,} → {steps[-1]:,}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
