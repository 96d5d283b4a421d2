"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, and a mixture of experts in every layer."""

from megatron_dypo.convert.families import llama, qwen3
from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import copied, gate_up, rows

_EXPERT = "mlp.experts.*"
EXPERTS = (
    copied("mlp.router.weight", "mlp.gate.weight", "E H"),
    gate_up("mlp.experts.*.linear_fc1.weight", gate=f"{_EXPERT}.gate_proj.weight", up=f"{_EXPERT}.up_proj.weight"),
    rows("mlp.experts.*.linear_fc2.weight", f"{_EXPERT}.down_proj.weight"),
)
KEYS = {
    "ffn_hidden_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "router_topk": "num_experts_per_tok",
    "norm_topk_prob": "norm_topk_prob",
}
EVERY_LAYER = {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)}

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=(*llama.ATTENTION, *qwen3.NORMS, *EXPERTS),
    qk_norm=True,
    only={"attention_bias": (False,), "sliding_window": (None,), **EVERY_LAYER},
    keys=KEYS,
)
