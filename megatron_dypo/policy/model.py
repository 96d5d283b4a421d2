"""Build the policy's Megatron-Core parts: the GPT's chunks on this rank, each in its DDP wrapper, and the optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.utils import skip_init

from megatron_dypo.config.schema import Config, Optimizer
from megatron_dypo.models.families import FAMILIES, STORED_NORMS
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.models.stages import stage_layers
from megatron_dypo.policy import weight_gradients
from megatron_dypo.policy.accelerations import choose
from megatron_dypo.policy.attention import frequencies
from megatron_dypo.policy.flash_kernels import use_best_flash_kernel
from megatron_dypo.policy.layers import layer_spec
from megatron_dypo.policy.optimizer import fuse
from megatron_dypo.runtime import cpu_shim
from megatron_dypo.runtime.distributed import Layout, device, training_dtype

_SHARDED_DIMENSION = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
_TRANSFORMER_ENGINE_NAMES = {f"{stored}_weight": f"{name}.weight" for name, stored in STORED_NORMS.items()}
_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<sequential>\d+)\.)?(?P<linear>linear_fc[12])\.weight(?P<grouped>\d+)?"
)
T = TypeVar("T")
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # mcore's default is to recompute attention, to save its scores; ours keeps none, and the MLP most of the rest
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _mixture(config: Config, shape: ModelShape) -> dict:
    """Return mcore's settings of a mixture of experts. Its own auxiliary losses are per micro-batch and stay off."""
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_router_topk": shape.router_topk,
        "moe_router_pre_softmax": not shape.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": shape.shared_expert_ffn_hidden_size or None,
        "moe_shared_expert_gate": shape.shared_expert_ffn_hidden_size > 0,
        "expert_model_parallel_size": config.parallel.expert,
        "expert_tensor_parallel_size": config.parallel.expert_tensor,
        # the mixture recomputes itself (moe.py), with the routing that it had
        **({"recompute_granularity": None, "recompute_modules": None} if config.model.recompute == "selective" else {}),
    }


def transformer_config(config: Config, shape: ModelShape) -> TransformerConfig:
    """Return mcore's configuration of ``shape`` under this layout."""
    dtype, family = training_dtype(config.model.dtype), FAMILIES[shape.family]
    chosen = choose(config.model, shape.head_dim)
    virtual = config.parallel.virtual_pipeline
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=family.qk_norm,
        add_qkv_bias=family.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        overlap_p2p_comm=virtual > 1,  # interleaved over gloo, mcore's batched sends silently deliver wrong tensors
        batch_p2p_comm=virtual == 1,
        context_parallel_size=config.parallel.context,
        sequence_parallel=config.parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # mcore requires it for variable lengths, even for dense models
        perform_initialization=False,  # weights come from convert/, equal at every layout
        use_cpu_initialization=not torch.cuda.is_available(),
        deterministic_mode=config.trainer.deterministic,
        calculate_per_token_loss=True,  # mcore divides nothing: the objective carries its own global normalisers
        bias_activation_fusion=chosen.compiled,
        bias_dropout_fusion=False,  # without bias and dropout it is one addition, which needs no compiler
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=chosen.transformer_engine,
        gradient_accumulation_fusion=True,
        moe_permute_fusion=chosen.transformer_engine and shape.num_experts > 0,
        **_RECOMPUTE[config.model.recompute] | _mixture(config, shape),
    )


def build_model(config: Config, shape: ModelShape, layout: Layout) -> list[DistributedDataParallel]:
    """Build this rank's model chunks, one per virtual pipeline stage, in mcore's DDP.

    The head returns hidden states: kernels/ turns them into log-probs, policy/critic.py into values.
    """
    transformer, chosen = transformer_config(config, shape), choose(config.model, shape.head_dim)
    dtype = training_dtype(config.model.dtype)
    if not chosen.apex_gradients:
        weight_gradients.install()
    if chosen.attention == "flash":
        use_best_flash_kernel(
            shape.num_attention_heads // layout.tp, max(1, shape.num_query_groups // layout.tp), shape.head_dim
        )
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
        use_distributed_optimizer=config.optimizer.distributed,
        check_for_nan_in_grad=False,  # a non-finite gradient skips the step on all ranks instead of ending the job
    )
    layers, chunks = stage_layers(shape.num_layers, layout.pp, layout.vpp), []
    for c in range(layout.vpp):
        is_last = layout.is_last_stage and c == layout.vpp - 1
        gpt = GPTModel(
            config=transformer,
            transformer_layer_spec=layer_spec(config.model, shape, layers[c * layout.pp + layout.pp_rank], chosen),
            vocab_size=shape.padded_vocab,
            max_sequence_length=shape.max_position,
            pre_process=layout.pp_rank == 0 and c == 0,
            post_process=is_last,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if chosen.transformer_engine else "none",  # ours is part of attention
            rotary_base=shape.rope_base,
            vp_stage=c if layout.vpp > 1 else None,
        ).to(device())
        _mark_sharded(gpt)
        if chosen.transformer_engine:  # mcore fixes Llama 3's original length at 8192
            gpt.rotary_pos_emb.inv_freq = frequencies(shape).to(device())
        if is_last and shape.value_head:  # as in verl; mcore's own is dropped
            linear = {"in_features": shape.hidden_size, "out_features": 1, "bias": False, "dtype": dtype}
            gpt.output_layer = skip_init(torch.nn.Linear, **linear, device=device())
        if is_last:
            gpt.output_layer.forward = lambda hidden, weight=None, runtime_gather_output=None: (hidden, None)
        # with several chunks only the first one's sums can overlap with the rest of the backward pass
        chunks.append(DistributedDataParallel(transformer, ddp, gpt, disable_bucketing=c > 0))
    return chunks


def whole_model_names(gpt: GPTModel, local: Mapping[str, T]) -> dict[str, T]:
    """Rename a chunk's keys from its own names to those in the whole model as one local-spec chunk.

    mcore numbers layers from 0 in every chunk, and experts on every rank; Transformer Engine stores norms in the linear
    layer behind them, and a rank's experts in one module.
    """
    found = {}
    for name, value in local.items():
        if name.startswith("decoder.layers."):
            _, _, index, rest = name.split(".", 3)
            rest = _TRANSFORMER_ENGINE_NAMES.get(rest, rest)
            if expert := _EXPERT.fullmatch(rest):
                own = int(expert["sequential"] or expert["grouped"])
                first = gpt.decoder.layers[int(index)].mlp.local_expert_indices[0]
                rest = f"mlp.experts.{first + own}.{expert['linear']}.weight"
            name = f"decoder.layers.{gpt.decoder.layers[int(index)].layer_number - 1}.{rest}"
        found[name] = value
    return found


def _mark_sharded(gpt: GPTModel) -> None:
    """Mark weights as sharded, or as experts, where mcore does not.

    mcore (before 0.19) marks sharded weights while initialising them, which we skip; unmarked ones would be taken for
    copies and left out of the gradient norm on every tensor-parallel rank but the first. And the experts of one
    expert-parallel rank would count as dense weights, although tensor-parallel ranks send them different tokens.
    """
    for module in gpt.modules():
        dimension = _SHARDED_DIMENSION.get(type(module))
        if dimension is not None and not hasattr(module.weight, "tensor_model_parallel") and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)
    for name, parameter in gpt.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False


def build_optimizer(optimizer: Optimizer, dtype: torch.dtype, chunks: list[DistributedDataParallel]):
    """Build mcore's Adam (fp32 master weights under bf16): Transformer Engine's or Apex's if installed, or torch's."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optimizer.distributed,
    )
    cuda = torch.cuda.is_available()
    with cpu_shim.cuda_type_names():
        built = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=cuda)
    if cuda:
        fuse(built)
    return built
