"""A packed micro-batch as tensors: T tokens without padding between sequences, N of them with a loss.

Token j of a sequence predicts token j + 1, so the loss tokens of a sequence are the positions before its tail.
Legend: S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.records import Kind, Sequence


@dataclass
class MicroBatch:
    """``cu_seqlens`` [S + 1] offsets, a filler segment at the end included; streams are in the order of ``places``."""

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: list[int]
    loss_index_N: Tensor
    targets_N: Tensor
    temperature_N: Tensor
    places: list[int]
    counts: list[int]

    @classmethod
    def pack(cls, sequences: list[Sequence], places: list[int], temperature: float, multiple: int = 1) -> MicroBatch:
        """Pack ``sequences[place]`` for each place. T is rounded up to ``multiple`` by a filler segment without loss;
        an empty micro-batch is filler alone. Rollouts carry ``temperature``, teacher traces 1."""
        chosen = [sequences[place] for place in places]
        lengths = [sequence.length for sequence in chosen]
        filler = -sum(lengths) % multiple if chosen else multiple
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(int)
        ids = np.concatenate([sequence.ids for sequence in chosen] + [np.zeros(filler, np.int32)])
        positions = np.concatenate([np.arange(n) for n in [*lengths, filler]])
        index = [
            np.arange(start + s.prompt_length - 1, start + s.length - 1)
            for start, s in zip(offsets, chosen, strict=False)
        ]
        loss_index = np.concatenate(index).astype(np.int64) if index else np.zeros(0, np.int64)
        counts = [sequence.loss_tokens for sequence in chosen]
        temperatures = [temperature if sequence.kind == Kind.ROLLOUT else 1.0 for sequence in chosen]
        return cls(
            ids_T=torch.from_numpy(ids.astype(np.int64)),
            positions_T=torch.from_numpy(positions.astype(np.int64)),
            cu_seqlens=[*offsets.tolist(), *([int(offsets[-1]) + filler] if filler else [])],
            loss_index_N=torch.from_numpy(loss_index),
            targets_N=torch.from_numpy(ids.astype(np.int64)[loss_index + 1]),
            temperature_N=spread(temperatures, counts),
            places=places,
            counts=counts,
        )

    def split(self, values_N: Tensor) -> list[Tensor]:
        """Per-token values, one tensor a sequence."""
        return list(values_N.split(self.counts))


def spread(values: SequenceOf[float], counts: list[int]) -> Tensor:
    """One value per sequence -> fp32 [N], repeated over its loss tokens."""
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(counts, dtype=torch.int64)).float()
