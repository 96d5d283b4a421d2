"""A mixture of experts for mcore's transformer layer, with a router whose top-k choice can be recorded and replayed.

mcore's layer, all-to-all dispatcher and experts are unchanged. Ours is the choice of experts: a micro-batch's
``Routing`` keeps it, so that it can be counted, and replayed if ``policy.routing_replay`` asks for it; it travels in
``packed_seq_params``, which a layer that is recomputed in the backward pass receives again. Legend: T this rank's
tokens (its slice of them under sequence parallelism), L layers, E experts, K per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.functional import linear

from megatron_dypo.models.shape import ModelShape
from megatron_dypo.runtime.distributed import device


class Routing:
    """The experts of one micro-batch's tokens, by layer (from 1) as mcore numbers them.

    ``real_T`` is False for padding. ``given``: layer -> [T, K], valid where ``is_given_T``. A choice is kept in one
    byte, in two with more than 256 experts.
    """

    def __init__(self, real_T: Tensor, given: dict[int, Tensor] | None = None, is_given_T: Tensor | None = None):
        self.real_T, self._is_given_T = real_T, is_given_T
        self._given: dict[int, Tensor] = given or {}  # until the layer has chosen for the other tokens, too
        self.chosen: dict[int, Tensor] = {}
        self.score_sums: dict[int, Tensor] = {}  # [E], sums of the router's probabilities in a training pass
        self.weights: Tensor | None = None  # [L, E], cost of a unit of probability: the auxiliary loss is linear
        self.replayed: set[int] = set()  # layers whose choice is older than the training pass
        # assignments that are not the router's own, and all; on the device, so that no layer waits for it
        self.differing = torch.zeros(2, dtype=torch.int64, device=real_T.device)

    def begin_training(self) -> None:
        """Make the recorded choices the ones that the training pass replays."""
        self.replayed = {*self.chosen, *self._given}

    def choose(self, layer: int, probs_TE: Tensor, k: int) -> Tensor:
        """Return the experts [T, K]: the recorded ones, else the ``k`` most probable, which are recorded."""
        own_TK = probs_TE.topk(k).indices
        if layer not in self.chosen:
            first_TK, given_TK = own_TK, self._given.pop(layer, None)
            if given_TK is not None and self._is_given_T is not None:
                first_TK = torch.where(self._is_given_T[:, None], given_TK.long(), own_TK)
            self.chosen[layer] = first_TK.to(torch.uint8 if probs_TE.shape[1] <= 256 else torch.int16)
        chosen_TK = self.chosen[layer].long()
        if layer in self.replayed and torch.is_grad_enabled():
            same_TK = (chosen_TK[:, :, None] == own_TK[:, None, :]).any(-1)
            self.differing += torch.stack([(~same_TK & self.real_T[:, None]).sum(), k * self.real_T.sum()])
        return chosen_TK

    def balance(self, layer: int, probs_TE: Tensor) -> Tensor | None:
        """Return this rank's part of a layer's auxiliary loss, or None without one."""
        sums_E = (probs_TE * self.real_T[:, None]).sum(0)
        self.score_sums[layer] = sums_E.detach()
        return None if self.weights is None else sums_E @ self.weights[layer - 1]


def balance_weights(counts_LE: Tensor, coefficient: float, k: int) -> Tensor:
    """Return [L, E] for ``Routing.weights``, from all ranks' ``counts_LE`` of a whole mini-batch.

    The loss is the Switch Transformer's (arXiv 2101.03961, eq. 4), summed over layers: coefficient x E x sum_e f_e P_e
    with f_e the share of the assignments and P_e the mean probability of expert e, over all tokens of the mini-batch.
    """
    tokens = counts_LE.sum(-1, keepdim=True).clamp(min=1) / k
    return (coefficient * counts_LE.shape[1] * counts_LE / (tokens * k) / tokens).float()


def routed_counts(routings: Iterable[Routing], shape: ModelShape) -> Tensor:
    """Count the assignments [L, E] of real tokens in these micro-batches, over all ranks. Collective."""
    return _all_ranks(_sums(routings, shape)[0])


def routing_metrics(routings: list[Routing], shape: ModelShape, coefficient: float) -> dict[str, float]:
    """Return the metrics of one training pass, the same on every rank; collective.

    ``moe/load_max`` and ``moe/load_min``: load of the busiest and the idlest expert relative to an even one, averaged
    over layers. ``moe/aux_loss``: E x sum_e f_e P_e, averaged over layers; 1 for an even load. ``moe/rerouted_frac``:
    share of replayed choices that the router would not have made.
    """
    parts = [*_sums(routings, shape), sum(routing.differing for routing in routings).double()]
    flat = _all_ranks(torch.cat([part.flatten() for part in parts])).cpu().split([part.numel() for part in parts])
    counts_LE, scores_LE, differing = (values.view(part.shape) for values, part in zip(flat, parts, strict=True))
    share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
    load_LE = shape.num_experts * share_LE
    score_LE = scores_LE / scores_LE.sum(-1, keepdim=True).clamp(min=1)
    loss = shape.num_experts * (share_LE * score_LE).sum(-1)
    metrics = {
        "moe/load_max": load_LE.max(-1).values.mean().item(),
        "moe/load_min": load_LE.min(-1).values.mean().item(),
        "moe/aux_loss": loss.mean().item(),
    }
    if coefficient:
        metrics["loss/aux"] = coefficient * loss.sum().item()
    if differing[1] > 0:
        metrics["moe/rerouted_frac"] = (differing[0] / differing[1]).item()
    return metrics


def _sums(routings: Iterable[Routing], shape: ModelShape) -> tuple[Tensor, Tensor]:
    """Return this rank's [L, E] assignments and probabilities, on its device; other pipeline stages' layers are 0."""
    counts_LE, scores_LE = torch.zeros(2, shape.num_layers, shape.num_experts, dtype=torch.float64, device=device())
    for routing in routings:
        real_T = routing.real_T.double()
        for layer, chosen_TK in routing.chosen.items():
            real_TK = real_T[:, None].expand(chosen_TK.shape)
            counts_LE[layer - 1].index_add_(0, chosen_TK.flatten().long(), real_TK.flatten())
        for layer, sums_E in routing.score_sums.items():
            scores_LE[layer - 1] += sums_E
    return counts_LE, scores_LE


def _all_ranks(sums: Tensor) -> Tensor:
    dist.all_reduce(sums)
    return sums


_LINEAR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class TopKRouter(TopKRouter):
    """Softmax over all experts in fp32, then the best K of them or those that ``routing`` has recorded."""

    batch: Routing

    def gating(self, input: Tensor) -> Tensor:
        """Return fp32 logits; mcore's own function (0.16) fails without Transformer Engine."""
        return linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Return weights [T, E], zero for experts that a token does not use, and the mask [T, E] of those it uses."""
        probs_TE = logits.view(-1, logits.shape[-1]).softmax(-1, dtype=torch.float32)
        chosen_TK = self.batch.choose(self.layer_number, probs_TE.detach(), self.topk)
        weights_TK = probs_TE.gather(1, chosen_TK)
        if self.config.moe_router_pre_softmax is False:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TE = torch.zeros_like(probs_TE).scatter(1, chosen_TK, weights_TK)
        if torch.is_grad_enabled():
            loss = self.batch.balance(self.layer_number, probs_TE)
            if loss is not None:
                weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, loss)
        return weights_TE, torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, chosen_TK, True)


class Experts(SequentialMLP):
    """Experts run one after another, each in mcore's own parallel layers."""

    def __init__(self, count: int, config, pg_collection=None, **_):
        super().__init__(count, config, _LINEAR, pg_collection)


class SharedExperts(SharedExpertMLP):
    """The experts that process every token."""

    def __init__(self, config, pg_collection=None, gate: bool = False, **_):
        super().__init__(config, _LINEAR, gate, pg_collection)


class MixtureOfExperts(MoELayer):
    """mcore's mixture layer, given the micro-batch's routing."""

    batch: Routing
    recompute = False

    def __init__(self, config, submodules: MoESubmodules | None = None, **options):
        super().__init__(config, submodules or _LOCAL, **options)

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, None]:
        batch = self.batch  # may be another one by the time of the backward pass

        def run(hidden: Tensor) -> Tensor:
            self.router.batch = batch
            return super(MixtureOfExperts, self).forward(hidden)[0]

        if self.recompute and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states), None
        return run(hidden_states), None


class RecomputedMixture(MixtureOfExperts):
    """A mixture recomputed in the backward pass, with the same routing."""

    recompute = True


class RoutedLayer(TransformerLayer):
    """A transformer layer that passes the micro-batch's routing to its mixture of experts."""

    def forward(self, *arguments, packed_seq_params=None, **options):
        self.mlp.batch = packed_seq_params.routing
        return super().forward(*arguments, packed_seq_params=packed_seq_params, **options)


_LOCAL = MoESubmodules(experts=Experts, shared_experts=SharedExperts, router=TopKRouter)
