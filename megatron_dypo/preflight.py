"""Everything a user can get wrong, found before any process group, model or engine is built."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from megatron_dypo.config.checks import check_layout
from megatron_dypo.config.load import dump
from megatron_dypo.config.schema import Config
from megatron_dypo.convert.hf_folder import check_folder
from megatron_dypo.data import load_data
from megatron_dypo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.policy.shape import ModelShape, hf_folder, model_shape
from megatron_dypo.records import Group, Prompt
from megatron_dypo.rollout import recorded
from megatron_dypo.rollout.collect import encode_prompts
from megatron_dypo.rollout.engine import check_head_size, engine_name
from megatron_dypo.runtime import distributed, run_folder
from megatron_dypo.runtime.seeding import stable_hash


@dataclass
class Inputs:
    """What a run starts from."""

    shape: ModelShape
    tokenizer: Tokenizer
    train: list[Prompt]
    held_out: list[Group]  # data.valid, encoded
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
    config.model.dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[distributed.training_dtype(config.model.dtype)]
    if config.optimizer.distributed and config.trainer.save_every and not _has_fused_adam():
        raise UserError(
            f"{source}: optimizer.distributed: without Transformer Engine or NVIDIA's Apex its checkpoints do not "
            "resume; set trainer.save_every: 0 or leave it off"
        )
    if config.model.hf:
        check_folder(hf_folder(config.model.hf), shape)
    train, valid = load_data(config.data)
    tokenizer = load_tokenizer(config, shape)
    encode_prompts(train, tokenizer, config.data.max_prompt_tokens)
    held_out = encode_prompts(valid, tokenizer, config.data.max_prompt_tokens)
    lock = run_folder.claim(Path(config.trainer.run_dir)) if distributed.launch_rank() == 0 else None
    resume_step = run_folder.resume_step(config)
    if config.rollout.replay:
        recorded.require_steps(config.rollout.replay, range(resume_step + 1, config.trainer.steps + 1))
    return Inputs(shape, tokenizer, train, held_out, resume_step, lock)


def check_agreement(config: Config, inputs: Inputs) -> None:
    """After the process group is built: all ranks must have read the same configuration, data and run folder."""
    prompts = [repr(prompt) for prompt in [*inputs.train, *(group.prompt for group in inputs.held_out)]]
    seen = {
        "the configuration": stable_hash(dump(config)),
        "the prompts": stable_hash(*prompts),
        "the checkpoint to resume from": inputs.resume_step,
    }
    for rank, theirs in enumerate(distributed.all_gather_objects(seen)):
        for what, value in seen.items():
            if theirs[what] != value:
                raise TrainingError(f"rank {distributed.launch_rank()} and rank {rank} do not agree on {what}")


def _has_fused_adam() -> bool:
    """Whether mcore finds an Adam whose state its distributed optimizer can save."""
    return find_spec("transformer_engine") is not None or find_spec("amp_C") is not None
