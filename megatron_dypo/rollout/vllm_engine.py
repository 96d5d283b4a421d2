"""vLLM in this process: one tensor-parallel-1 engine per rank, beside Megatron-Core, weights replaced in place."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.convert.hf_metadata import write_config
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.runtime import deterministic
from megatron_dypo.runtime.distributed import training_dtype

if TYPE_CHECKING:
    from megatron_dypo.sync.weights import Weights

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process, so weights need no transport
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # every rank would bind its threads to the same first core
    "TORCHDYNAMO_DISABLE": "1",
}


class VllmEngine:
    """See ``Engine``. Greedy and sampled requests may share a batch; seeds are per request."""

    @deterministic.not_enforced()
    def __init__(self, config: Config, shape: ModelShape, eos_id: int, folder: Path):
        cuda = torch.cuda.is_available()
        for name, value in (_ENVIRONMENT | ({} if cuda else _CPU_ENVIRONMENT)).items():
            os.environ.setdefault(name, value)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        import vllm

        self._vllm = vllm
        write_config(shape, folder, eos_id)
        gigabytes = config.rollout.engine_memory
        memory = {"gpu_memory_utilization": gigabytes} if cuda else {"kv_cache_memory_bytes": int(gigabytes * 2**30)}
        threads = torch.get_num_threads()
        self._llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype=str(training_dtype(config.model.dtype)).removeprefix("torch."),
            max_model_len=min(shape.max_position, config.data.max_prompt_tokens + config.rollout.max_response_tokens),
            max_num_seqs=512 if not cuda else 1024,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: temperature and top-p applied
            enable_chunked_prefill=cuda,  # on CPU a seeded request in a chunk crashes ("Generator does not use offset")
            max_num_batched_tokens=None if cuda else max(8192, shape.max_position),
            enforce_eager=not cuda,
            enable_prefix_caching=True,
            enable_sleep_mode=cuda and config.trainer.offload,  # an allocator whose memory can be given back
            disable_log_stats=True,
            # torchrun's LOCAL_RANK picks the GPU; vLLM's own choice is the first one, on every rank
            distributed_executor_backend="external_launcher" if cuda and "RANK" in os.environ else None,
            seed=config.trainer.seed,
            **memory,
        )
        self._asleep: set[str] = set()  # by vLLM's names for parts of its memory
        self._dropped = False  # the weights, by a sleep since the last sync
        self._version = 0  # of the weights, once synced
        assert torch.get_num_threads() == threads

    @deterministic.not_enforced()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """One response per request, in order; ``ids`` ends with ``eos_id`` unless cut at ``max_tokens``."""
        if not requests:
            return []
        assert not self._dropped, "the engine slept without its weights and has to be synced"
        self._wake("weights", "kv_cache")
        prompts = [{"prompt_token_ids": request.prompt_ids.tolist()} for request in requests]
        parameters = [self._parameters(request.seed, sampling) for request in requests]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [_response(output.outputs[0], self._version) for output in outputs]

    @deterministic.not_enforced()
    def sync(self, weights: Weights) -> None:
        """Replace all weights and forget what was cached under the old ones."""
        self._wake("weights")
        self._dropped = False
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._version = weights.version
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync")

    @deterministic.not_enforced()
    def sleep(self, keep_weights: bool) -> None:
        """Key/value cache and weights are given back; kept weights are copied to host memory. Needs trainer.offload."""
        self._wake("weights")  # vLLM would take the engine to be asleep already
        self._llm.sleep(level=1 if keep_weights else 2)
        self._asleep = {"weights", "kv_cache"}
        self._dropped |= not keep_weights

    def _wake(self, *parts: str) -> None:
        if wanted := self._asleep.intersection(parts):
            self._llm.wake_up(sorted(wanted))
            self._asleep -= wanted

    def _parameters(self, seed: int | None, sampling: Sampling):
        greedy = seed is None
        return self._vllm.SamplingParams(
            temperature=0.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            seed=seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=[sampling.eos_id],
            ignore_eos=True,  # stop_token_ids alone decide
            detokenize=False,
            logprobs=0,
        )


def _response(output, version: int) -> Response:
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    arrays = np.array(ids, np.int32), np.array(logprobs, np.float32)
    return Response(*arrays, output.finish_reason, weight_version=version)
