"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megatron_dypo.config.schema import Optimizer


def learning_rate(step: int, optimizer: Optimizer) -> float:
    """Rate of a step (first is 1): warm-up to ``lr``, then constant, or decay to ``min_lr`` at ``schedule_steps``."""
    if step <= optimizer.warmup_steps:
        return optimizer.lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = min(1.0, (step - optimizer.warmup_steps) / (optimizer.schedule_steps - optimizer.warmup_steps))
    left = 1 - done if optimizer.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left
