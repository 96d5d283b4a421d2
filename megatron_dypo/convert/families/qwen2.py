"""Qwen2 and Qwen2.5, distilled and mathematical ones too: Llama's table, and biases of queries, keys and values."""

from megatron_dypo.convert.families import llama
from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import qkv

BIASES = qkv(
    "self_attention.linear_qkv.bias",
    query="self_attn.q_proj.bias",
    key="self_attn.k_proj.bias",
    value="self_attn.v_proj.bias",
    inputs="",
)

FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*llama.LAYER, BIASES),
    qkv_bias=True,
)
