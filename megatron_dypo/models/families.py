"""List the decoder families: each one's table of weights, and what sets it apart (docs/add-a-model.md adds one).

``FAMILIES`` is keyed by `model.shape.family`, which is Hugging Face's ``model_type``. ``rules`` lists every weight of a
model from its family's table, first stage to last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dypo.models.rules import (
    EMBEDDING,
    HEAD,
    SCORE,
    Family,
    WeightRule,
    copied,
    embedding,
    gate_up,
    qkv,
    rows,
    score,
)

if TYPE_CHECKING:
    from megatron_dypo.models.shape import ModelShape

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

# Llama 2 and 3.x, and models of that shape: SmolLM2, DeepSeek-R1-Distill-Llama, TinyLlama.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=LAYER,
    only={"attention_bias": (False,), "mlp_bias": (False,)},
)


# Mistral (7B from v0.2 on, Nemo, Small): Llama's table. v0.1's sliding-window attention is not supported.
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=LAYER,
    only={"sliding_window": (None,)},
)


BIASES = qkv(
    "self_attention.linear_qkv.bias",
    query="self_attn.q_proj.bias",
    key="self_attn.k_proj.bias",
    value="self_attn.v_proj.bias",
    inputs="",
)

# Qwen2 and Qwen2.5, Math and distilled ones included: Llama's table, with biases of queries, keys and values.
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*LAYER, BIASES),
    qkv_bias=True,
)


NORMS = (
    copied("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    copied("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)

# Qwen3 (dense): Llama's table, with a norm over each head's queries and keys.
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*LAYER, *NORMS),
    qk_norm=True,
    only={"attention_bias": (False,)},
)


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

# Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, with a mixture of experts in every layer.
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer=(*ATTENTION, *NORMS, *EXPERTS),
    qk_norm=True,
    only={"attention_bias": (False,), "sliding_window": (None,), **EVERY_LAYER},
    keys=KEYS,
)


# Qwen2-MoE (57B-A14B, Qwen1.5-MoE-A2.7B): Qwen2's attention, Qwen3-MoE's experts, and shared experts.
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    layer=(
        *ATTENTION,
        BIASES,
        *EXPERTS,
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
    only={"qkv_bias": (True,), **EVERY_LAYER},
    keys=KEYS | {"shared_expert_ffn_hidden_size": "shared_expert_intermediate_size"},
)


_MIXTRAL_EXPERT = "block_sparse_moe.experts.*"

# Mixtral: Mistral's attention, with a mixture of experts as MLP.
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layer=(
        *ATTENTION,
        copied("mlp.router.weight", "block_sparse_moe.gate.weight", "E H"),
        gate_up(
            "mlp.experts.*.linear_fc1.weight", gate=f"{_MIXTRAL_EXPERT}.w1.weight", up=f"{_MIXTRAL_EXPERT}.w3.weight"
        ),
        rows("mlp.experts.*.linear_fc2.weight", f"{_MIXTRAL_EXPERT}.w2.weight"),
    ),
    only={"sliding_window": (None,)},
    keys={"num_experts": "num_local_experts", "router_topk": "num_experts_per_tok"},
)


FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
}


EMBEDDING_RULE = embedding("embedding.word_embeddings.weight", EMBEDDING)
NORM_RULE = copied("decoder.final_layernorm.weight", "model.norm.weight", "H")
HEAD_RULE = embedding("output_layer.weight", HEAD)
TIED_HEAD_RULE = embedding("output_layer.weight", EMBEDDING)  # for a last stage that is not the first
VALUE_HEAD_RULE = score("output_layer.weight", SCORE)


# Checkpoints name a norm as Transformer Engine does, which keeps it in the linear layer behind it; so do mcore's own
# checkpoints. A mixture's norm is a module of its own there, too.
STORED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
}


def stored_norms(shape: ModelShape) -> dict[str, str]:
    """Return module of a layer -> its name in a checkpoint, where that differs."""
    return {name: stored for name, stored in STORED_NORMS.items() if name == "input_layernorm" or not shape.num_experts}


def rules(shape: ModelShape) -> list[WeightRule]:
    """Return every weight of the model; a tied head is the embedding and not listed."""
    head = VALUE_HEAD_RULE if shape.value_head else HEAD_RULE
    layer: list[WeightRule] = []
    for rule in FAMILIES[shape.family].layer:
        layer += [rule.of_expert(e) for e in range(shape.num_experts)] if rule.of_every_expert else [rule]
    decoder = [
        rule.within(f"decoder.layers.{i}.", f"model.layers.{i}.") for i in range(shape.num_layers) for rule in layer
    ]
    return [EMBEDDING_RULE, *decoder, NORM_RULE, *([] if shape.tied_embeddings else [head])]


def last_names(shape: ModelShape) -> list[str]:
    """Return names of the last layer's norm and the last expert's tensors.

    If present, the folder has at least that many layers and experts.
    """
    of_expert = [rule.of_expert(shape.num_experts - 1) for rule in FAMILIES[shape.family].layer if rule.of_every_expert]
    names = ["input_layernorm.weight", *(name for rule in of_expert for name in rule.names)]
    return [f"model.layers.{shape.num_layers - 1}.{name}" for name in names]


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every Hugging Face tensor of the model."""
    return {name: size for rule in rules(shape) for name, size in zip(rule.names, rule.sizes(shape), strict=True)}
