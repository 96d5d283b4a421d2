"""The table: each Megatron-Core weight, the Hugging Face tensors it is made of, and where tensor parallelism cuts it.

A weight is *folded* into a layout in which one axis is cut into TP equal, contiguous shards:

    linear_qkv   [groups, (heads/groups + 2) * D, H]   axis 0   q heads of a group, then its k, then its v
    linear_fc1   [2 (gate, up), F, H]                  axis 1   each rank holds its own gate rows, then its up rows
    embeddings   [V_padded, H]                         axis 0   rows beyond the vocabulary are zero
    linear_proj, linear_fc2 [H, ...]                   axis 1
    norms                                              not cut

Legend: D head width, F MLP width, H hidden size, V vocabulary. ``{i}`` is the layer's global index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.policy.shape import FAMILIES, ModelShape

LAYER = "decoder.layers.{i}."
HF_LAYER = "model.layers.{i}."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _only(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return parts[0]


def _single(folded: Tensor, shape: ModelShape) -> list[Tensor]:
    return [folded]


def _pad_vocab(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return torch.nn.functional.pad(parts[0], (0, 0, 0, shape.padded_vocab - shape.vocab_size))


def _unpad_vocab(folded: Tensor, shape: ModelShape) -> list[Tensor]:
    return [folded[: shape.vocab_size]]


def _group_qkv(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return torch.cat([part.unflatten(0, (shape.num_query_groups, -1)) for part in parts], dim=1)


def _ungroup_qkv(folded: Tensor, shape: ModelShape) -> list[Tensor]:
    queries = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
    return [part.flatten(0, 1) for part in folded.split([queries, shape.head_dim, shape.head_dim], dim=1)]


def _stack(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return torch.stack(list(parts))


def _unstack(folded: Tensor, shape: ModelShape) -> list[Tensor]:
    return list(folded)


@dataclass(frozen=True)
class Rule:
    """One Megatron weight. ``leading`` is the folded layout's leading shape, from the number of TP ranks sharing it."""

    mcore: str
    hf: tuple[str, ...]
    axis: int | None
    fold: Callable[[Sequence[Tensor], ModelShape], Tensor] = _only
    unfold: Callable[[Tensor, ModelShape], list[Tensor]] = _single
    leading: Callable[[ModelShape, int], tuple[int, ...]] | None = None

    def at_layer(self, i: int) -> Rule:
        return Rule(
            self.mcore.format(i=i),
            tuple(name.format(i=i) for name in self.hf),
            self.axis,
            self.fold,
            self.unfold,
            self.leading,
        )

    def folded_shard(self, weight: Tensor, shape: ModelShape, tp: int) -> Tensor:
        """A rank's Megatron weight in the folded layout."""
        return weight if self.leading is None else weight.unflatten(0, (*self.leading(shape, tp), -1))


def _qkv(kind: str) -> Rule:
    parts = tuple(f"{HF_LAYER}self_attn.{x}_proj.{kind}" for x in "qkv")
    return Rule(
        f"{LAYER}self_attention.linear_qkv.{kind}",
        parts,
        0,
        _group_qkv,
        _ungroup_qkv,
        lambda shape, tp: (shape.num_query_groups // tp,),
    )


LAYER_RULES = (
    Rule(f"{LAYER}input_layernorm.weight", (f"{HF_LAYER}input_layernorm.weight",), None),
    _qkv("weight"),
    Rule(f"{LAYER}self_attention.linear_proj.weight", (f"{HF_LAYER}self_attn.o_proj.weight",), 1),
    Rule(f"{LAYER}pre_mlp_layernorm.weight", (f"{HF_LAYER}post_attention_layernorm.weight",), None),
    Rule(
        f"{LAYER}mlp.linear_fc1.weight",
        (f"{HF_LAYER}mlp.gate_proj.weight", f"{HF_LAYER}mlp.up_proj.weight"),
        1,
        _stack,
        _unstack,
        lambda shape, tp: (2,),
    ),
    Rule(f"{LAYER}mlp.linear_fc2.weight", (f"{HF_LAYER}mlp.down_proj.weight",), 1),
)
QKV_BIAS_RULES = (_qkv("bias"),)
QK_NORM_RULES = tuple(
    Rule(f"{LAYER}self_attention.{x}_layernorm.weight", (f"{HF_LAYER}self_attn.{x}_norm.weight",), None) for x in "qk"
)
EMBEDDING_RULE = Rule("embedding.word_embeddings.weight", (EMBEDDING,), 0, _pad_vocab, _unpad_vocab)
HEAD_RULE = Rule("output_layer.weight", (HEAD,), 0, _pad_vocab, _unpad_vocab)
TIED_HEAD_RULE = Rule("output_layer.weight", (EMBEDDING,), 0, _pad_vocab, _unpad_vocab)
NORM_RULE = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), None)


def rules(shape: ModelShape) -> list[Rule]:
    """Every weight of the model, first stage to last; a tied head is the embedding and not listed."""
    family = FAMILIES[shape.family]
    layer = LAYER_RULES + (QKV_BIAS_RULES if family.qkv_bias else ()) + (QK_NORM_RULES if family.qk_norm else ())
    decoder = [rule.at_layer(i) for i in range(shape.num_layers) for rule in layer]
    return [EMBEDDING_RULE, *decoder, NORM_RULE, *([] if shape.tied_embeddings else [HEAD_RULE])]


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face tensor of the model."""
    hidden, heads, groups, width = shape.hidden_size, shape.num_attention_heads, shape.num_query_groups, shape.head_dim
    by_suffix = {
        "embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
        "q_proj.weight": (heads * width, hidden),
        "k_proj.weight": (groups * width, hidden),
        "v_proj.weight": (groups * width, hidden),
        "q_proj.bias": (heads * width,),
        "k_proj.bias": (groups * width,),
        "v_proj.bias": (groups * width,),
        "o_proj.weight": (hidden, heads * width),
        "gate_proj.weight": (shape.ffn_hidden_size, hidden),
        "up_proj.weight": (shape.ffn_hidden_size, hidden),
        "down_proj.weight": (hidden, shape.ffn_hidden_size),
        "q_norm.weight": (width,),
        "k_norm.weight": (width,),
    }
    names = [name for rule in rules(shape) for name in rule.hf]
    return {
        name: next((size for suffix, size in by_suffix.items() if name.endswith(suffix)), (hidden,)) for name in names
    }
