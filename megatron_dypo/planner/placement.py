"""Decide where a run keeps its frozen reference (model.reference_on: auto), once, from the planned peak; and whether
two models have room at all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import stages_of
from megatron_dypo.errors import UserError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.objectives.coefficients import keeps_reference
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.planner.cluster import Candidate
from megatron_dypo.planner.memory import GIB, policy_need
from megatron_dypo.planner.show_plan import work_of

if TYPE_CHECKING:
    from megatron_dypo.runtime.distributed import Layout


def place_reference(
    config: Config, shape: ModelShape, layout: Layout, memory: int | None, engine: float
) -> tuple[Literal["auto", "device", "host"], str]:
    """Return (``device`` or ``host``, a log line with the reason); without a reference, the key as it is and "".

    ``model.dtype`` of the run must be resolved. ``memory``: bytes of a GPU, None without CUDA; ``engine``: bytes that a
    rollout engine occupies permanently.
    """
    if not any(keeps_reference(stage.config.objective) for stage in stages_of(config)):
        return config.model.reference_on, ""
    candidate = replace(candidate_of(config, layout), reference="device")
    need = policy_need(shape, candidate, work_of(config, None, None, 0.5, 0.25), config.model.dtype)
    size = f"reference ({need.reference / GIB:.3g} GiB a rank)"
    if config.model.reference_on != "auto":
        return config.model.reference_on, f"{size}: on the {config.model.reference_on}, as model.reference_on says"
    if config.trainer.offload:
        return "host", f"{size}: in host memory, because trainer.offload would move it there every step"
    if memory is None:
        return "device", f"{size}: with the weights, which are in host memory"
    peak = need.policy - need.reference
    sum_ = f"{peak / GIB:.0f} planned, {engine / GIB:.0f} the engine's, of {memory / GIB:.0f}"
    if peak + need.reference + engine <= memory:
        return "device", f"{size}: on the device, because it fits ({sum_})"
    return "host", f"{size}: in pinned host memory, because it does not fit on the device ({sum_})"


def require_room(config: Config, shape: ModelShape, layout: Layout, memory: int | None) -> None:
    """Raise UserError where what two models hold in training exceeds a GPU's ``memory`` (bytes; None without CUDA)."""
    if memory is None or recipe(config.objective).side is None:
        return
    need = policy_need(shape, candidate_of(config, layout), work_of(config, None, None, 0.5, 0.25), config.model.dtype)
    if need.static > memory:
        method, held, has = config.objective.method, f"{need.static / GIB:.0f} GiB", f"{memory / GIB:.0f}"
        raise UserError(
            f"objective.method: {method} trains a second model: weights, gradients and optimizer state of both are "
            f"{held} a rank at this layout, and a GPU has {has}: cut them by parallel.tensor, parallel.pipeline or "
            "optimizer.distributed (`plan` lists layouts that fit)"
        )


def candidate_of(config: Config, layout: Layout) -> Candidate:
    """Return the layout of the current run as a candidate."""
    return Candidate(
        tensor=layout.tp,
        pipeline=layout.pp,
        virtual=layout.vpp,
        context=layout.cp,
        data=layout.dp,
        recompute=config.model.recompute,
        placement="turns" if config.trainer.offload else "beside",
        expert=layout.ep,
        expert_tensor=layout.etp,
        sharded=config.optimizer.distributed,
    )
