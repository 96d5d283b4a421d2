"""Shapes of released models by their hub names, so that a run can be planned where the model is not."""

from __future__ import annotations

from megatron_dypo.config.schema import Model
from megatron_dypo.policy.shape import ModelShape, model_shape, of_weights

_QWEN2 = {"family": "qwen2", "rope_base": 1e6, "norm_eps": 1e-6, "vocab_size": 152064, "head_dim": 128}
_QWEN3 = {"family": "qwen3", "rope_base": 1e6, "norm_eps": 1e-6, "vocab_size": 151936, "head_dim": 128}
_QWEN3_MOE = _QWEN3 | {"family": "qwen3_moe", "num_experts": 128, "router_topk": 8}
_LLAMA = {"family": "llama", "rope_base": 5e5, "norm_eps": 1e-5, "vocab_size": 128256, "head_dim": 128}


def _shape(
    base: dict, layers: int, hidden: int, ffn: int, heads: int, groups: int, positions: int, **more
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        max_position=positions,
        **base | more,
    )


RELEASED = {
    "Qwen/Qwen2.5-Math-7B": _shape(_QWEN2, 28, 3584, 18944, 28, 4, 4096, rope_base=1e4),
    "Qwen/Qwen2.5-7B": _shape(_QWEN2, 28, 3584, 18944, 28, 4, 131072),
    "Qwen/Qwen2.5-32B": _shape(_QWEN2, 64, 5120, 27648, 40, 8, 131072),
    "Qwen/Qwen3-4B-Base": _shape(_QWEN3, 36, 2560, 9728, 32, 8, 32768, tied_embeddings=True),
    "Qwen/Qwen3-8B-Base": _shape(_QWEN3, 36, 4096, 12288, 32, 8, 32768),
    "Qwen/Qwen3-32B": _shape(_QWEN3, 64, 5120, 25600, 64, 8, 40960),
    "Qwen/Qwen3-30B-A3B": _shape(_QWEN3_MOE, 48, 2048, 768, 32, 4, 40960),
    "Qwen/Qwen3-235B-A22B": _shape(_QWEN3_MOE, 94, 4096, 1536, 64, 4, 40960),
    "meta-llama/Llama-3.1-8B": _shape(_LLAMA, 32, 4096, 14336, 32, 8, 131072),
    "meta-llama/Llama-3.1-70B": _shape(_LLAMA, 80, 8192, 28672, 64, 8, 131072),
}


def planned_shape(config: Model) -> ModelShape:
    """The shape of `model.hf` or `model.preset`; a released model's from the table, without a download.

    Raises UserError as ``model_shape``.
    """
    if config.hf not in RELEASED:
        return model_shape(config)
    return of_weights(RELEASED[config.hf], config)
