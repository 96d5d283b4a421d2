"""What a model looks like, whoever runs it: one ``ModelShape`` from a preset, an HF folder, and overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.schema import Model
from megatron_dypo.convert.families import FAMILIES
from megatron_dypo.errors import UserError

POSITIONS = ("max_position", "rope_base")  # what no weight's shape depends on, so that a run may extend its context
VOCAB_MULTIPLE = 1024  # padded vocabularies do not depend on tensor parallelism, so neither does initialisation


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched to longer sequences (``rope.py``): Hugging Face's ``rope_type`` and numbers.

    ``linear`` reads ``factor`` alone.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


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
    rope_scaling: RopeScaling | None = None
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
            "rope_scaling": None if self.rope_scaling is None else dataclasses.asdict(self.rope_scaling),
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
        } | {name: values[0] for name, values in family.only.items()}


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
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise UserError(f"model.preset: unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
        shape = dataclasses.replace(PRESETS[config.preset], **_overrides(config))
    else:
        shape = of_weights(_from_hf(Path(hf_folder(config.hf)) / "config.json"), config)
    if shape.num_attention_heads % shape.num_query_groups:
        name = "model.shape.num_query_groups" if config.preset else f"model.hf: {config.hf}: num_key_value_heads"
        raise UserError(
            f"{name}: {shape.num_query_groups} does not divide num_attention_heads: {shape.num_attention_heads}"
        )
    return shape


def of_weights(shape: ModelShape, config: Model) -> ModelShape:
    """The shape of `model.hf`'s weights with the overrides of ``model.shape``, which may change ``POSITIONS`` alone."""
    overrides = _overrides(config)
    for name, value in overrides.items():
        if name not in POSITIONS and getattr(shape, name) != value:
            raise UserError(f"model.shape.{name}: the weights in model.hf: {config.hf} have another shape")
    return dataclasses.replace(shape, **overrides)


def _overrides(config: Model) -> dict[str, Any]:
    return {name: value for name, value in config.shape.model_dump().items() if value is not None}


def hf_folder(name: str) -> str:
    """A local folder as it is; a hub name by its local snapshot, downloaded where a network allows."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "*.txt"]
        )
    except Exception as error:
        raise UserError(
            f"model.hf: {name!r} is no folder here and cannot be had from the hub ({type(error).__name__})"
        ) from None


# What a value of config.json may be: its description, and whether a value is that.
_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer from 1 on", lambda value: type(value) is int and 0 < value < 2**31),
    float: ("a positive number", lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max),
    bool: ("true or false", lambda value: type(value) is bool),
    str: ("a string", lambda value: type(value) is str),
    dict: ("a mapping", lambda value: type(value) is dict),
}


def _from_hf(path: Path) -> ModelShape:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.hf: cannot read {path}: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"model.hf: {path} holds no configuration")

    def get(name: str, kind: type, default: Any = None, where: Mapping[str, Any] = raw) -> Any:
        """A value of ``kind``; absent or null is ``default``, and without one an error."""
        value = where.get(name)
        value = default if value is None else value
        description, fits = _KINDS[kind]
        if not fits(value):
            raise UserError(f"model.hf: {path}: {name} must be {description}, got {value!r:.80}")
        return kind(value)

    family = get("model_type", str)
    rope = get("rope_parameters", dict, {}) or get("rope_scaling", dict, {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for name, value, known in (
        ("model_type", family, tuple(FAMILIES)),
        ("hidden_act", get("hidden_act", str, "silu"), ("silu",)),
        ("rope type", rope_type, ("default", "linear", "llama3")),
        *((name, raw.get(name), known) for name, known in getattr(FAMILIES.get(family), "only", {}).items()),
    ):
        if value not in known:
            supported = ", ".join(str(each) for each in known if each is not None or len(known) == 1)
            raise UserError(f"model.hf: {path}: {name} {value!r:.80} is not supported; known: {supported}")
    scaling = None
    if rope_type != "default":
        numbers = {
            field.name: get(field.name, int if field.name.startswith("original") else float, None, rope)
            for field in dataclasses.fields(RopeScaling)[1:]
            if rope_type == "llama3" or field.name == "factor"
        }
        scaling = RopeScaling(rope_type, **numbers)
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise UserError(f"model.hf: {path}: rope scaling's low_freq_factor must be less than its high_freq_factor")
    hidden, heads = get("hidden_size", int), get("num_attention_heads", int)
    return ModelShape(
        family=family,
        num_layers=get("num_hidden_layers", int),
        hidden_size=hidden,
        ffn_hidden_size=get("intermediate_size", int),
        num_attention_heads=heads,
        num_query_groups=get("num_key_value_heads", int, heads),
        head_dim=get("head_dim", int, hidden // heads),
        vocab_size=get("vocab_size", int),
        max_position=get("max_position_embeddings", int),
        rope_base=get("rope_theta", float, 10000.0, ChainMap(rope, raw)),
        rope_scaling=scaling,
        norm_eps=get("rms_norm_eps", float, 1e-6),
        tied_embeddings=get("tie_word_embeddings", bool, False),
        init_std=get("initializer_range", float, 0.02),
    )
