"""Every weight of a model, from its family's table: first stage to last."""

from __future__ import annotations

from megatron_dypo.convert.families import FAMILIES
from megatron_dypo.convert.rules import EMBEDDING, HEAD, Rule, copied, embedding
from megatron_dypo.policy.shape import ModelShape

EMBEDDING_RULE = embedding("embedding.word_embeddings.weight", EMBEDDING)
NORM_RULE = copied("decoder.final_layernorm.weight", "model.norm.weight", "H")
HEAD_RULE = embedding("output_layer.weight", HEAD)
TIED_HEAD_RULE = embedding("output_layer.weight", EMBEDDING)  # of a last stage that is not the first


# In a checkpoint a norm is called as Transformer Engine has it, which keeps it in the linear layer behind it; so are
# mcore's own. A mixture's is a module by itself there, too.
STORED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
}


def stored_norms(shape: ModelShape) -> dict[str, str]:
    """Module of a layer -> what a checkpoint calls it, where that is something else."""
    return {name: stored for name, stored in STORED_NORMS.items() if name == "input_layernorm" or not shape.num_experts}


def rules(shape: ModelShape) -> list[Rule]:
    """A tied head is the embedding and not listed."""
    layer: list[Rule] = []
    for rule in FAMILIES[shape.family].layer:
        layer += [rule.of_expert(e) for e in range(shape.num_experts)] if rule.of_every_expert else [rule]
    decoder = [
        rule.within(f"decoder.layers.{i}.", f"model.layers.{i}.") for i in range(shape.num_layers) for rule in layer
    ]
    return [EMBEDDING_RULE, *decoder, NORM_RULE, *([] if shape.tied_embeddings else [HEAD_RULE])]


def last_names(shape: ModelShape) -> list[str]:
    """Of the last layer's norm and the last expert's tensors: where they are, the model has so many of both."""
    of_expert = [rule.of_expert(shape.num_experts - 1) for rule in FAMILIES[shape.family].layer if rule.of_every_expert]
    names = ["input_layernorm.weight", *(name for rule in of_expert for name in rule.names)]
    return [f"model.layers.{shape.num_layers - 1}.{name}" for name in names]


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model."""
    return {name: size for rule in rules(shape) for name, size in zip(rule.names, rule.sizes(shape), strict=True)}
