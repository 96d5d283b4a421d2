"""Everything a user can get wrong, found before any process group, model or engine is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_dypo.config.checks import check_layout
from megatron_dypo.config.schema import Config
from megatron_dypo.convert.hf_folder import folder_weights
from megatron_dypo.data import load_data
from megatron_dypo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.policy.shape import ModelShape, hf_folder, model_shape
from megatron_dypo.records import Prompt
from megatron_dypo.rollout import recorded
from megatron_dypo.rollout.collect import encode_prompts
from megatron_dypo.rollout.engine import check_head_size, engine_name
from megatron_dypo.runtime import distributed, run_folder


@dataclass
class Inputs:
    """What a run starts from."""

    shape: ModelShape
    tokenizer: Tokenizer
    train: list[Prompt]
    valid: list[Prompt]
    resume_step: int
    lock: IO[str] | None  # held by rank 0 for the process's life


def prepare(config: Config, source: str) -> Inputs:
    """Read and check model shape, layout, weights, tokenizer, data and run folder. Raises UserError, one line."""
    shape = model_shape(config.model)
    check_layout(
        config,
        distributed.world_size(),
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.num_layers,
        shape.ffn_hidden_size,
        source,
    )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > shape.max_position:
        raise UserError(
            f"{source}: data.max_prompt_tokens + rollout.max_response_tokens = {longest} "
            f"exceeds the model's limit of {shape.max_position}"
        )
    if engine_name(config) == "vllm":
        check_head_size(shape)
    if config.optimizer.distributed:
        import torch

        if not torch.cuda.is_available() and config.trainer.save_every:
            raise UserError(
                f"{source}: optimizer.distributed: its checkpoints do not resume on CPU; "
                "set trainer.save_every: 0 or leave it off"
            )
    if config.model.hf:
        folder_weights(hf_folder(config.model.hf))
    train, valid = load_data(config.data)
    tokenizer = load_tokenizer(config, shape)
    encode_prompts(train + valid, tokenizer, config.data.max_prompt_tokens)
    lock = run_folder.claim(Path(config.trainer.run_dir)) if distributed.launch_rank() == 0 else None
    resume_step = run_folder.resume_step(config)
    if config.rollout.replay:
        recorded.require_steps(config.rollout.replay, range(resume_step + 1, config.trainer.steps + 1))
    return Inputs(shape, tokenizer, train, valid, resume_step, lock)
