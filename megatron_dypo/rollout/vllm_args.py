"""vLLM's arguments, the same in process and on a server, and the served model's name."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.rollout.engine import Sampling
from megatron_dypo.rollout.vllm_versions import Vllm, head_dtype
from megatron_dypo.runtime.determinism import stable_hash
from megatron_dypo.runtime.distributed import training_dtype


def served_model_name(config: Config, shape: ModelShape, tokenizer: Tokenizer) -> str:
    """E.g. ``megatron_dypo/llama-2x128.model-1f0c.tokenizer-77e1.tokens-512.float32``: shows what differs."""
    fields = shape.to_hf_config()
    fields.pop("initializer_range", None)
    parts = (
        f"{shape.family}-{shape.num_layers}x{shape.hidden_size}",
        f"model-{stable_hash(sorted(fields.items())):016x}"[:14],
        f"tokenizer-{tokenizer.digest:016x}"[:18],
        f"tokens-{longest(config, shape)}",
        str(training_dtype(config.model.dtype)).removeprefix("torch."),
        *(["routing"] if config.policy.routing_replay == "rollout" else []),  # fixed when a server starts
    )
    return "megatron_dypo/" + ".".join(parts)


_ENVIRONMENT = {  # of vLLM's process, by kind of device, unless already set
    "cuda": {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
    "cpu": {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # every engine would bind its threads to the same first core
        "TORCHDYNAMO_DISABLE": "1",
    },
}
# Always set: FlashInfer's sampler supports neither seeds per request nor the log-probs that we need, and without it
# vLLM 0.26 does not even start.
_ALWAYS = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
MOST_SEQUENCES = {"cuda": 1024, "cpu": 512}  # sampled at a time, at most


def longest(config: Config, shape: ModelShape) -> int:
    """Return the tokens of prompt and response that the engine has room for."""
    return min(shape.max_position, config.window)


def sync_backend(config: Config, kind: str) -> str:
    """Return ``rollout.sync_backend`` with ``auto`` resolved for trainers and servers on devices of ``kind``."""
    wanted = config.rollout.sync_backend
    return wanted if wanted != "auto" else {"cuda": "nccl", "cpu": "shared_memory"}[kind]


def set_environment(kind: str, **also: str) -> None:
    """Set the variables that vLLM reads when it is imported, on a device of ``kind`` (cuda, cpu)."""
    for name, value in (_ENVIRONMENT[kind] | also).items():
        os.environ.setdefault(name, value)
    os.environ.update(_ALWAYS)


def engine_arguments(config: Config, shape: ModelShape, folder: Path, kind: str, vllm: Vllm) -> dict:
    """Return the engine arguments for the model whose ``config.json`` is in ``folder``, without weights.

    ``kind``: of the device (cuda, cpu); ``vllm``: the release that will receive them.
    """
    cuda, size = kind == "cuda", config.rollout.engine_memory
    dtype = training_dtype(config.model.dtype, kind)
    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": longest(config, shape),
        "max_num_seqs": MOST_SEQUENCES[kind],
        "logprobs_mode": "processed_logprobs",  # of the sampling distribution: temperature and top-p applied
        "enable_chunked_prefill": cuda,  # on CPU a seeded request in a chunk crashes ("Generator does not use offset")
        "enforce_eager": not cuda or config.rollout.engine_eager,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": config.trainer.seed,
        "worker_extension_cls": "megatron_dypo.weight_sync.worker.WorkerExtension",
    }
    if config.policy.routing_replay == "rollout":
        arguments["enable_return_routed_experts"] = True
    if dtype.itemsize == 2 and head_dtype(config, vllm, kind) == "float32":
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if cuda:
        return arguments | {"gpu_memory_utilization": size}
    room = {"kv_cache_memory_bytes": int(size * 2**30), "max_num_batched_tokens": max(8192, shape.max_position)}
    return arguments | room


def in_process_arguments(config: Config, kind: str, launched: bool) -> dict:
    """Return further arguments of an engine in a trainer's process; ``launched``: by torchrun, as one of its ranks."""
    cuda = kind == "cuda"
    return {
        "enable_sleep_mode": cuda and config.trainer.offload,  # an allocator whose memory can be released
        # torchrun's LOCAL_RANK selects the GPU; vLLM's own choice would be the first one on every rank
        "distributed_executor_backend": "external_launcher" if cuda and launched else None,
    }


def sampling_arguments(seed: int | None, sampling: Sampling) -> dict:
    """Return vLLM's sampling parameters of one request; ``seed`` None is greedy decoding."""
    greedy = seed is None
    return {
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "seed": seed,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.end_ids),
        "ignore_eos": True,  # only stop_token_ids decide
        "detokenize": False,
        "logprobs": 0,  # only of the sampled token
    }


def as_flags(arguments: dict) -> list[str]:
    """Return the arguments as command-line flags."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
