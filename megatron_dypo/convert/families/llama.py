"""Llama 2 and 3.x, and what has their shape: SmolLM2, DeepSeek-R1-Distill-Llama, TinyLlama."""

from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import copied, gate_up, qkv, rows

ATTENTION = (
    copied("input_layernorm.weight", "input_layernorm.weight", "H"),
    qkv(
        "self_attention.linear_qkv.weight",
        query="self_attn.q_proj.weight",
        key="self_attn.k_proj.weight",
        value="self_attn.v_proj.weight",
    ),
    rows("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H Q"),
    copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H"),
)
LAYER = (
    *ATTENTION,
    gate_up("mlp.linear_fc1.weight", gate="mlp.gate_proj.weight", up="mlp.up_proj.weight"),
    rows("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=LAYER,
    only={"attention_bias": (False,), "mlp_bias": (False,)},
)
