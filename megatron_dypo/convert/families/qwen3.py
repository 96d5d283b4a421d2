"""Qwen3 (dense): Llama's table, and a norm over each head's queries and keys."""

from megatron_dypo.convert.families import llama
from megatron_dypo.convert.families.family import Family
from megatron_dypo.convert.rules import copied

NORMS = (
    copied("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    copied("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)

FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*llama.LAYER, *NORMS),
    qk_norm=True,
    only={"attention_bias": (False,)},
)
