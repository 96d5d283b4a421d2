"""Layer specs: mcore's for Transformer Engine, or ours, which needs neither it nor Apex.

Ours are Megatron-Core's own tensor-parallel layers, with an RMSNorm that supports sequence parallelism and an attention
over packed sequences.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn.functional import rms_norm

from megatron_dypo.config.schema import Model
from megatron_dypo.models.families import FAMILIES, stored_norms
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.policy.accelerations import Accelerations
from megatron_dypo.policy.attention import PackedAttention
from megatron_dypo.policy.moe import MixtureOfExperts, RecomputedMixture, RoutedLayer, TopKRouter


class RMSNorm(torch.nn.Module):
    """torch's RMSNorm, with a weight whose gradient mcore sums over sequence-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def routed(mlp: ModuleSpec | partial, experts: type[MixtureOfExperts]) -> ModuleSpec:
    """Return mcore's mixture ``mlp`` as our layer with our router and experts. From 0.18 on mcore's is a partial."""
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    return ModuleSpec(experts, submodules=replace(parts, router=TopKRouter))


def layer_spec(model: Model, shape: ModelShape, layers: int, chosen: Accelerations) -> TransformerBlockSubmodules:
    """Return the decoder stack of a model chunk with ``layers`` layers, of the kind that was ``chosen``."""
    qk_norm, mixture = FAMILIES[shape.family].qk_norm, shape.num_experts > 0
    experts = RecomputedMixture if model.recompute == "selective" else MixtureOfExperts
    if chosen.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        grouped = {"num_experts": shape.num_experts, "moe_grouped_gemm": True} if mixture else {}
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm, **grouped)
        if mixture:
            layer.module, layer.submodules.mlp = RoutedLayer, routed(layer.submodules.mlp, experts)
        return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ModuleSpec(PackedAttention, params={"backend": chosen.attention, "compiled": chosen.compiled}),
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm if qk_norm else IdentityOp,
        k_layernorm=RMSNorm if qk_norm else IdentityOp,
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = ModuleSpec(
        module=RoutedLayer if mixture else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=experts if mixture else ModuleSpec(MLP, submodules=linear),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={f"{name}.": f"{stored}_" for name, stored in stored_norms(shape).items()},
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
