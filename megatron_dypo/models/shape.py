"""Define ``ModelShape``, independent of any framework, from a preset, a Hugging Face folder, and overrides."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.schema import Model
from megatron_dypo.errors import UserError
from megatron_dypo.models.families import FAMILIES
from megatron_dypo.models.hf_config import FIELDS, read_shape

POSITIONS = ("max_position", "rope_base")  # no weight's shape depends on these, so a run may extend its context
CRITIC_FIELDS = {"num_labels": 1, "classifier_dropout": 0.0}  # of token classification in transformers
VOCAB_MULTIPLE = 1024  # so padded vocabularies, and initial weights, do not depend on tensor parallelism


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched to longer sequences: Hugging Face's ``rope_type`` and its numbers.

    ``linear`` reads ``factor`` alone.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelShape:
    """A model's shape; sizes in elements. ``vocab_size`` is the true vocabulary, ``padded_vocab`` that of the weights.

    With ``num_experts``, every MLP is a mixture of N experts of width ``ffn_hidden_size``, and a token is routed to
    ``router_topk`` of them. They are weighted by the router's probabilities, normalised to sum to 1 if
    ``norm_topk_prob``; ``shared_expert_ffn_hidden_size`` is the width of the shared experts.
    ``value_head``: the model outputs one number per token, from a head of H weights, instead of log-probs.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position: int
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    init_std: float = 0.02
    num_experts: int = 0
    router_topk: int = 0
    norm_topk_prob: bool = True
    shared_expert_ffn_hidden_size: int = 0
    value_head: bool = False

    @property
    def critic(self) -> ModelShape:
        """Return the same body with a value head."""
        return dataclasses.replace(self, value_head=True, tied_embeddings=False)

    @property
    def architecture(self) -> str:
        """Return transformers' class of the model."""
        family = FAMILIES[self.family]
        return family.critic if self.value_head else family.architecture

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def parameters(self) -> int:
        """Return the number of weights, vocabulary unpadded, without biases and family-specific extras but norms."""
        return self._weights(max(1, self.num_experts))

    @property
    def active_parameters(self) -> int:
        """Return the number of weights that one token uses."""
        return self._weights(max(1, self.router_topk))

    def _weights(self, experts: int) -> int:
        """Return the number of weights with ``experts`` MLPs in each layer."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        mlp = 3 * self.hidden_size * (experts * self.ffn_hidden_size + self.shared_expert_ffn_hidden_size)
        router = self.hidden_size * (self.num_experts + (self.shared_expert_ffn_hidden_size > 0))
        layer = attention + mlp + router + 2 * self.hidden_size
        head = 0 if self.tied_embeddings else 1 if self.value_head else self.vocab_size
        return self.num_layers * layer + (self.vocab_size + head + 1) * self.hidden_size

    def to_hf_config(self) -> dict[str, Any]:
        """Return the ``config.json`` of this shape, as transformers and vLLM read it."""
        family = FAMILIES[self.family]
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_base,
            "rope_scaling": None if self.rope_scaling is None else dataclasses.asdict(self.rope_scaling),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
            **(CRITIC_FIELDS if self.value_head else {}),
            **{name: values[0] for name, values in family.only.items()},
            **{name: getattr(self, field) for field, name in family.keys.items()},
        }


PRESETS = {
    "tiny": ModelShape(
        family="llama",
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=4,
        head_dim=32,
        vocab_size=128,
        max_position=256,
        rope_base=10.0,
        norm_eps=1e-5,
        init_std=0.06,
    ),
}
PRESETS["tiny-moe"] = dataclasses.replace(
    PRESETS["tiny"],
    family="qwen3_moe",
    ffn_hidden_size=192,
    num_experts=8,
    router_topk=2,
)


def model_shape(config: Model, critics: bool = False) -> ModelShape:
    """Return the shape named by ``model.preset`` or ``model.hf``, with the overrides of ``model.shape``.

    Raises UserError for an unknown preset, an unreadable ``config.json``, an unsupported architecture, or, unless
    ``critics``, a model with a value head.
    """
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise UserError(f"model.preset: unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
        shape = dataclasses.replace(PRESETS[config.preset], **_overrides(config))
    else:
        shape = of_weights(folder_shape(hf_folder(config.hf)), config)
        if shape.value_head and not critics:
            raise UserError(
                f"model.hf: {config.hf}: a critic, whose value head gives no log-probs: only `convert` reads it"
            )
    family = FAMILIES[shape.family]
    heads, experts = shape.num_attention_heads, shape.num_experts
    for broken, name, message in (
        (heads % shape.num_query_groups, "num_query_groups", f"does not divide num_attention_heads: {heads}"),
        (experts >= 2**15, "num_experts", "exceeds 32,767"),
        (experts and not family.has_experts, "num_experts", f"family {shape.family} has no experts"),
        (family.has_experts and not experts, "num_experts", f"family {shape.family} is a mixture of experts"),
        (
            family.has_experts and not 0 < shape.router_topk <= experts,
            "router_topk",
            f"must be 1 to num_experts: {experts}",
        ),
        (
            shape.router_topk and not family.has_experts,
            "router_topk",
            f"family {shape.family} has no experts",
        ),
        (
            shape.router_topk == 1 and shape.norm_topk_prob,
            "router_topk",
            "leaves routers nothing to learn when weights are normalised to sum to 1",
        ),
        (
            not shape.norm_topk_prob and "norm_topk_prob" not in family.keys,
            "norm_topk_prob",
            f"does not match family {shape.family}",
        ),
        (
            (shape.shared_expert_ffn_hidden_size > 0) != ("shared_expert_ffn_hidden_size" in family.keys),
            "shared_expert_ffn_hidden_size",
            f"family {shape.family} shares {'no ' if shape.shared_expert_ffn_hidden_size else ''}experts",
        ),
    ):
        if broken:
            key = family.keys.get(name, FIELDS.get(name, (name,))[0])
            where = f"model.shape.{name}" if config.preset else f"model.hf: {config.hf}: {key}"
            raise UserError(f"{where}: {getattr(shape, name)} {message}")
    return shape


def folder_shape(folder: str | Path) -> ModelShape:
    """Return the shape of a Hugging Face folder's model. Raises UserError as ``read_shape``."""
    fields = read_shape(Path(folder) / "config.json")
    scaling = fields.pop("rope_scaling")
    return ModelShape(**fields, rope_scaling=scaling and RopeScaling(**scaling))


def of_weights(shape: ModelShape, config: Model) -> ModelShape:
    """Return the shape of `model.hf`'s weights with ``model.shape``'s overrides, changing ``POSITIONS`` only."""
    overrides = _overrides(config)
    for name, value in overrides.items():
        if name not in POSITIONS and getattr(shape, name) != value:
            raise UserError(f"model.shape.{name}: the weights in model.hf: {config.hf} have another shape")
    return dataclasses.replace(shape, **overrides)


def _overrides(config: Model) -> dict[str, Any]:
    return {name: value for name, value in config.shape.model_dump().items() if value is not None}


def hf_folder(name: str, key: str = "model.hf") -> str:
    """Return a local folder unchanged, or the local snapshot of a hub name, downloaded if there is a network.

    Raises UserError that begins with ``key``, the key or option that has the name.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{key}: there is no folder {name}") from None
    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt"]
        )
    except Exception as error:
        raise UserError(
            f"{key}: {name!r} is neither a local folder nor available from the hub ({type(error).__name__})"
        ) from None
