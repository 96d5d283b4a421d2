"""Send the engine's routing of responses to the ranks that train on them, one micro-batch of all ranks at a time.

A rank keeps the routing of the responses that it sampled; every rank knows all ranks' micro-batches from the plan.
Legend: T tokens of a micro-batch on this rank, n tokens of prompt and response except the last, L layers (when sent:
the receiver's), K experts of a token.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dypo.errors import TrainingError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Kind
from megatron_dypo.runtime.distributed import all_gather_objects, device
from megatron_dypo.training.minibatch import MiniBatch


def give_routing(policy: Policy, minibatches: list[MiniBatch]) -> None:
    """Set ``given_TLK`` and ``is_given_T`` of this rank's rollout micro-batches. Collective.

    Raises TrainingError if a response lacks its routing, or has another model's.
    """
    layout, shape = policy.layout, policy.shape
    dtype = np.dtype(np.uint8 if shape.num_experts <= 256 else np.int16)
    receivers = all_gather_objects((layout.dp_rank, policy.layers))
    width = len(policy.layers), shape.router_topk
    for minibatch in minibatches:
        for number, batch in enumerate(minibatch.rollouts):
            mine = {
                place: _checked(minibatch, place, shape).astype(dtype)
                for places in (replica[number] for replica in minibatch.plan)
                for place in places
                if _group(minibatch, place).holder == layout.rank
            }
            sent = []
            for replica, layers in receivers:
                theirs, numbers = minibatch.plan[replica][number], [layer - 1 for layer in layers]
                sent.append(b"".join(mine[place][:, numbers].tobytes() for place in theirs if place in mine))
            tokens = [minibatch.sequences[place].length - 1 for place in batch.places]
            holders = [_group(minibatch, place).holder for place in batch.places]
            sizes = [0] * layout.world
            for holder, n in zip(holders, tokens, strict=True):
                sizes[holder] += n * math.prod(width) * dtype.itemsize
            parts = [io.BytesIO(part) for part in _exchange(sent, sizes)]
            routing_nLK = [
                np.frombuffer(parts[holder].read(n * math.prod(width) * dtype.itemsize), dtype).reshape(n, *width)
                for holder, n in zip(holders, tokens, strict=True)
            ]
            if routing_nLK:
                batch.given_TLK, batch.is_given_T = packed(batch, dict(enumerate(routing_nLK)))


def packed(batch: MicroBatch, routing_nLK: dict[int, np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return the routing [T, L, K], and [T] whether it is known: not at a sequence's last token, nor at padding.

    ``routing_nLK``: of the micro-batch's sequences that have one, by their index in ``places``.
    """
    first = next(iter(routing_nLK.values()))
    given_TLK = torch.from_numpy(np.zeros((len(batch.owner_T), *first.shape[1:]), first.dtype))
    is_given_T = torch.zeros(len(batch.owner_T), dtype=torch.bool)
    for i, experts_nLK in routing_nLK.items():
        mine = torch.nonzero((batch.owner_T == i) & (batch.positions_T < len(experts_nLK))).squeeze(1)
        given_TLK[mine] = torch.from_numpy(experts_nLK[batch.positions_T[mine].numpy()])
        is_given_T[mine] = True
    return given_TLK, is_given_T


def _group(minibatch: MiniBatch, place: int) -> Group:
    return minibatch.groups[minibatch.sequences[place].group]


def _checked(minibatch: MiniBatch, place: int, shape: ModelShape) -> np.ndarray:
    """Return the routing of a response that this rank holds."""
    sequence = minibatch.sequences[place]
    assert sequence.kind == Kind.ROLLOUT
    experts = _group(minibatch, place).responses[sequence.sample].experts
    if experts is None:
        raise TrainingError("policy.routing_replay: rollout, but the rollout has no routing")
    known, largest = experts.shape[1:], int(experts.max())
    wanted = sequence.length - 1, shape.num_layers, shape.router_topk
    if experts.shape != wanted or largest >= shape.num_experts:
        raise TrainingError(
            f"policy.routing_replay: rollout: a rollout has (layers, a token's experts) {known}, up to expert "
            f"{largest}; the model has {shape.num_layers}, {shape.router_topk} of {shape.num_experts}"
        )
    if (np.diff(np.sort(experts, axis=-1), axis=-1) == 0).any():
        raise TrainingError("policy.routing_replay: rollout: a rollout routes a token to one expert twice")
    return experts


def _exchange(sent: list[bytes], sizes: list[int]) -> list[bytes]:
    """Send ``sent[r]`` to rank r; return what each rank sent here, ``sizes`` bytes. Collective."""
    if len(sent) == 1:
        return sent
    outgoing = torch.frombuffer(bytearray(b"".join(sent) or b"\0"), dtype=torch.uint8)[: sum(map(len, sent))]
    incoming = torch.empty(sum(sizes), dtype=torch.uint8, device=device())
    dist.all_to_all_single(incoming, outgoing.to(device()), sizes, [len(part) for part in sent])
    return [part.numpy().tobytes() for part in incoming.cpu().split(sizes)]
