"""One mini-batch of a step: its sequences, and this rank's micro-batches of them. Legend: N loss tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from megatron_dypo.batching.micro_batch import MicroBatch
from megatron_dypo.batching.plan import plan_micro_batches
from megatron_dypo.batching.sequences import training_sequences
from megatron_dypo.config.schema import Config
from megatron_dypo.objectives.coefficients import SequenceSums
from megatron_dypo.records import Group, Kind, Sequence
from megatron_dypo.rollout.routed import packed_experts
from megatron_dypo.runtime.distributed import Layout


@dataclass
class Work:
    """One mini-batch: all its sequences, and this rank's micro-batches (rollouts first, teacher traces apart)."""

    groups: list[Group]
    sequences: list[Sequence]
    rollouts: list[MicroBatch]
    teachers: list[MicroBatch]
    logp: dict[str, list[Tensor]] = field(default_factory=dict)  # per rollout micro-batch [N], last stage only
    sums: list[SequenceSums | None] = field(default_factory=list)

    def forget_routing(self) -> None:
        """When it has been trained on: the engine may need the device."""
        for batch in self.rollouts + self.teachers:
            batch.routing = batch.experts_TLK = None


def make_work(
    layout: Layout, groups: list[Group], config: Config, encode_trace: Callable[[Group, int], np.ndarray]
) -> list[Work]:
    """Cut the groups into mini-batches of whole prompts and plan each; only the micro-batches differ between ranks."""
    works = []
    for part in np.array_split(np.arange(len(groups)), config.objective.updates_per_rollout):
        chosen = [groups[i] for i in part]
        sequences = training_sequences(chosen, config.objective.method, encode_trace)
        packed = {}
        for kind in Kind:
            places = [place for place, sequence in enumerate(sequences) if sequence.kind == kind]
            lengths = [sequences[place].length for place in places]
            budget = config.data.max_tokens_per_microbatch
            shares = plan_micro_batches(lengths, layout.dp, budget, layout.micro_batch_multiple)
            batches = [
                MicroBatch.pack(sequences, [places[i] for i in members], config.rollout.temperature, **layout.packing)
                for members in shares[layout.dp_rank]
            ]
            if kind == Kind.ROLLOUT and config.policy.routing_replay == "rollout":
                for batch in batches:
                    batch.experts_TLK = packed_experts(batch, sequences, chosen)
            packed[kind] = batches
        works.append(Work(chosen, sequences, packed[Kind.ROLLOUT], packed[Kind.TEACHER]))
    return works
