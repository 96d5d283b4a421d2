"""What a rollout server and a trainer must agree on, as the name of the served model."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.rollout.vllm_arguments import longest
from megatron_dypo.runtime.distributed import training_dtype
from megatron_dypo.runtime.seeding import stable_hash


def identity(config: Config, shape: ModelShape, tokenizer: Tokenizer) -> str:
    """E.g. ``megatron_dypo/llama-2x128.model-1f0c.tokenizer-77e1.tokens-512.float32``: the part that differs shows."""
    fields = shape.to_hf_config()
    fields.pop("initializer_range", None)
    parts = (
        f"{shape.family}-{shape.num_layers}x{shape.hidden_size}",
        f"model-{stable_hash(sorted(fields.items())):016x}"[:14],
        f"tokenizer-{tokenizer.digest:016x}"[:18],
        f"tokens-{longest(config, shape)}",
        str(training_dtype(config.model.dtype)).removeprefix("torch."),
        *(["routing"] if config.policy.routing_replay == "rollout" else []),  # which only the start of a server settles
    )
    return "megatron_dypo/" + ".".join(parts)
