"""How this project runs vLLM, in this process and as a server: one set of engine arguments for both."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.rollout.engine import Sampling
from megatron_dypo.runtime.distributed import training_dtype

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # every engine would bind its threads to the same first core
    "TORCHDYNAMO_DISABLE": "1",
}
MOST_SEQUENCES = {"cuda": 1024, "cpu": 512}  # sampled at a time


def longest(config: Config, shape: ModelShape) -> int:
    """Tokens of prompt and response that the engine makes room for."""
    return min(shape.max_position, config.window)


def engine_arguments(config: Config, shape: ModelShape, folder: Path) -> dict:
    """vLLM's engine arguments for the model whose ``config.json`` lies in ``folder``, without weights."""
    cuda, size = torch.cuda.is_available(), config.rollout.engine_memory
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "load_format": "dummy",
        "dtype": str(training_dtype(config.model.dtype)).removeprefix("torch."),
        "max_model_len": longest(config, shape),
        "max_num_seqs": MOST_SEQUENCES["cuda" if cuda else "cpu"],
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from: temperature and top-p applied
        "enable_chunked_prefill": cuda,  # on CPU a seeded request in a chunk crashes ("Generator does not use offset")
        "enforce_eager": not cuda,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": config.trainer.seed,
        "worker_extension_cls": "megatron_dypo.sync.worker.WorkerExtension",
        **({"enable_return_routed_experts": True} if config.policy.routing == "replay_rollout" else {}),
    } | (
        {"gpu_memory_utilization": size}
        if cuda
        else {"kv_cache_memory_bytes": int(size * 2**30), "max_num_batched_tokens": max(8192, shape.max_position)}
    )


def sampling_arguments(seed: int | None, sampling: Sampling) -> dict:
    """vLLM's sampling parameters of one request; ``seed`` None is greedy decoding."""
    greedy = seed is None
    return {
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "seed": seed,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.end_ids),
        "ignore_eos": True,  # stop_token_ids alone decide
        "detokenize": False,
        "logprobs": 0,  # of the sampled token alone
    }


def as_flags(arguments: dict) -> list[str]:
    """The same for the command line."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
