"""Define the rules of a family's table: one Megatron-Core weight, and the Hugging Face tensors that form it.

A weight is *folded* into a layout in which tensor parallelism cuts one axis into TP equal, contiguous shards:

qkv        [groups, (heads/groups + 2) * D, ...]   axis 0   q heads of a group, then its k, then its v
gate_up    [2 (gate, up), F, H]                    axis 1   each rank holds its own gate rows, then its up rows
embedding  [V_padded, H]                           axis 0   rows beyond the vocabulary are zero
rows       [H, in]                                 axis 1
copied                                             not cut

Shapes are written in letters: H hidden size, F width of the MLP (of each expert's), S of the shared experts, E experts,
V vocabulary, D head width, Q and K the width of all query heads and of all key (or value) heads.

A star in the names stands for an expert's number: such a line is one weight per expert, each a rule of its own, so that
no rank ever holds all experts of a layer. An expert is cut over expert-tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dypo.errors import UserError

if TYPE_CHECKING:
    from megatron_dypo.models.shape import ModelShape

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SCORE = "score"  # of transformers' token classification: a value head


def letters(shape: ModelShape) -> dict[str, int]:
    return {
        "H": shape.hidden_size,
        "F": shape.ffn_hidden_size,
        "S": shape.shared_expert_ffn_hidden_size,
        "E": shape.num_experts,
        "1": 1,
        "V": shape.vocab_size,
        "D": shape.head_dim,
        "Q": shape.num_attention_heads * shape.head_dim,
        "K": shape.num_query_groups * shape.head_dim,
    }


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


def _unbiased(parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    weight, bias = parts
    if not bias.is_meta and bias.any():
        raise UserError(f"{SCORE}.bias: {bias.item():g}, but a value head has no bias here: it must be 0")
    return weight


def _with_bias(folded: Tensor, shape: ModelShape) -> list[Tensor]:
    return [folded, folded.new_zeros(1)]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron weight: its name, (name, shape in letters) of its Hugging Face tensors, and the axis that is cut.

    ``leading``: the folded layout's leading sizes, given the number of TP ranks that share it; None if folding leaves
    the weight as Megatron has it. ``expert``: the index of the expert it belongs to, if any.
    """

    mcore: str
    hf: tuple[tuple[str, str], ...]
    axis: int | None
    fold: Callable[[Sequence[Tensor], ModelShape], Tensor] = _only
    unfold: Callable[[Tensor, ModelShape], list[Tensor]] = _single
    leading: Callable[[ModelShape, int], tuple[int, ...]] | None = None
    expert: int | None = None

    @property
    def of_every_expert(self) -> bool:
        """Return whether a star stands for the expert's number."""
        return "*" in self.mcore

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.hf)

    def sizes(self, shape: ModelShape) -> list[tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors."""
        known = letters(shape)
        return [tuple(known[letter] for letter in size.split()) for _, size in self.hf]

    def within(self, mcore: str, hf: str) -> WeightRule:
        """Return the rule with these prefixes."""
        return replace(self, mcore=mcore + self.mcore, hf=tuple((hf + name, size) for name, size in self.hf))

    def of_expert(self, expert: int) -> WeightRule:
        """Return the rule with this number in place of the star."""
        number = str(expert)
        hf = tuple((name.replace("*", number), size) for name, size in self.hf)
        return replace(self, mcore=self.mcore.replace("*", number), hf=hf, expert=expert)

    def folded_shard(self, weight: Tensor, shape: ModelShape, tp: int) -> Tensor:
        """Return a rank's Megatron weight in the folded layout."""
        return weight if self.leading is None else weight.unflatten(0, (*self.leading(shape, tp), -1))

    def as_megatron(self, folded: Tensor) -> Tensor:
        """Return a folded weight, whole or a shard, as Megatron has it."""
        return folded if self.leading is None else folded.flatten(0, 1)


def copied(mcore: str, hf: str, size: str) -> WeightRule:
    return WeightRule(mcore, ((hf, size),), None)


def rows(mcore: str, hf: str, size: str = "H F") -> WeightRule:
    return WeightRule(mcore, ((hf, size),), 1)


def embedding(mcore: str, hf: str) -> WeightRule:
    return WeightRule(mcore, ((hf, "V H"),), 0, _pad_vocab, _unpad_vocab)


def score(mcore: str, hf: str) -> WeightRule:
    """Return the rule of a value head: all H numbers on every tensor-parallel rank; transformers' bias must be 0."""
    return WeightRule(mcore, ((f"{hf}.weight", "1 H"), (f"{hf}.bias", "1")), None, _unbiased, _with_bias)


def qkv(mcore: str, query: str, key: str, value: str, inputs: str = "H") -> WeightRule:
    """Return the rule of a fused QKV weight; ``inputs``: the letter of the second axis, or nothing for a bias."""
    parts = ((query, f"Q {inputs}"), (key, f"K {inputs}"), (value, f"K {inputs}"))
    return WeightRule(mcore, parts, 0, _group_qkv, _ungroup_qkv, lambda shape, tp: (shape.num_query_groups // tp,))


def gate_up(mcore: str, gate: str, up: str, size: str = "F H") -> WeightRule:
    return WeightRule(mcore, ((gate, size), (up, size)), 1, _stack, _unstack, lambda shape, tp: (2,))


@dataclass(frozen=True)
class Family:
    """A family; ``layer`` is the table of one layer's weights, with names relative to the layer.

    ``only``: fields of transformers' configuration that must have one of these values, because no other is supported;
    for a field missing in ``config.json``, its default counts. ``keys``: the family's names for fields of
    ``ModelShape``, where they differ from Llama's; ``num_experts`` among them makes the MLPs mixtures of experts.
    ``qkv_bias`` and ``qk_norm`` say which layers Megatron-Core builds.
    """

    model_type: str
    architecture: str
    layer: tuple[WeightRule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def critic(self) -> str:
        """Return transformers' class of the body with a value head."""
        return self.architecture.replace("ForCausalLM", "ForTokenClassification")

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.keys
