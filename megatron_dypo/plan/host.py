"""Bytes of host memory that a trainer's rank keeps for its weights, beyond the process itself (docs/memory.md)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.plan.cluster import Candidate, Work
from megatron_dypo.plan.memory import WIDTHS, held, policy_need
from megatron_dypo.policy.host_memory import rounded
from megatron_dypo.policy.shape import ModelShape


@dataclass(frozen=True)
class HostNeed:
    """``reference`` and ``offload`` are pinned for the length of the run; ``snapshot`` goes when a save is written."""

    reference: float
    offload: float
    snapshot: float

    @property
    def total(self) -> float:
        return self.reference + self.offload + self.snapshot


def host_need(shape: ModelShape, candidate: Candidate, work: Work, dtype: str = "bf16") -> HostNeed:
    """Of the busiest rank. With P parameters, w bytes a weight, s bytes a parameter of optimizer state, d shards:

    reference on the host w P; trainer.offload (w + s / d) P, and w P for a reference on the device; a snapshot
    (w + s, and w for a reference) P over the ranks that hold the same weights, each of which writes a part.
    """
    weight, optimizer = WIDTHS[dtype]
    dense, experts = held(shape, candidate)
    need = policy_need(shape, candidate, work, dtype)
    written = weight + optimizer + (weight if candidate.reference != "none" else 0)
    moved = need.weights + need.optimizer + need.reference
    return HostNeed(
        reference=rounded(need.weights) if candidate.reference == "host" else 0.0,
        offload=rounded(moved) if candidate.placement == "turns" else 0.0,
        snapshot=written * (dense / candidate.copies + experts / candidate.expert_copies) if work.saves else 0.0,
    )
