"""The process groups, and this rank's place in them. Every collective has a deadline."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dypo.runtime import cpu_shim

_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}


@dataclass(frozen=True)
class Layout:
    """This rank's place. ``dp`` counts data-parallel replicas; replica = tensor x pipeline ranks."""

    rank: int
    world: int
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int

    def __str__(self) -> str:
        return f"{self.world} ranks: tensor {self.tp} x pipeline {self.pp} x data {self.dp}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def speaks_for_tokens(self) -> bool:
        """Whether this rank's log-probs count in sums over ranks: one rank of each replica, where the head is."""
        return self.is_last_stage and self.tp_rank == 0


def world_size() -> int:
    """Ranks started by the launcher (1 under plain python)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def training_dtype(name: str) -> torch.dtype:
    """bf16 matmuls are 6 to 90 times slower than fp32 on CPUs, hence ``auto``."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def claim_device() -> None:
    """Make this rank's GPU the current device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def stay_on_loopback() -> None:
    """Where all ranks are on this machine, nothing they open is reached from outside; the environment overrides it."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == str(world_size()):
        for name, value in _LOOPBACK.items():
            os.environ.setdefault(name, value)


def init(tensor: int = 1, pipeline: int = 1, timeout: float = 1800.0) -> Layout:
    """Join the job and build mcore's process groups; under plain python a group of one.

    ``timeout`` (seconds) is the deadline of every collective. Installs the CPU shim where there is no CUDA.
    """
    cpu_shim.install()
    from megatron.core import parallel_state as mpu
    from megatron.core import tensor_parallel

    deadline = datetime.timedelta(seconds=timeout)
    stay_on_loopback()
    claim_device()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=deadline)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=deadline)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
        create_gloo_process_groups=backend == "nccl",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=tensor,
        pp=pipeline,
        dp=mpu.get_data_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
    )


def all_gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """Python objects of all ranks of ``group``, in rank order."""
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
