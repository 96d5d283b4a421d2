"""One file per family of decoders: a table of its weights, and what sets it apart (docs/add-a-model.md adds one).

``FAMILIES`` is by the name that `model.shape.family` takes, which is Hugging Face's ``model_type``.
"""

from __future__ import annotations

from megatron_dypo.convert.families import llama, mistral, qwen2, qwen3
from megatron_dypo.convert.families.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}

__all__ = ["FAMILIES", "Family"]
