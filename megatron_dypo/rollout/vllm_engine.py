"""vLLM in this process: one tensor-parallel-1 engine per rank, alongside Megatron-Core, weights replaced in place."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.models.hf_config import write_config
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.vllm_args import engine_arguments, in_process_arguments, sampling_arguments, set_environment
from megatron_dypo.rollout.vllm_versions import installed
from megatron_dypo.runtime import determinism
from megatron_dypo.runtime.distributed import device_kind, launch_rank
from megatron_dypo.runtime.measure import DEVICE
from megatron_dypo.weight_sync.checksum import ChecksummedWeights, Turn
from megatron_dypo.weight_sync.transfer import send_in_process

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import VersionedWeights

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # so that weights need no transport


class VllmEngine:
    """See ``Engine``. Greedy and sampled requests may share a batch; seeds are per request."""

    devices = 0

    @determinism.not_enforced()
    def __init__(self, config: Config, shape: ModelShape, eos_id: int | tuple[int, ...], folder: Path):
        kind = device_kind()
        set_environment(kind, **IN_PROCESS)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        import vllm

        from megatron_dypo.weight_sync.worker import BACKEND

        self._vllm = vllm
        write_config(shape, folder, eos_id)
        threads = torch.get_num_threads()
        self._llm = vllm.LLM(
            **engine_arguments(config, shape, folder, kind, installed()),
            **in_process_arguments(config, kind, launched="RANK" in os.environ),
            weight_transfer_config=vllm.config.WeightTransferConfig(backend=BACKEND),
        )
        self._verify, self._verify_syncs = config.rollout.verify_sync, config.rollout.verify_syncs
        self._syncs = 0
        self._asleep: set[str] = set()  # vLLM's names of the parts of its memory that sleep
        self._dropped = False  # whether a sleep since the last sync dropped the weights
        self._version = 0  # of the weights, once synced
        assert torch.get_num_threads() == threads

    @determinism.not_enforced()
    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """Return one response per request, in order; ``ids`` ends with an end token unless cut at ``max_tokens``."""
        if not requests:
            return []
        assert not self._dropped, "the engine slept without its weights and has to be synced"
        self._wake("weights", "kv_cache")
        prompts = [{"prompt_token_ids": request.prompt_ids.tolist()} for request in requests]
        parameters = [self._vllm.SamplingParams(**sampling_arguments(request.seed, sampling)) for request in requests]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [_response(output.outputs[0], self._version) for output in outputs]

    @determinism.not_enforced()
    def sync(self, weights: VersionedWeights) -> None:
        """Replace all weights and clear what was cached under the old ones."""
        self._wake("weights")
        self._dropped = False
        turn = Turn(self._syncs, self._verify_syncs)
        source = weights if self._verify == "off" else ChecksummedWeights(weights, turn)
        self._llm.collective_rpc("prepare_update", args=(self._verify, turn.number, turn.of))
        send_in_process(_Client(self._llm), source)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync")
        if isinstance(source, ChecksummedWeights):
            source.compare(self._llm.collective_rpc("weight_report"), f"vLLM of rank {launch_rank()}")
        self._syncs += 1
        self._version = weights.version

    @determinism.not_enforced()
    def sleep(self, keep_weights: bool) -> None:
        """Release key/value cache and weights; kept weights are copied to host memory. Needs trainer.offload."""
        self._wake("weights", "kv_cache")  # vLLM considers an engine asleep if any part of it sleeps
        self._llm.sleep(level=1 if keep_weights else 2)
        self._asleep = {"weights", "kv_cache"}
        self._note_unmapped()
        self._dropped |= not keep_weights

    def _wake(self, *parts: str) -> None:
        if wanted := self._asleep.intersection(parts):
            self._llm.wake_up(sorted(wanted))
            self._asleep -= wanted
            self._note_unmapped()

    def _note_unmapped(self) -> None:
        """Record which memory is asleep: it is not on the device, although torch counts it."""
        if torch.cuda.is_available():
            from vllm.device_allocator.cumem import CuMemAllocator

            allocations = CuMemAllocator.get_instance().pointer_to_data.values()
            DEVICE.unmapped(sum(each.handle[1] for each in allocations if each.tag in self._asleep))


class _Client:
    """The engine's end of a weight transfer."""

    def __init__(self, llm):
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update()  # before 0.27 it takes no version, and responses carry ours


def _response(output, version: int) -> Response:
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    arrays = np.array(ids, np.int32), np.array(logprobs, np.float32)
    return Response(*arrays, output.finish_reason, weight_version=version, experts=output.routed_experts)
