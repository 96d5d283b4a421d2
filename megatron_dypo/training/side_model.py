"""Train a second model alongside the policy; on a step's responses it gives each token its advantage.

It is a separate ``Policy`` at the same layout, started from the same weights, with its own optimizer and its own part
of the checkpoint. ``sides.py`` says which one a recipe uses.

Legend: N loss tokens of a micro-batch on this rank, n tokens of one response.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_dypo.config.schema import Config, Objective, Optimizer
from megatron_dypo.config.stages import learning_rate
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.objectives.token_advantages import Sums
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind
from megatron_dypo.runtime.distributed import Layout, all_gather_objects
from megatron_dypo.training.minibatch import MiniBatch
from megatron_dypo.training.responses import own_tokens

Place = tuple[int, int]  # (mini-batch, index among its sequences)


def side_config(config: Config) -> Config:
    """Return the second model's configuration: its optimizer, no reference, a loss of slopes alone, and routers that
    choose for themselves, even if the policy's replay.
    """
    sharding = {name: getattr(config.optimizer, name) for name in ("distributed", "overlap_grad_reduce")}
    adam = {name: getattr(config.side, name) for name in Optimizer.model_fields if name not in sharding}
    own = {"optimizer": Optimizer(**adam | sharding), "objective": Objective(method="sft")}
    return config.model_copy(update=own | {"policy": config.policy.model_copy(update={"routing_replay": "off"})})


@dataclass
class SideResult:
    """The result of the second model's part of a step: metrics, and why the step must be skipped, if it must."""

    metrics: dict[str, float] = field(default_factory=dict)
    fault: str | None = None


class SideModel(ABC):
    """A second model. ``advance`` trains it on a step's responses and sets ``logp["advantage"]`` of each mini-batch."""

    model: type[Policy] = Policy
    policy: Policy

    def __init__(self, config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]):
        self.config, self.layout = config, layout
        self.own = side_config(config)
        self.policy = self.model(self.own, shape, layout, read_weights)

    @abstractmethod
    def advance(self, minibatches: list[MiniBatch], step: int) -> SideResult:
        """Train on a step's responses. Reads the mini-batches' log-probs, of old policy and reference. Collective."""

    def learn(self, batches: list[MicroBatch], streams: list[Any], step: int) -> float:
        """Run one update with the loss given by each micro-batch's ``streams``; return the gradient norm.

        The update is skipped if the norm is not finite.
        """
        self.policy.accumulate(batches, streams)
        norm = max(all_gather_objects(self.policy.grad_norm()), key=lambda norm: (not math.isfinite(norm), norm))
        if math.isfinite(norm):
            self.policy.step(learning_rate(step, self.own.optimizer))
        return norm

    @property
    def speaks(self) -> bool:
        """Return whether this rank reports what all of its context- and tensor-parallel ranks know."""
        return self.layout.owns_logprobs and self.layout.cp_rank == 0

    def shared(self, mine: dict[Place, Any]) -> dict[Place, Any]:
        """Exchange what is known of single responses; every rank that holds a response's tokens may contribute."""
        everyone = all_gather_objects(mine if self.speaks else {})
        return {place: value for part in everyone for place, value in part.items()}

    def whiten(self, minibatches: list[MiniBatch], raw: dict[Place, Tensor], sample: bool) -> dict[str, float]:
        """Set each mini-batch's stream of advantages, whitened over all tokens of the step; return their metrics."""
        mine = sum(map(Sums.of, raw.values()), Sums()) if self.speaks else Sums()
        sums = sum(all_gather_objects(mine), Sums())
        for m, minibatch in enumerate(minibatches):
            minibatch.logp["advantage"] = [
                own_tokens(batch, [sums.whiten(raw[m, place], sample) for place in batch.places])
                for batch in minibatch.rollouts
                if self.layout.is_last_stage
            ]
        return {"advantage/mean": sums.total / sums.count} if sums.count else {}


def response_rewards(m: int, minibatch: MiniBatch) -> list[tuple[Place, float]]:
    """Return each packed response and its reward, in the order of the sequences."""
    return [
        ((m, place), minibatch.groups[sequence.group].responses[sequence.sample].reward)
        for place, sequence in enumerate(minibatch.sequences)
        if sequence.kind == Kind.ROLLOUT
    ]
