"""List the targets on a GPU as data: limits of the stages' figures, and how far a figure is from its limit.

The limits are for an H200; docs/gpu-report.md says where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_report.results import Report


@dataclass(frozen=True)
class Target:
    """A target: ``figure`` of ``stage`` must be at most, or at least, ``limit``, in the figure's unit."""

    stage: str
    figure: str
    what: str
    limit: float
    unit: str
    at_most: bool = True


TARGETS = (
    Target("head", "t32768_100/over_products", "head, T 32768: time of three bare matrix products", 1.05, "x"),
    Target("head", "t32768_100/memory", "head, T 32768: naive's memory beyond the inputs", 2.0, "%"),
    Target("head", "t32768_42/over_cce", "head, T 32768, 42% active: time of cut-cross-entropy", 0.60, "x"),
    *(
        target
        for stage, model in (("update_1.5b", "Qwen2.5-1.5B"), ("update_4b", "Qwen3-4B"))
        for target in (
            Target(stage, "mfu/update", f"{model}: MFU of the whole update", 45.0, "%", at_most=False),
            Target(
                stage, "mfu/training", f"{model}: MFU of training pass and optimizer step", 52.0, "%", at_most=False
            ),
            Target(stage, "memory/off_plan", f"{model}: peak memory away from `plan`", 10.0, "%"),
        )
    ),
    Target("update_1.5b", "first_over_tenth", "Qwen2.5-1.5B: first training step against the tenth", 1.5, "x"),
    Target("update_4b", "reference/swap_device", "Qwen3-4B: reference in and out, kept on the device", 0.1, "s"),
    Target("update_4b", "reference/swap_host", "Qwen3-4B: reference in and out, from pinned memory", 0.6, "s"),
    Target("engine", "sync", "Qwen3-4B: in-process weight sync", 0.3, "s"),
)
NOT_MEASURED = "not measured"


def measured(target: Target, report: Report) -> float | None:
    """Return the figure; None if no GPU has given it."""
    if not report["measured"]:
        return None
    figure = report["stages"].get(target.stage, {}).get("figures", {}).get(target.figure)
    return None if figure is None else figure["value"]


def verdict(target: Target, report: Report) -> str:
    """Return ``met``, ``missed by 12%`` (of the limit), or ``not measured``."""
    value = measured(target, report)
    if value is None:
        return NOT_MEASURED
    beyond = (value - target.limit) / target.limit * (1 if target.at_most else -1)
    return f"**missed by {max(beyond, 0.001):.1%}**" if beyond > 0 else "met"
