"""A mixture of experts for mcore's transformer layer: its dispatcher and experts, and a router that can be told.

mcore's layer, all-to-all dispatcher and experts are used as they are. Ours is the choice of experts: a micro-batch's
``Routing`` keeps it, so that it can be counted and taken again; it comes with ``packed_seq_params``, which a layer that
is computed again in the backward pass gets again. Legend: T this rank's tokens, E experts, K of a token.
"""

from __future__ import annotations

import torch
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

from megatron_dypo.policy.routing import Routing

_LINEAR = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class Router(TopKRouter):
    """Softmax over all experts in fp32, the best K of them or those that ``routing`` already has."""

    batch: Routing

    def gating(self, input: Tensor) -> Tensor:
        """fp32 logits; mcore's function (0.16) fails where there is no Transformer Engine."""
        return linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """[T, E] weights, zero where a token does not go, and [T, E] where it goes."""
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
    """One after the other, each in mcore's own parallel layers."""

    def __init__(self, count: int, config, pg_collection=None, **_):
        super().__init__(count, config, _LINEAR, pg_collection)


class SharedExperts(SharedExpertMLP):
    """What all tokens go through besides."""

    def __init__(self, config, pg_collection=None, gate: bool = False, **_):
        super().__init__(config, _LINEAR, gate, pg_collection)


class MixtureOfExperts(MoELayer):
    """mcore's, told of the micro-batch."""

    batch: Routing
    recompute = False

    def __init__(self, config, submodules: MoESubmodules | None = None, **options):
        super().__init__(config, submodules or _LOCAL, **options)

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, None]:
        batch = self.batch  # at the time of the backward pass it may be another one

        def run(hidden: Tensor) -> Tensor:
            self.router.batch = batch
            return super(MixtureOfExperts, self).forward(hidden)[0]

        if self.recompute and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states), None
        return run(hidden_states), None


class RecomputedMixture(MixtureOfExperts):
    """Computed again in the backward pass, in the same routing."""

    recompute = True


class RoutedLayer(TransformerLayer):
    """A transformer layer that hands its mixture of experts the micro-batch's routing."""

    def forward(self, *arguments, packed_seq_params=None, **options):
        self.mlp.batch = packed_seq_params.routing
        return super().forward(*arguments, packed_seq_params=packed_seq_params, **options)


_LOCAL = MoESubmodules(experts=Experts, shared_experts=SharedExperts, router=Router)
