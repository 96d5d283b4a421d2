"""Compute a case without sequences: a token function's curve, shares, stages and a queue over steps."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dypo.config.schema import Config, Objective
from megatron_dypo.config.stages import stage_at, stages_of
from megatron_dypo.errors import UserError
from megatron_dypo.kernels import LossRule, empty_sums, grouped_loss
from megatron_dypo.kernels.grouped_loss import COEFFICIENTS
from megatron_dypo.objectives.queue import DeferredQueue
from megatron_dypo.objectives.recipes import scheduled, shape


def simulate(unsolved_of_step: Any, objective: Objective) -> dict[str, Any]:
    """Simulate a queue of ``queue_size``: what it releases and what it keeps after each step, in both orders."""
    if not isinstance(unsolved_of_step, list) or not all(isinstance(prompts, list) for prompts in unsolved_of_step):
        raise UserError("settings.unsolved_of_step: expected a list of lists, the prompts that failed in each step")
    found: dict[str, Any] = {}
    for order in ("newest", "oldest"):
        queue: DeferredQueue[Any] = DeferredQueue(objective.queue_size, order)
        steps: list[dict[str, Any]] = []
        for prompts in unsolved_of_step:
            queue.add(prompts)
            flushed = queue.due
            queue.remove_due()
            steps.append({"flushed": flushed or None, "left": queue.waiting})
        found[f"{order}_first"] = steps
    return found


def curve(probabilities: list[float], objective: Objective) -> dict[str, Any]:
    """Return the token function ``shaped`` and its derivative in logp at these probabilities, from the grouped loss."""
    logp_N = torch.tensor(probabilities, dtype=torch.float64).log()
    table_CS = torch.zeros(len(COEFFICIENTS), 1, dtype=torch.float64)
    table_CS[COEFFICIENTS.index("shaped")] = -1.0
    rule = LossRule(shape=shape(objective), shape_gamma=objective.shape_gamma)
    f_N, df_N = grouped_loss(logp_N, torch.tensor([0, len(logp_N)]), table_CS, empty_sums(1), rule)
    return {"f": f_N.tolist(), "df_dlogp": df_N.tolist()}


def schedules(steps: int | list[int], objective: Objective) -> dict[str, Any]:
    """Return the shares that change with the step, at these steps or at one."""
    found = [scheduled(objective, step) for step in ([steps] if isinstance(steps, int) else steps)]
    if not all(found):
        raise UserError(f"settings.steps: objective.method: {objective.method} has no share that changes with the step")
    return found[0] if isinstance(steps, int) else {name: [share[name] for share in found] for name in found[0]}


def stages_by_step(config: Config) -> dict[str, list[Any]]:
    """Return each step's stage (from 0) and learning rate, over all steps of a run."""
    stages = stages_of(config)
    at = [(stage_at(stages, step), step) for step in range(1, sum(stage.config.trainer.steps for stage in stages) + 1)]
    return {"stage_of_step": [stage.index for stage, _ in at], "lr_of_step": [stage.lr(step) for stage, step in at]}
