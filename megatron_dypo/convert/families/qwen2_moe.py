"""Qwen2-MoE (57B-A14B, Qwen1.5-MoE-A2.7B): Qwen2's attention, Qwen3-MoE's experts, and what all tokens share."""

from megatron_dypo.convert.families import llama, qwen2, qwen3_moe
from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import copied, gate_up, rows

FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    layer=(
        *llama.ATTENTION,
        qwen2.BIASES,
        *qwen3_moe.EXPERTS,
        gate_up(
            "mlp.shared_experts.linear_fc1.weight",
            gate="mlp.shared_expert.gate_proj.weight",
            up="mlp.shared_expert.up_proj.weight",
            size="S H",
        ),
        rows("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight", "H S"),
        copied("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 H"),
    ),
    qkv_bias=True,
    only={"qkv_bias": (True,), **qwen3_moe.EVERY_LAYER},
    keys=qwen3_moe.KEYS | {"shared_expert_ffn_hidden_size": "shared_expert_intermediate_size"},
)
