"""A packed micro-batch as tensors: this rank's T tokens, N of them with a loss.

Token j of a sequence predicts token j + 1, so the loss tokens of a sequence are the positions before its tail. Without
context parallelism sequences are contiguous. With it each is padded and cut into 2 x CP equal slices, of which rank r
holds slices r and 2 x CP - 1 - r: late tokens cost causal attention more than early ones, and this gives all ranks
equal work. It is the order that mcore's RoPE and Transformer Engine expect of packed (THD) sequences. A rank's T
tokens, its loss tokens and its ``counts`` are those of its slices alone. Legend: S sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.records import Kind, Sequence

if TYPE_CHECKING:
    from megatron_dypo.policy.moe import Routing


def aligned_to(context: int) -> int:
    """Return the number that divides a segment's length."""
    return 2 * context if context > 1 else 1


def held_tokens(cu_seqlens: list[int], context: int) -> np.ndarray:
    """Return [context, T / context]: the packed tokens of each rank, in the order in which it holds them."""
    if context == 1:
        return np.arange(cu_seqlens[-1]).reshape(1, -1)
    shares = []
    for start, end in itertools.pairwise(cu_seqlens):
        slices = np.arange(start, end).reshape(2 * context, -1)
        shares.append(np.concatenate([slices[:context], slices[: context - 1 : -1]], axis=1))
    return np.concatenate(shares, axis=1)


@dataclass
class MicroBatch:
    """One micro-batch on this rank.

    ``owner_T`` maps each token to an index into ``places``, -1 for padding. ``cu_seqlens`` [S + 1] are the offsets over
    all context-parallel ranks' tokens, including a filler segment at the end; streams are in the order of ``places``;
    ``tail_N`` is a target's position in its sequence's tail. ``given_TLK`` is the rollout engine's choice of K experts
    in this rank's L layers, valid where ``is_given_T``; ``routing`` is where the policy records the choice to replay.
    """

    ids_T: Tensor
    positions_T: Tensor
    owner_T: Tensor
    cu_seqlens: list[int]
    loss_index_N: Tensor
    targets_N: Tensor
    tail_N: Tensor
    temperature_N: Tensor
    places: list[int]
    counts: list[int]
    given_TLK: Tensor | None = None
    is_given_T: Tensor | None = None
    routing: Routing | None = None

    @classmethod
    def pack(
        cls,
        sequences: list[Sequence],
        places: list[int],
        temperature: float,
        tensor: int = 1,
        context: int = 1,
        context_rank: int = 0,
    ) -> MicroBatch:
        """Pack ``sequences[place]`` for each place; rollouts carry ``temperature``, teacher traces 1.

        A filler segment without loss makes T a multiple of ``tensor``, the number of sequence-parallel slices; an empty
        micro-batch is filler alone.
        """
        chosen = [sequences[place] for place in places]
        align = aligned_to(context)
        lengths = [-(-sequence.length // align) * align for sequence in chosen]
        multiple = align * tensor
        filler = -sum(lengths) % multiple if chosen else multiple
        lengths += [filler] if filler else []
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        ids, tail = np.zeros(cu_seqlens[-1] + 1, np.int64), np.full(cu_seqlens[-1], -1)
        owner = np.full(cu_seqlens[-1], -1)
        for i, (start, sequence) in enumerate(zip(cu_seqlens, chosen, strict=False)):
            ids[start : start + sequence.length] = sequence.ids
            owner[start : start + sequence.length] = i
            before = start + sequence.prompt_length - 1
            tail[before : before + sequence.loss_tokens] = np.arange(sequence.loss_tokens)
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)

        held_T = held_tokens(cu_seqlens.tolist(), context)[context_rank]
        loss_index_N = np.flatnonzero(tail[held_T] >= 0)
        target_N = held_T[loss_index_N]
        counts = np.diff(np.searchsorted(loss_index_N, cu_seqlens // context)).tolist()[: len(chosen)]
        temperatures = [temperature if sequence.kind == Kind.ROLLOUT else 1.0 for sequence in chosen]
        return cls(
            ids_T=torch.from_numpy(ids[held_T]),
            positions_T=torch.from_numpy(positions[held_T]),
            owner_T=torch.from_numpy(owner[held_T]),
            cu_seqlens=cu_seqlens.tolist(),
            loss_index_N=torch.from_numpy(loss_index_N),
            targets_N=torch.from_numpy(ids[target_N + 1]),
            tail_N=torch.from_numpy(tail[target_N]),
            temperature_N=spread(temperatures, counts),
            places=places,
            counts=counts,
        )

    def split(self, values_N: Tensor) -> list[Tensor]:
        """Split per-token values into one tensor per sequence."""
        return list(values_N.split(self.counts))


def spread(values: SequenceOf[float], counts: list[int]) -> Tensor:
    """Repeat one value per sequence over its loss tokens: fp32 [N]."""
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(counts, dtype=torch.int64)).float()
