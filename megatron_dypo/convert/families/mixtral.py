"""Mixtral: Mistral's attention, and a mixture of experts for the MLP."""

from megatron_dypo.convert.families import llama
from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import copied, gate_up, rows

_EXPERT = "block_sparse_moe.experts.*"

FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layer=(
        *llama.ATTENTION,
        copied("mlp.router.weight", "block_sparse_moe.gate.weight", "E H"),
        gate_up("mlp.experts.*.linear_fc1.weight", gate=f"{_EXPERT}.w1.weight", up=f"{_EXPERT}.w3.weight"),
        rows("mlp.experts.*.linear_fc2.weight", f"{_EXPERT}.w2.weight"),
    ),
    only={"sliding_window": (None,)},
    keys={"num_experts": "num_local_experts", "router_topk": "num_experts_per_tok"},
)
