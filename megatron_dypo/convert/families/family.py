"""What a family's file declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.convert.rules import Rule


@dataclass(frozen=True)
class Family:
    """``layer``: the table of one layer's weights, names within the layer.

    ``only``: fields of transformers' configuration that must have one of these values, since nothing else is supported;
    where ``config.json`` has no such field, its default there counts. ``keys``: what ``config.json`` calls a field of
    ``ModelShape``, where it is not Llama's name; with ``num_experts`` among them the MLPs are mixtures of experts.
    ``qkv_bias`` and ``qk_norm`` say which layers Megatron-Core builds.
    """

    model_type: str
    architecture: str
    layer: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        return "num_experts" in self.keys
