"""What a model looks like, whoever runs it: one ``ModelShape`` from a preset, an HF folder, and overrides."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.schema import Model
from megatron_dypo.errors import UserError

VOCAB_MULTIPLE = 1024  # padded vocabularies do not depend on tensor parallelism, so neither does initialisation


@dataclass(frozen=True)
class Family:
    """What distinguishes one decoder family from another."""

    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", qk_norm=True),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. ``vocab_size`` is the true vocabulary; ``padded_vocab`` is what the weights hold."""

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
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    init_std: float = 0.02

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def parameters(self) -> int:
        """Number of weights, the vocabulary unpadded."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def to_hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of this shape, as transformers and vLLM read it."""
        family = FAMILIES[self.family]
        return {
            "architectures": [family.architecture],
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
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
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


def model_shape(config: Model) -> ModelShape:
    """The shape that ``model.preset`` or ``model.hf`` names, with the overrides of ``model.shape``.

    Raises UserError for an unknown preset, an unreadable ``config.json``, or an architecture we do not know.
    """
    overrides = {name: value for name, value in config.shape.model_dump().items() if value is not None}
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise UserError(f"model.preset: unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
        shape = dataclasses.replace(PRESETS[config.preset], **overrides)
    else:
        shape = _from_hf(Path(hf_folder(config.hf)) / "config.json")
        if overrides:
            changed = [name for name, value in overrides.items() if getattr(shape, name) != value]
            if changed:
                raise UserError(f"model.shape.{changed[0]}: the weights in model.hf: {config.hf} have another shape")
    if shape.num_attention_heads % shape.num_query_groups:
        raise UserError(
            f"model.shape.num_query_groups: {shape.num_query_groups} does not divide "
            f"num_attention_heads: {shape.num_attention_heads}"
        )
    return shape


def hf_folder(name: str) -> str:
    """A local folder as it is; a hub name by its local snapshot, downloaded where a network allows."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])
    except Exception as error:
        raise UserError(
            f"model.hf: {name!r} is no folder here and cannot be had from the hub ({type(error).__name__})"
        ) from None


def _from_hf(path: Path) -> ModelShape:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model.hf: cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"model.hf: {path} holds no configuration")
    kinds = {family.model_type: name for name, family in FAMILIES.items()}
    if raw.get("model_type") not in kinds:
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported; known: {', '.join(kinds)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UserError(f"{path}: rope type {rope_type!r} is not supported yet")
    if raw.get("attention_bias") or raw.get("mlp_bias") or raw.get("use_sliding_window"):
        raise UserError(f"{path}: attention_bias, mlp_bias and use_sliding_window are not supported")

    def size(name: str) -> int:
        if not isinstance(raw.get(name), int):
            raise UserError(f"model.hf: {path}: {name} must be an integer, got {raw.get(name)!r}")
        return raw[name]

    heads = size("num_attention_heads")
    return ModelShape(
        family=kinds[raw["model_type"]],
        num_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or size("hidden_size") // heads,
        vocab_size=size("vocab_size"),
        max_position=size("max_position_embeddings"),
        rope_base=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        init_std=raw.get("initializer_range", 0.02),
    )
