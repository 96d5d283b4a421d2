"""One file per family of decoders: a table of its weights, and what sets it apart (docs/add-a-model.md adds one).

``FAMILIES`` is by the name that `model.shape.family` takes, which is Hugging Face's ``model_type``.
"""

from __future__ import annotations

from megatron_dypo.convert.families import llama, mistral, mixtral, qwen2, qwen2_moe, qwen3, qwen3_moe
from megatron_dypo.convert.families.family import Family

_MODULES = (llama, mistral, qwen2, qwen3, mixtral, qwen2_moe, qwen3_moe)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}

__all__ = ["FAMILIES", "Family"]
